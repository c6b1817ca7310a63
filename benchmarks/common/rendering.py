"""Tables as Markdown and on the terminal, and the colours of all pictures."""

from rich.table import Table

BLUE, ORANGE, RED, GREEN, GREY, VIOLET = "#2a6f97", "#f4a261", "#e76f51", "#2a9d8f", "#6c757d", "#7b5ea7"


def markdown(table: dict[str, list[str]]) -> str:
    """A Markdown table of headings and their cells."""
    lines = [table, ["---"] * len(table), *zip(*table.values(), strict=True)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def terminal(table: dict[str, list[str]], title: str | None = None) -> Table:
    """The same for the terminal."""
    shown = Table(*table, title=title)
    for cells in zip(*table.values(), strict=True):
        shown.add_row(*cells)
    return shown
