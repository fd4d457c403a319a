"""Tables on a terminal; tab-separated lines, which no terminal's width cuts, elsewhere."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from nemo_cpt.errors import CptError

WORD = 8  # characters of a column that still can be read; longer words may be broken


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
    """Print rows under their columns' names; on a terminal that is too narrow for that, a line each value."""
    if not sys.stdout.isatty():
        return print_plain([columns, *rows])
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    if Console().width < least_width(columns, rows):
        for row in rows:
            print(row[0], *(f"  {name}: {value}" for name, value in zip(columns[1:], row[1:], strict=True)), sep="\n")
        return
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=not number)  # the first are names, to be pasted
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def least_width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """The columns of a terminal below which a table would break words, and at last leave no room to a value at all."""
    first = max(len(row[0]) for row in (columns, *rows))
    words = [[word for row in (columns, *rows) for word in row[at].split()] for at in range(1, len(columns))]
    longest = [min(max(map(len, each), default=0), WORD) for each in words]
    return first + sum(longest) + 3 * len(columns) + 1  # a rule and two blanks a column


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


def note_long_texts(inputs: Sequence[str]) -> None:
    """Say, ahead of hours of work, which text files are one document each and seem to hold many."""
    from nemo_cpt.corpus.reading.long_texts import long_texts
    from nemo_cpt.corpus.reading.sources import list_sources

    # What cannot be read the command itself refuses, in its own order.
    with suppress(CptError, OSError):
        if note := long_texts(list_sources(inputs)):
            print_note(f"note: {note}")
