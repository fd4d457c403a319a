"""The documents of a task with all their fields, for who writes them again."""

import datetime
import decimal
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from nemo_cpt.corpus.reading.chunks import Task, lines_of
from nemo_cpt.corpus.reading.formats import BOM
from nemo_cpt.corpus.reading.lines import Reading, UnusableError, parse_lines, parse_rows, refuse_surrogates


class Record(NamedTuple):
    """A document.

    Attributes:
        line: Its JSON object as it came, without the line's end; of a row, as JSON.
        text: Its text.
        value: The object.
    """

    line: bytes
    text: str
    value: dict[str, Any]


def read_records(task: Task, text_of: Callable[[Any], str], reading: Reading) -> Iterator[Record]:
    """Yield a task's documents; the task is of a feed without a key, so that rows have all their columns.

    Args:
        task: The task.
        text_of: The text of an object, such as `TextUnder` a key; raises UnusableError where there is none.
        reading: How the lines were read is added to it; when a document is yielded, its line is the last one counted.

    Raises:
        CptError: The file changed since the task was made.
    """

    def take(value: Any) -> tuple[str, Any]:
        text = text_of(value)
        refuse_surrogates(text, "its text")
        return text, value

    def take_row(row: Any) -> Record:
        text, _ = take(row)
        return Record(to_json(row), text, row)

    if isinstance(task.data, list):
        for number, row in enumerate(task.data, task.start):
            found = parse_rows([row], number, take_row)
            reading.add(found.reading)
            yield from found.texts
        return
    offset = task.start
    for line in io.BytesIO(lines_of(task)):
        # One by one, so that the caller knows each document by its line when it gets it.
        found = parse_lines(line, offset, take)
        reading.add(found.reading)
        plain = line.removeprefix(BOM) if offset == 0 else line
        yield from (Record(plain.strip(), text, value) for text, value in found.texts)
        offset += len(line)


def to_json(value: Any) -> bytes:
    """Return an object as a line of JSON, without the line's end; dates are written as ISO 8601.

    Python's json and not orjson, which writes NaN as null and refuses long integers: what is not the text is not ours.

    Raises:
        UnusableError: It holds what JSON has no form for.
    """
    text = json.dumps(value, ensure_ascii=False, default=_as_json)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair in another field
        return json.dumps(value, default=_as_json).encode()


def _as_json(value: Any) -> Any:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    # Not left away in silence: a picture beside its text may be what somebody wants to keep.
    what = f"it holds a {type(value).__name__}, which JSON has no form for: write the table without that column first"
    raise UnusableError("not_json", what)
