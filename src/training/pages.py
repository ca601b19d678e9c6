"""What the commands write for people and other programs: Markdown tables and JSON files."""

import json
from pathlib import Path

from src.models.config import CONFIG_NAME, ModelConfig, saved_weights_sha256


def table(header: list[str], rows: list[list], align: str = "---") -> str:
    """A Markdown table; ``align`` is that of every column but the first, ``---:`` for numbers."""
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def measured_model(folder: str | Path, runtime: str) -> dict:
    """Which model a file of measurements is of: its weights and calibration, and what ran it. Raises ModelError."""
    folder = Path(folder)
    card = ModelConfig.load(folder / CONFIG_NAME)
    return {
        "weights_sha256": saved_weights_sha256(folder),
        "temperature": card.temperature,
        "exponent": card.exponent,
        "uncertain_below": card.uncertain_below,
        "runtime": runtime,
    }
