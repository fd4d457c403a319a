"""The documents of a task with all their fields, for who writes them again."""

import datetime
import decimal
import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from nemo_cpt.corpus.reading.chunks import Task, lines_of
from nemo_cpt.corpus.reading.formats import BOM
from nemo_cpt.corpus.reading.lines import Reading, TextUnder, UnusableError, parse_lines, parse_rows, refuse_surrogates


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


def read_records(task: Task, json_key: str, reading: Reading) -> Iterator[Record]:
    """Yield a task's documents; the task is of a feed without a key, so that rows have all their columns.

    Args:
        task: The task.
        json_key: The field that holds the text.
        reading: How the lines were read is added to it; when a document is yielded, its line is the last one counted.

    Raises:
        CptError: The file changed since the task was made.
    """
    text_of = TextUnder(json_key)

    def take(value: Any) -> Any:
        refuse_surrogates(text_of(value), "its text")
        return value

    def take_row(row: Any) -> Record:
        return Record(to_json(take(row)), row[json_key], row)

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
        yield from (Record(plain.strip(), value[json_key], value) for value in found.texts)
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
