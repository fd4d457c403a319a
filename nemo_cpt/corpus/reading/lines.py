"""A block of lines (rows) turned into texts, or into whatever else is taken from each."""

import io
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from nemo_cpt.corpus.reading.formats import BOM

# The fields that conversations are recognised by; `nemo_cpt.conversations.forms` reads them.
MESSAGES = ("messages", "conversations")  # OpenAI's, and ShareGPT's
# Questions and answers as published data sets name them; a user names others by `form`.
PAIRS = (
    ("query", "answer"),
    ("query", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("input", "output"),
)
ASKED = (*MESSAGES, "instruction", *dict.fromkeys(question for question, _ in PAIRS))
ANSWERED = frozenset(answer for _, answer in PAIRS)

Take = Callable[[Any], Any]  # turns a line's value, or a row's, into what is wanted of it, or raises UnusableError


class UnusableError(Exception):
    """A line (row) holds nothing that can be used.

    Attributes:
        reason: One of the kinds that a report counts, such as `missing_key`.
        detail: A sentence for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


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
    """The texts of a block, or what else was taken from its lines, and how it was read."""

    texts: list[Any]
    reading: Reading


def parse_lines(block: bytes, offset: int, take: Take) -> Texts:
    """Take something from the JSON value of each line of a block that begins at byte `offset` of its file."""
    # Only at the file's beginning: elsewhere U+FEFF is a character of the text.
    if offset == 0 and block.startswith(BOM):
        block, offset = block[len(BOM) :], len(BOM)
    reading, texts = Reading(nbytes=len(block)), list[Any]()
    # The loop below runs once a line of the corpus: one try around the common case, all checks in the rare one.
    append, loads = texts.append, orjson.loads
    for raw in io.BytesIO(block):
        try:
            append(take(loads(raw)))
        # ValueError is orjson's for any line that it does not take.
        except (ValueError, UnusableError):
            if raw.isspace():
                reading.blank += 1
            else:
                try:
                    append(_second_look(raw, take))
                except _BadLineError as bad:
                    reading.problems.append(Problem(bad.reason, bad.detail, reading.lines, offset + bad.at, len(raw)))
        offset += len(raw)
        reading.lines += 1
    reading.texts = len(texts)
    return Texts(texts, reading)


class _BadLineError(UnusableError):
    """A line is wrong at one of its bytes."""

    def __init__(self, reason: str, detail: str, at: int = 0) -> None:
        super().__init__(reason, detail)
        self.at = at


def _second_look(raw: bytes, take: Take) -> Any:
    """Read a line that orjson refused with Python's json, which the references use: it may take it, or say why not."""
    try:
        value = json.loads(raw.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        detail = f"byte 0x{raw[error.start]:02x} is not UTF-8 ({error.reason})"
        raise _BadLineError("invalid_utf8", detail, error.start) from None
    except json.JSONDecodeError as error:
        # Python counts characters; a place in the file is told in bytes.
        at = len(raw.decode("utf-8")[: error.pos].encode())
        raise _BadLineError("not_json", f"not JSON: {error.msg}", at) from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 brackets in a row
        raise _BadLineError("not_json", f"JSON that Python does not read: {error}") from None
    try:
        found = take(value)
        if isinstance(found, str):
            refuse_surrogates(found, "its text")  # which orjson does
    except UnusableError as error:
        raise _BadLineError(error.reason, error.detail) from None
    return found


@dataclass(frozen=True)
class TextUnder:
    """Takes the text under a key."""

    key: str

    def __call__(self, value: Any) -> str:
        """Return the text of an object."""
        if not isinstance(value, dict):
            detail = f"a JSON {type(value).__name__}, not an object with the key {self.key!r}"
            raise UnusableError("not_an_object", detail)
        if self.key not in value:
            have = ", ".join(map(repr, list(value)[:8])) or "none"
            raise UnusableError("missing_key", f"no key {self.key!r}; it has {have}{_advice(value)}")
        return self.of_column(value[self.key])

    def of_column(self, text: Any) -> str:
        """Return the text that a value of the key's column is."""
        # Not isinstance: this runs once a line, and JSON makes no subclasses.
        if type(text) is not str:
            what = "null" if text is None else f"a {type(text).__name__}"
            raise UnusableError("not_a_string", f"{self.key!r} is {what}, not a string")
        return text


def _advice(value: dict[str, Any]) -> str:
    """Which field may be meant; of a conversation, how conversations are given."""
    asked = next((name for name in ASKED if name in value), "")
    if asked in MESSAGES or (asked and not ANSWERED.isdisjoint(value)):
        return f" (a conversation: prepare takes it with --template, split with --json-key {asked})"
    texts = {name: len(text) for name, text in value.items() if isinstance(text, str)}
    likely = max(texts, key=texts.__getitem__, default="")
    return f"; --json-key {shlex.quote(likely)} takes its longest text" if likely else ""


def refuse_surrogates(text: str, name: str) -> None:
    """Check that a text holds no half of a surrogate pair, which JSON can write and UTF-8 cannot.

    Raises:
        UnusableError: It does.
    """
    if said := lone_surrogate(text):
        raise UnusableError("lone_surrogate", f"{name} {said}")


def lone_surrogate(text: str) -> str:
    """What is wrong with a text that holds half of a surrogate pair; "" where it holds none."""
    if text.isascii():
        return ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds the lone surrogate U+{ord(text[error.start]):04X}, which is no character"
    return ""


def parse_rows(values: list[Any], row: int, take: Take) -> Texts:
    """Take something from each row's value, the first of which is row `row` of its file."""
    reading, texts = Reading(lines=len(values)), list[Any]()
    for i, value in enumerate(values):
        try:
            texts.append(take(value))
        except UnusableError as error:
            reading.problems.append(Problem(error.reason, error.detail, i, row + i))
    reading.texts = len(texts)
    return Texts(texts, reading)
