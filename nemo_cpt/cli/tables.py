"""Tables on a terminal; tab-separated lines, which no terminal's width cuts, elsewhere."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def print_pairs(pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values; a long value goes on in the next line on a terminal."""
    # Strings once, for both ways of printing.
    texts = [(name, str(value)) for name, value in pairs]
    if not sys.stdout.isatty():
        return print_plain(texts)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    for _ in range(2):
        table.add_column(overflow="fold")
    for name, value in texts:
        table.add_row(Text(name), Text(value))  # as strings, [brackets] in a path would be styles
    Console().print(table)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under their columns' names."""
    if not sys.stdout.isatty():
        return print_plain([columns, *rows])
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=not number)  # the first are names, to be pasted
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def print_plain(rows: Iterable[Sequence[str]]) -> None:
    """Print rows as tab-separated lines."""
    print("\n".join("\t".join(row) for row in rows))


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object; NaN and infinity become null."""
    from nemo_cpt.page import finite

    print(json.dumps(finite(value), ensure_ascii=False, indent=2))


def print_report(rows: Mapping[str, object], warnings: Iterable[str]) -> None:
    """Print names and values, and warnings on stderr."""
    print_pairs(rows.items())
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def print_note(line: str) -> None:
    """Print a line of the command's own on stderr, at once: what takes time is told while it does."""
    print(f"nemo-cpt: {line}", file=sys.stderr, flush=True)
