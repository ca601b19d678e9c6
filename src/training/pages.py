"""What the commands write for people and other programs: Markdown tables and JSON files."""

import json
from pathlib import Path


def table(header: list[str], rows: list[list], align: str = "---") -> str:
    """A Markdown table; ``align`` is that of every column but the first, ``---:`` for numbers."""
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
