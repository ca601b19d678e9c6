"""Pages of docs/ with what a benchmark measured: its lines between two marks, what people wrote around them."""

import sys
from pathlib import Path

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def write_page(page: Path, script: str, lines: list[str]) -> None:
    """Put ``lines`` and the command that measured them between the marks of ``page``, which must be there."""
    command = " ".join([f"benchmarks/{script}", *sys.argv[1:]])
    text = page.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    measured = [BEGIN, f"Written by `python {command}`.", "", *lines, END]
    page.write_text(head + "\n".join(measured) + tail)
    print(f"wrote docs/{page.name}")


def table(columns: tuple[str, ...] | list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    widths = [max(len(row[index]) for row in [list(columns), *rows]) for index in range(len(columns))]
    lines = [cells(list(columns), widths)]
    lines.append(
        "|" + "|".join("-" * (width + 2) if not i else "-" * (width + 1) + ":" for i, width in enumerate(widths)) + "|"
    )
    return "\n".join(lines + [cells(row, widths) for row in rows])


def cells(row: list[str], widths: list[int]) -> str:
    """One line."""
    first, *rest = (
        value.rjust(width) if index else value.ljust(width)
        for index, (value, width) in enumerate(zip(row, widths, strict=True))
    )
    return "| " + " | ".join([first, *rest]) + " |"
