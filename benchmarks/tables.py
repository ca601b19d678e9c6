"""Tables in Markdown that read well in a terminal too."""


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
