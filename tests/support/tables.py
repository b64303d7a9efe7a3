"""The tables of a Markdown text as rows of cells."""

from itertools import groupby


def tables(markdown: str) -> list[list[list[str]]]:
    """Return the rows of each table."""
    runs = groupby(markdown.splitlines(), key=lambda line: line.startswith("|"))
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        for is_table, lines in runs
        if is_table
    ]


def table(markdown: str, *head: str) -> list[list[str]]:
    """Return the rows, without the head, of the one table whose head begins with these cells."""
    [found] = [rows[2:] for rows in tables(markdown) if rows[0][: len(head)] == list(head)]
    return found


def rows(markdown: str) -> dict[str, list[str]]:
    """Return the rows of all tables by their first cells."""
    return {first: rest for table in tables(markdown) for first, *rest in table}
