"""A block of lines (rows) turned into texts."""

import io
import json
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from nemo_cpt.corpus.formats import BOM


@dataclass(frozen=True)
class Problem:
    """A line that gives no text.

    Attributes:
        reason: One of the kinds that the report counts, such as `not_json`.
        detail: A sentence for people.
        line: Lines (rows) before it in its block.
        offset: Byte offset in the (decompressed) file; the row for Parquet and datasets.
        nbytes: Bytes of the line; 0 for a row.
    """

    reason: str
    detail: str
    line: int
    offset: int
    nbytes: int = 0


@dataclass
class Reading:
    """What a block of lines (rows) held.

    Attributes:
        lines: All of them.
        blank: Those with nothing on them.
        texts: Those that gave a text.
        nbytes: Their bytes; 0 for rows.
        problems: Those that gave none, in order.
    """

    lines: int = 0
    blank: int = 0
    texts: int = 0
    nbytes: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, next_lines: "Reading") -> None:
        """Count in what follows these lines."""
        self.problems += [replace(problem, line=problem.line + self.lines) for problem in next_lines.problems]
        self.lines += next_lines.lines
        self.blank += next_lines.blank
        self.texts += next_lines.texts
        self.nbytes += next_lines.nbytes


@dataclass
class Texts:
    """The texts of a block, and how it was read."""

    texts: list[str]
    reading: Reading


def parse_lines(block: bytes, offset: int, key: str) -> Texts:
    """Take the text under `key` from each JSON object of a block of lines that begins at byte `offset` of its file."""
    if offset == 0 and block.startswith(BOM):
        block, offset = block[len(BOM) :], len(BOM)
    reading, texts = Reading(nbytes=len(block)), list[str]()
    append, loads = texts.append, orjson.loads
    for raw in io.BytesIO(block):
        try:
            text = loads(raw)[key]
            if type(text) is not str:
                raise TypeError
            append(text)
        except (ValueError, KeyError, TypeError):
            if raw.isspace():
                reading.blank += 1
            elif isinstance(found := _second_look(raw, key), str):
                append(found)
            else:
                reason, detail, at = found
                reading.problems.append(Problem(reason, detail, reading.lines, offset + at, len(raw)))
        offset += len(raw)
        reading.lines += 1
    reading.texts = len(texts)
    return Texts(texts, reading)


def _second_look(raw: bytes, key: str) -> str | tuple[str, str, int]:
    """Read a line that orjson refused with Python's json, which the references use: it may take it, or say why not.

    Returns:
        The text, or the reason, the sentence and the byte of the line where it is wrong.
    """
    try:
        value = json.loads(raw.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return "invalid_utf8", f"byte 0x{raw[error.start]:02x} is not UTF-8 ({error.reason})", error.start
    except json.JSONDecodeError as error:
        return "not_json", f"not JSON: {error.msg}", len(raw.decode("utf-8")[: error.pos].encode())
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 brackets in a row
        return "not_json", f"JSON that Python does not read: {error}", 0
    reason, detail = _wrong(value, key)
    return (reason, detail, 0) if reason else value[key]


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
    reading, texts = Reading(lines=len(values)), list[str]()
    for i, value in enumerate(values):
        reason, detail = ("", "") if type(value) is str else wrong_text(value, key)
        if reason:
            reading.problems.append(Problem(reason, detail, i, row + i))
        else:
            texts.append(value)
    reading.texts = len(texts)
    return Texts(texts, reading)
