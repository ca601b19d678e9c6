"""The tables of a page of docs/, read back."""

from tests.conftest import ROOT


def rows_of(page: str) -> dict[str, dict[str, str]]:
    """By the first cell of each row of docs/``page``: its cells by the head of their column."""
    rows: dict[str, dict[str, str]] = {}
    head: list[str] = []
    for line in (ROOT / "docs" / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif set(line) - set("|-: "):
            rows[cells[0]] = dict(zip(head, cells, strict=True))
    return rows
