"""Tables for people, as Markdown."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, padded so that it also reads well in a terminal."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return tabulate(escaped, list(header), tablefmt="github", disable_numparse=True)
