"""JSON lines: a file cut into byte ranges, a block of lines turned into texts."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from nemo_cpt.errors import CptError

BOM = b"\xef\xbb\xbf"


def cut_ranges(start: int, size: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield byte ranges [begin, end) of at most `step` bytes that cover [start, size) in order."""
    for begin in range(start, size, step):
        yield begin, min(begin + step, size)


def read_range(file: BinaryIO, start: int, stop: int) -> tuple[int, bytes]:
    """Return the lines that begin in the bytes [start, stop) of a file, whole, and where the first of them begins.

    A line belongs to the range that holds its first byte, so that any cut gives every line once without a scan before.

    Raises:
        CptError: The file is shorter than `stop`: it changed while it was being read.
    """
    begin = max(start - 1, 0)
    file.seek(begin)
    block = file.read(stop - begin)
    if len(block) < stop - begin:
        raise CptError(f"{file.name} shrank while it was being read: no byte {begin + len(block)} any more.")
    if start > 0:
        first = block.find(b"\n") + 1
        if first == 0 or begin + first >= stop:
            return stop, b""
        begin, block = begin + first, block[first:]
    if not block.endswith(b"\n"):
        block += file.readline()
    return begin, block


@dataclass(frozen=True)
class Problem:
    """A line that gives no text.

    Attributes:
        reason: One of the kinds that the report counts, such as `not_json`.
        detail: A sentence for people.
        line: Lines (rows) before it in its block.
        offset: Byte offset in the (decompressed) file; the row for Parquet and datasets.
    """

    reason: str
    detail: str
    line: int
    offset: int


@dataclass
class Texts:
    """The texts of a block, with what was wrong in it."""

    texts: list[str]
    problems: list[Problem]
    lines: int = 0
    blank: int = 0


def parse_lines(block: bytes, offset: int, key: str) -> Texts:
    """Take the text under `key` from each JSON object of a block of lines that begins at byte `offset` of its file."""
    if offset == 0 and block.startswith(BOM):
        block, offset = block[len(BOM) :], len(BOM)
    found = Texts([], [])
    append, loads = found.texts.append, orjson.loads
    for raw in io.BytesIO(block):
        try:
            text = loads(raw)[key]
            if type(text) is not str:
                raise TypeError
            append(text)
        except (ValueError, KeyError, TypeError):
            if raw.isspace():
                found.blank += 1
            else:
                _second_look(raw, offset, key, found)
        offset += len(raw)
        found.lines += 1
    return found


def _second_look(raw: bytes, offset: int, key: str, found: Texts) -> None:
    """Read a line that orjson refused with Python's json, which the references use: it may take it, or say why not."""
    reason, detail, at = "", "", 0
    try:
        value = json.loads(raw.rstrip(b"\r\n").decode("utf-8"))
        reason, detail = _wrong(value, key)
    except UnicodeDecodeError as error:
        reason, detail, at = "invalid_utf8", f"byte 0x{raw[error.start]:02x} is not UTF-8 ({error.reason})", error.start
    except json.JSONDecodeError as error:
        at = len(raw.decode("utf-8")[: error.pos].encode())
        reason, detail = "not_json", f"not JSON: {error.msg}"
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 brackets in a row
        reason, detail = "not_json", f"JSON that Python does not read: {error}"
    if reason:
        found.problems.append(Problem(reason, detail, found.lines, offset + at))
    else:
        found.texts.append(value[key])


def _wrong(value: Any, key: str) -> tuple[str, str]:
    """Return the reason and the sentence for a JSON value that holds no usable text, ("", "") for one that does."""
    if not isinstance(value, dict):
        return "not_an_object", f"a JSON {type(value).__name__}, not an object with the key {key!r}"
    if key not in value:
        return "missing_key", f"no key {key!r}; it has {', '.join(map(repr, list(value)[:8])) or 'none'}"
    return wrong_text(value[key], key)


def wrong_text(text: Any, key: str) -> tuple[str, str]:
    """Return the reason and the sentence for a value that is no usable text, ("", "") for one that is."""
    if not isinstance(text, str):
        return "not_a_string", f"{key!r} is {'null' if text is None else f'a {type(text).__name__}'}, not a string"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return (
            "lone_surrogate",
            f"{key!r} holds the lone surrogate U+{ord(text[error.start]):04X}, which is no character",
        )
    return "", ""


def parse_rows(values: list[Any], row: int, key: str) -> Texts:
    """Take the texts from the values of a column, the first of which is row `row` of its file."""
    found = Texts([], [], lines=len(values))
    for i, value in enumerate(values):
        reason, detail = ("", "") if type(value) is str else wrong_text(value, key)
        if reason:
            found.problems.append(Problem(reason, detail, i, row + i))
        else:
            found.texts.append(value)
    return found
