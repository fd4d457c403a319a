"""Files of plain text and of comma-separated values as rows: a document is a whole file, or a row of a table."""

import csv
import sys
from collections.abc import Iterator
from typing import Any

from nemo_cpt.errors import CptError

ROWS = 1000
_DELIMITERS = ",;\t"
_UTF8 = "utf-8-sig"  # without a byte order mark, which is no text


def open_text(path: str, key: str | None) -> tuple[Iterator[list[Any]], int]:
    """Return the one row of a file of plain text, as it is, and that it is one."""

    def rows() -> Iterator[list[Any]]:
        # newline="": a document keeps the line ends that it has.
        with open(path, encoding=_UTF8, newline="") as file:
            text = file.read()
        yield [text if key is not None else {"text": text}]

    return rows(), 1


def open_csv(path: str, key: str | None, chunk_bytes: int) -> tuple[Iterator[list[Any]], int]:
    """Return batches of a column's values, or of objects of all columns, and about how many rows there are.

    The first line names the columns; what of comma, semicolon and tab stands most often in it parts them. A batch that
    cannot be read raises ValueError: it is no UTF-8, a quote has no end, a row has other columns than the header.

    Raises:
        CptError: The header lacks the column, or names one twice.
    """
    columns, delimiter = _header(path)
    if len(set(columns)) < len(columns):
        raise CptError(f"{path} names a column twice; it has {', '.join(columns)}.")
    if key is not None and key not in columns:
        raise CptError(f"{path} has no column {key!r}; it has {', '.join(columns)}. --json-key takes another.")
    with open(path, "rb") as file:
        lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    return _batches(path, columns, delimiter, key, chunk_bytes), lines


def _header(path: str) -> tuple[list[str], str]:
    try:
        with open(path, encoding=_UTF8, newline="") as file:
            line = file.readline()
    except UnicodeDecodeError as error:
        raise CptError(f"{path} is no UTF-8 ({error.reason} at byte {error.start}); convert it with iconv.") from None
    delimiter = max(_DELIMITERS, key=line.count)
    return next(csv.reader([line], delimiter=delimiter), []), delimiter


def _batches(path: str, columns: list[str], delimiter: str, key: str | None, chunk_bytes: int) -> Iterator[list[Any]]:
    csv.field_size_limit(sys.maxsize)  # 128 KiB by default, which documents exceed
    with open(path, encoding=_UTF8, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        # The header, through the same reader: a quoted name may hold a line break.
        next(reader)
        try:
            while rows := _next_rows(reader, chunk_bytes):
                for row in rows:
                    _check_width(row, columns, reader.line_num)
                yield [dict(zip(columns, row, strict=True)) if key is None else row[columns.index(key)] for row in rows]
        except csv.Error as error:
            raise ValueError(f"{error} (line {reader.line_num})") from error


def _next_rows(reader: Iterator[list[str]], chunk_bytes: int) -> list[list[str]]:
    """Return the next rows that are not blank: `ROWS` of them at most, and of long ones about so many characters."""
    rows, size = list[list[str]](), 0
    for row in reader:
        if row:
            rows.append(row)
            size += sum(map(len, row))
        if len(rows) == ROWS or size >= chunk_bytes:
            break
    return rows


def _check_width(row: list[str], columns: list[str], line: int) -> None:
    if len(row) != len(columns):
        raise ValueError(
            f"{len(row)} fields where the header has {len(columns)}, by line {line}: a text that holds the delimiter "
            "or a line break stands in quotes"
        )
