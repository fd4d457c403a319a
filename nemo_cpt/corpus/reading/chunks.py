"""The inputs cut into tasks, in order: ranges of lines for the workers to read, or what only one process can read."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from nemo_cpt.corpus.atomic_files import read_at
from nemo_cpt.corpus.reading.decompression import PIECE, DamagedError, array_to_lines, unpack
from nemo_cpt.corpus.reading.lines import Take, Texts, TextUnder, parse_lines, parse_rows
from nemo_cpt.corpus.reading.sources import HUB, InputChangedError, Inputs, Source, list_sources
from nemo_cpt.corpus.reading.tables import ROWS, open_csv, open_text
from nemo_cpt.errors import CptError
from nemo_cpt.hub import retries_told_once
from nemo_cpt.made import Stamps

HASHED = 1 << 20  # bytes read at once where they are only hashed or counted
ROW_KINDS = ("parquet", "dataset", "hub", "csv", "text")


@dataclass(frozen=True)
class Task:
    """A chunk of one input: whole lines, or rows.

    Attributes:
        index: Number of the task in this run.
        source: Number of the input.
        path: Its path.
        start: First byte of the (decompressed) file, or first row.
        stop: Where the next chunk begins.
        data: The lines as bytes, or rows as a list of a column's values or of objects; None for lines that the worker
            reads itself.
        done: Bytes of the input on disk read so far, for the progress.
        damage: Why the input ends here though it is not complete; empty for a sound one.
        last: True for the last chunk of its input.
        digest: xxh3-64 of lines that the worker reads itself.
        hash: xxh3-128 of the input's content up to `stop`, in hexadecimal; for its last chunk, of its bytes as stored
            (of a dataset of the hub, the fingerprint).
    """

    index: int
    source: int
    path: str
    start: int
    stop: int
    data: bytes | list[Any] | None
    done: int
    damage: str
    last: bool
    digest: int
    hash: str


class Feed:
    """An iterator of tasks that hashes the inputs on the way.

    Args:
        sources: The inputs in order.
        json_key: Name of the text's column in Parquet files and datasets; None for objects of all columns.
        chunk_bytes: Size of a task.
        cursor: Number of the input and the position in it where the first task begins.
        before: The `hash` of the task that ended there; what lies before the cursor must still have it.
    """

    def __init__(
        self,
        sources: list[Source],
        json_key: str | None,
        chunk_bytes: int,
        cursor: tuple[int, int] = (0, 0),
        before: str = "",
    ) -> None:
        self.sources, self.json_key, self.chunk_bytes = sources, json_key, chunk_bytes
        self.cursor, self.before = cursor, before
        self._indices = count()

    def __iter__(self) -> Iterator[Task]:
        """Yield the tasks.

        Raises:
            InputChangedError: What lies before the cursor is not what it was.
            CptError: An input cannot be opened.
        """
        first, position = self.cursor
        for number in range(first, len(self.sources)):
            yield from self._tasks(number, position if number == first else 0)

    def _tasks(self, number: int, start: int) -> Iterator[Task]:
        """Yield one input's tasks from `start` on; what lies before is read and compared."""
        import xxhash

        source, content = self.sources[number], xxhash.xxh3_128()
        position = source.start
        # Also what lies before the cursor is read: hashing it is the only proof that it is still the same.
        for part in self._parts(source):
            # A resumed run may begin inside a part: `known` was worked on by an earlier run and is only hashed.
            known, block = part.block[: max(start - position, 0)], part.block[max(start - position, 0) :]
            content.update(_as_bytes(known))
            position += len(known)
            # Exactly at the cursor, or at the end of a file that is now shorter than the cursor.
            if (known and position == start) or (part.last and position < start):
                self._check_cursor(source, position, content.hexdigest())
            # Before the yield: of a part `in_place`, the block is a view of a buffer that the reader uses again.
            content.update(_as_bytes(block))
            if block or part.last:
                begin, position = position, position + len(block)
                yield Task(
                    index=next(self._indices),
                    source=number,
                    path=source.path,
                    start=begin,
                    stop=position,
                    data=None if part.in_place else block,
                    done=part.done,
                    damage=part.damage,
                    last=part.last,
                    # The worker reads the range again by itself, and must find what was hashed here.
                    digest=xxhash.xxh3_64_intdigest(block) if part.in_place else 0,
                    hash=part.whole or content.hexdigest(),
                )

    def _check_cursor(self, source: Source, position: int, before: str) -> None:
        if (position, before) != (self.cursor[1], self.before):
            raise InputChangedError(f"{source.path} changed after a part of it was read")

    def _parts(self, source: Source) -> Iterator["_Part"]:
        if source.kind in ROW_KINDS:
            return _rows(source, self.json_key, self.chunk_bytes)
        if source.divisible:
            # Plain lines alone can be read from the middle, so that workers read them in parallel.
            return _ranges(source, self.chunk_bytes)
        return _blocks(source, self.chunk_bytes)


@dataclass(frozen=True)
class _Part:
    """What a reader found next: whole lines or rows.

    Attributes:
        done: Bytes of the input on disk read so far.
        in_place: The lines are read again by whoever wants them; these bytes are gone when the reader goes on.
        damage: Why the input ends here though it is not complete.
        last: Nothing follows.
        whole: Of the last part, the hash of the input as stored where it differs from that of its content.
    """

    block: Any
    done: int
    in_place: bool = False
    damage: str = ""
    last: bool = False
    whole: str = ""


def _ranges(source: Source, chunk_bytes: int) -> Iterator[_Part]:
    """Yield a plain file's lines, through one buffer: they are hashed here and read by the workers."""
    buffer, have, done = bytearray(chunk_bytes), 0, 0  # buffer[:have] is read and not given yet; `done` counts the file
    with open(source.path, "rb", buffering=0) as file:
        file.seek(source.start)
        # Never past the size that the input was listed with: `check_unchanged` refuses what has grown.
        while done < source.nbytes and (got := file.readinto(memoryview(buffer)[have : have + source.nbytes - done])):
            have, done = have + got, done + got
            if done == source.nbytes:
                break
            if cut := buffer.rfind(b"\n", 0, have) + 1:
                yield _Part(memoryview(buffer)[:cut], done, in_place=True)
                buffer[: have - cut] = buffer[cut:have]  # the beginning of a line, to the front
                have -= cut
            elif have == len(buffer):  # a longer line; a view of the old buffer may still be about
                buffer = buffer + bytes(have)
        yield _Part(memoryview(buffer)[:have], done, in_place=True, last=True)


def _blocks(source: Source, chunk_bytes: int) -> Iterator[_Part]:
    """Yield blocks of whole lines of a file that only one process can read: a compressed one, a JSON array."""
    with HashingFile(source.path) as file:
        pieces = unpack(file, source.kind)
        rest, damage = b"", ""
        try:
            for piece in _gather(array_to_lines(pieces) if source.array else pieces, chunk_bytes):
                rest += piece
                # A piece may hold many chunks' worth of lines, since text compresses twentyfold and more.
                while cut := _whole_lines(rest, chunk_bytes):
                    yield _Part(rest[:cut], file.tell())
                    rest = rest[cut:]
        except DamagedError as error:
            damage, rest = str(error), rest[: rest.rfind(b"\n") + 1]  # half a line is no document
        # What precedes the damage is handed on: whether it may be used is the policy's to say.
        yield _Part(rest, source.size, damage=damage, last=True, whole=file.hexdigest())


def _rows(source: Source, key: str | None, chunk_bytes: int) -> Iterator[_Part]:
    """Yield the values of a column, or objects of all of them: `ROWS` rows at once, fewer where they are long."""
    batches, total = _open_rows(source, key, chunk_bytes)
    row, damage, values = 0, "", list[Any]()
    # One batch behind: only when another follows, or none, is it known whether this one is the last.
    try:
        for following in _sound(batches, source.kind):
            if values:
                row += len(values)
                yield _Part(values, source.size * row // max(total, 1))
            values = following
    except DamagedError as error:
        damage = str(error)
    yield _Part(values, source.size, damage=damage, last=True, whole=hash_source(source))


def _as_bytes(block: Any) -> Any:
    """Return lines as they are, and rows as bytes that differ where the rows do."""
    if not isinstance(block, list):
        return block
    try:
        # With a separator, else ["ab", "c"] and ["a", "bc"] would have one hash.
        return "\0".join(block).encode("utf-8", "surrogatepass")
    except TypeError:  # objects, or a value that is no text; the lines' owner will hear of it
        return repr(block).encode("utf-8", "surrogatepass")


def texts_of(task: Task, json_key: str) -> Texts:
    """Read a task's texts.

    Raises:
        CptError: The file changed since the task was made.
    """
    text = TextUnder(json_key)
    return take_from(task, text, text.of_column)


def take_from(task: Task, take: Take, take_row: Take | None = None) -> Texts:
    """Take something from each of a task's lines or rows; where rows are no objects, `take_row` says what.

    Raises:
        CptError: The file changed since the task was made.
    """
    if isinstance(task.data, list):
        # Rows come decoded from the parent: their readers cannot begin in the middle of a file, as lines can.
        return parse_rows(task.data, task.start, take_row or take)
    return parse_lines(lines_of(task), task.start, take)


def lines_of(task: Task) -> bytes:
    """Return a task's lines.

    Raises:
        CptError: The file changed since the task was made.
    """
    import xxhash

    if task.data is not None:
        return bytes(task.data)
    with open(task.path, "rb", buffering=0) as file:
        block = read_at(file.fileno(), task.stop - task.start, task.start)
    # An input that is still being written would give documents cut in the middle, and no error.
    if xxhash.xxh3_64_intdigest(block) != task.digest:
        raise _changed(task)
    return block


def check_unchanged(source: Source, last: Task) -> None:
    """Check that an input is still what was read of it.

    Args:
        source: The input.
        last: Its last task.

    Raises:
        CptError: It changed meanwhile.
    """
    # Lines are hashed as they are read; rows only afterwards, so that of them only the time of a change tells.
    if not source.unchanged() and (isinstance(last.data, list) or hash_source(source) != last.hash):
        raise _changed(last)


def _changed(task: Task) -> CptError:
    return CptError(f"{task.path} changed while it was being read. Run again once nothing writes to it.")


class HashingFile:
    """A file read forward; what is read is hashed."""

    def __init__(self, path: str) -> None:
        import xxhash

        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed by __exit__
        self._hash = xxhash.xxh3_128()

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, none at the end."""
        piece = self._file.read(size)
        self._hash.update(piece)
        return piece

    def tell(self) -> int:
        """Return how many bytes were read."""
        return self._file.tell()

    def hexdigest(self) -> str:
        """Return the hash of the whole file; hashes what has not been read yet."""
        while self.read(PIECE):
            pass
        return self._hash.hexdigest()


def hash_file(path: str) -> str:
    """Return the xxh3-128 of a file's bytes, in hexadecimal."""
    with HashingFile(path) as file:
        return file.hexdigest()


def hash_ranges(path: str, ranges: list[tuple[int, int]]) -> list[str]:
    """Return the xxh3-128 of each range of a file's bytes, and of all of them together; the ranges follow one another.

    The hash of a range that the file is too short for is that of what there is.
    """
    import xxhash

    together, hashes = xxhash.xxh3_128(), list[str]()
    with open(path, "rb", buffering=0) as file:
        file.seek(ranges[0][0])
        for start, stop in ranges:
            content, left = xxhash.xxh3_128(), stop - start
            while left and (piece := file.read(min(left, HASHED))):
                content.update(piece)
                together.update(piece)
                left -= len(piece)
            hashes.append(content.hexdigest())
    return [*hashes, together.hexdigest()]


def count_lines(path: str, stop: int) -> int:
    """Return how many lines of a file end before byte `stop`."""
    lines, left = 0, stop
    with open(path, "rb", buffering=0) as file:
        while left and (piece := file.read(min(left, HASHED))):
            lines, left = lines + piece.count(b"\n"), left - len(piece)
    return lines


def _gather(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Join pieces to such of at least `size` bytes; what comes before an error is given before it."""
    gathered: list[bytes] = []
    try:
        for piece in pieces:
            gathered.append(piece)
            # Joined once per chunk: adding piece to piece would copy the beginning again each time.
            if sum(map(len, gathered)) >= size:
                yield b"".join(gathered)
                gathered.clear()
    except DamagedError:
        yield b"".join(gathered)
        raise
    yield b"".join(gathered)


def _whole_lines(block: bytes, size: int) -> int:
    """Return how many bytes of a block to cut off: whole lines, about `size` bytes; 0 for a shorter block."""
    if len(block) < size:
        return 0
    # The last line end before the limit; for a longer line the first one after it; 0 where there is none.
    return block.rfind(b"\n", 0, size) + 1 or block.find(b"\n", size) + 1


def _sound(batches: Iterator[list[Any]], kind: str) -> Iterator[list[Any]]:
    """Yield batches of rows until one cannot be read.

    Raises:
        DamagedError: One cannot: a page that does not decompress, an invalid string.
    """
    import pyarrow as pa

    row = 0
    try:
        for values in batches:
            yield values
            row += len(values)
    except (OSError, ValueError, pa.ArrowException) as error:
        what = {"parquet": "Parquet file", "csv": "CSV file", "text": "text file"}.get(kind, "dataset")
        cure = ". If it is in another encoding, convert it with iconv" if isinstance(error, UnicodeDecodeError) else ""
        raise DamagedError(f"the {what} breaks near its row {row}: {error}{cure}") from error


def _open_rows(source: Source, key: str | None, chunk_bytes: int) -> tuple[Iterator[list[Any]], int]:
    """Return batches of a column's values, or of objects of all columns, and the number of rows."""
    if source.kind == "text":
        return open_text(source.path, key)
    if source.kind == "csv":
        return open_csv(source.path, key, chunk_bytes)
    if source.kind == "parquet":
        tables, total = _open_parquet(source.path, key, chunk_bytes)
    else:
        dataset = _open_dataset(source)
        if key is not None:
            if key not in dataset.column_names:
                raise CptError(f"{source.path} has no column {key!r}; it has {', '.join(dataset.column_names)}.")
            dataset = dataset.select_columns([key])
        # Arrow tables: the library's own iteration makes a Python object of each row by itself.
        tables, total = dataset.with_format("arrow").iter(batch_size=ROWS), len(dataset)
    parts = _cut(tables, chunk_bytes)
    return (part.to_pylist() if key is None else part.column(key).to_pylist() for part in parts), total


def _cut(tables: Iterator[Any], chunk_bytes: int) -> Iterator[Any]:
    """Cut Arrow tables into slices of about so many bytes: of a thousand books each process would hold many copies."""
    for table in tables:
        step = _rows_in(chunk_bytes, table.nbytes, len(table))
        yield from (table.slice(row, step) for row in range(0, len(table), step))


def _rows_in(chunk_bytes: int, nbytes: int, rows: int) -> int:
    return min(ROWS, max(chunk_bytes * rows // max(nbytes, 1), 1))


def _open_parquet(path: str, key: str | None, chunk_bytes: int) -> tuple[Iterator[Any], int]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)  # of pages that have one
    except (pa.ArrowInvalid, OSError) as error:
        raise CptError(f"{path} is not a whole Parquet file: {error}.") from error
    if key is not None and key not in file.schema_arrow.names:
        raise CptError(f"{path} has no column {key!r}; it has {', '.join(file.schema_arrow.names)}.")
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    wanted = [column for column in columns if key is None or column.path_in_schema.split(".")[0] == key]
    nbytes, total = sum(column.total_uncompressed_size for column in wanted), file.metadata.num_rows
    size = _rows_in(chunk_bytes, nbytes, total)
    return file.iter_batches(size, columns=None if key is None else [key], use_threads=False), total


def _open_dataset(source: Source) -> Any:
    import datasets

    try:
        if source.kind == "dataset":
            return datasets.load_from_disk(source.path)
        name, _, split = source.path.removeprefix(HUB).partition(":")
        name, _, config = name.partition("@")
        with retries_told_once():
            return datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library has its own kinds, its dependencies have theirs
        raise CptError(f"Cannot open the dataset {source.path}: {error}") from error


def hash_source(source: Source) -> str:
    """Return the hash of an input's bytes; of a dataset of the hub, its fingerprint."""
    if source.kind == "hub":
        return f"fingerprint:{_open_dataset(source)._fingerprint}"
    if source.is_range:
        return hash_ranges(source.path, [(source.start, source.end)])[0]
    return _hash_folder(source.path) if source.kind == "dataset" else hash_file(source.path)


def stamps_of(inputs: Inputs | None) -> Stamps:
    """Return what tells inputs from others without reading them: as `made.stamps`; of the hub's, their fingerprint."""
    sources = list_sources(inputs) if inputs else []
    return [
        [source.path, hash_source(source)]
        if source.kind == "hub"
        else [Path(source.path).name, source.size, source.mtime_ns]
        for source in sources
    ]


def _hash_folder(folder: str) -> str:
    import xxhash

    # Sorted: a folder lists its files in any order.
    hashes = "".join(hash_file(str(path)) for path in sorted(Path(folder).glob("*.arrow")))
    return xxhash.xxh3_128(hashes.encode()).hexdigest()
