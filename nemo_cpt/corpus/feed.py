"""The inputs cut into tasks, in order: byte ranges for the workers to read, or what only one process can read."""

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nemo_cpt.corpus.lines import cut_ranges
from nemo_cpt.corpus.sources import HUB, Source
from nemo_cpt.errors import CptError

PIECE = 1 << 16  # compressed bytes taken at once: at most some 64 MiB come out of them
ROWS = 1000


class DamagedError(Exception):
    """A file ends or breaks somewhere; what came before it is good."""


@dataclass(frozen=True)
class Task:
    """A stretch of one input.

    Attributes:
        index: Number of the task in this run.
        source: Number of the input.
        path: Its path.
        start: First byte of the (decompressed) file, or first row.
        stop: Where the next stretch begins.
        data: The lines as bytes, or a column's values as a list; None for a range that the worker reads itself.
        done: Bytes of the input on disk read so far, for the progress.
        damage: Why the input ends here though it is not complete; empty for a sound one.
        last: True for the last stretch of its input.
    """

    index: int
    source: int
    path: str
    start: int
    stop: int
    data: bytes | list[Any] | None
    done: int
    damage: str = ""
    last: bool = False


@dataclass
class Feed:
    """An iterator of tasks that hashes the files on the way.

    Attributes:
        sources: The inputs in order.
        json_key: Name of the text's column in Parquet files and datasets.
        chunk_bytes: Size of a task.
        cursor: Number of the input and the position in it where the first task begins.
        hashes: xxh3-128 of each input's bytes as stored, by number, once it has been read to its end.
    """

    sources: list[Source]
    json_key: str
    chunk_bytes: int
    cursor: tuple[int, int] = (0, 0)
    hashes: dict[int, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Task]:
        first, position = self.cursor
        index = 0
        for number in range(first, len(self.sources)):
            start = position if number == first else 0
            for stop, data, done, damage, last in self._stretches(number, start):
                yield Task(index, number, self.sources[number].path, start, stop, data, done, damage, last)
                index, start = index + 1, stop

    def _stretches(self, number: int, start: int) -> Iterator[tuple[int, Any, int, str, bool]]:
        """Yield (stop, data, bytes done, damage, last) for one input."""
        source = self.sources[number]
        readers: dict[str, Callable[[Source, int, int], Iterator[tuple[int, Any, int, str, bool]]]] = {
            "plain": self._ranges,
            "gzip": self._blocks,
            "zstd": self._blocks,
            "parquet": self._rows,
            "dataset": self._rows,
            "hub": self._rows,
        }
        yield from readers[source.kind](source, number, start)

    def _ranges(self, source: Source, number: int, start: int) -> Iterator[tuple[int, Any, int, str, bool]]:
        with HashingFile(source.path) as file:
            file.skip(start)
            for begin, stop in cut_ranges(start, source.size, self.chunk_bytes):
                file.skip(stop - begin)
                yield stop, None, stop, "", stop == source.size
            self.hashes[number] = file.hexdigest()
        if start >= source.size:
            yield source.size, b"", source.size, "", True

    def _blocks(self, source: Source, number: int, start: int) -> Iterator[tuple[int, Any, int, str, bool]]:
        """Yield blocks of whole lines of a compressed file."""
        with HashingFile(source.path) as file:
            position, damage, rest = 0, "", b""
            try:
                for piece in _gather(_decompress(file, source.kind), self.chunk_bytes):
                    rest += piece
                    while cut := _whole_lines(rest, self.chunk_bytes):
                        if position + cut > start:
                            block = rest[max(start - position, 0) : cut]
                            yield position + cut, block, file.position, "", False
                        position, rest = position + cut, rest[cut:]
            except DamagedError as error:
                damage, rest = str(error), rest[: rest.rfind(b"\n") + 1]
            self.hashes[number] = file.hexdigest()
            stop = max(position + len(rest), start)
            yield stop, rest[max(start - position, 0) :], source.size, damage, True

    def _rows(self, source: Source, number: int, start: int) -> Iterator[tuple[int, Any, int, str, bool]]:
        """Yield the values of the text column, `ROWS` rows at once."""
        batches, total = _open_rows(source, self.json_key)
        row, damage = 0, ""
        try:
            for values in _sound(batches, source.kind):
                stop = row + len(values)
                if stop > start:
                    share = source.size * stop // max(total, 1)
                    yield stop, values[max(start - row, 0) :], share, "", stop == total
                row = stop
        except DamagedError as error:
            damage = str(error)
        self.hashes[number] = hash_source(source)
        if damage or total == 0 or start >= total:
            yield max(row, start), [], source.size, damage, True


class HashingFile(io.RawIOBase):
    """A file read forward; what is read is hashed."""

    def __init__(self, path: str) -> None:
        import xxhash

        self._file = io.FileIO(path)
        self._hash = xxhash.xxh3_128()
        self._buffer = memoryview(bytearray(PIECE * 4))
        self.position = 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to the buffer's size, and hash it."""
        count = self._file.readinto(buffer) or 0
        self._hash.update(memoryview(buffer)[:count])
        self.position += count
        return count

    def skip(self, count: int) -> None:
        """Hash `count` bytes without keeping them, which also brings them into the page cache for the workers."""
        while count > 0 and (got := self.readinto(self._buffer[:count])):
            count -= got

    def hexdigest(self) -> str:
        """Return the hash of the whole file; hashes what has not been read yet."""
        self.skip(sys.maxsize)
        return self._hash.hexdigest()


def hash_file(path: str) -> str:
    """Return the xxh3-128 of a file's bytes, in hexadecimal."""
    with HashingFile(path) as file:
        return file.hexdigest()


def _gather(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Join pieces to such of at least `size` bytes; what comes before an error is given before it."""
    gathered: list[bytes] = []
    try:
        for piece in pieces:
            gathered.append(piece)
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
    return block.rfind(b"\n", 0, size) + 1 or block.find(b"\n", size) + 1


def _decompress(file: HashingFile, kind: str) -> Iterator[bytes]:
    """Decompress a gzip or zstd file, also one of several members or frames, and notice a missing end."""
    import zlib

    import zstandard
    from isal import igzip_lib

    stream = _decompressor(kind)
    rest, begun = b"", False
    try:
        while piece := rest or file.read(PIECE):
            begun = True
            yield stream.decompress(piece)
            rest = stream.unused_data
            if stream.eof:
                rest = rest.lstrip(b"\0") if kind == "gzip" else rest  # gzip allows padding, which tapes had
                stream, begun = _decompressor(kind), False
    except (zlib.error, igzip_lib.IsalError, zstandard.ZstdError) as error:  # type: ignore[misc]
        raise DamagedError(f"the {kind} file breaks near its byte {file.position}: {error}") from error
    if begun:
        raise DamagedError(f"the {kind} file ends at byte {file.position}, before the end of its data")


def _decompressor(kind: str) -> Any:
    if kind == "gzip":
        from isal import isal_zlib

        return isal_zlib.decompressobj(wbits=31)
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


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
        what = "Parquet file" if kind == "parquet" else "dataset"
        raise DamagedError(f"the {what} breaks near its row {row}: {error}") from error


def _open_rows(source: Source, key: str) -> tuple[Iterator[list[Any]], int]:
    """Return batches of the text column's values, and the number of rows."""
    if source.kind == "parquet":
        return _open_parquet(source.path, key)
    dataset = _open_dataset(source)
    if key not in dataset.column_names:
        raise CptError(f"{source.path} has no column {key!r}; it has {', '.join(dataset.column_names)}.")
    tables = dataset.select_columns([key]).with_format("arrow").iter(batch_size=ROWS)
    return (table.column(key).to_pylist() for table in tables), len(dataset)


def _open_parquet(path: str, key: str) -> tuple[Iterator[list[Any]], int]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise CptError(f"{path} is not a whole Parquet file: {error}.") from error
    if key not in file.schema_arrow.names:
        raise CptError(f"{path} has no column {key!r}; it has {', '.join(file.schema_arrow.names)}.")
    batches = file.iter_batches(batch_size=ROWS, columns=[key], use_threads=False)
    return (batch.column(0).to_pylist() for batch in batches), file.metadata.num_rows


def _open_dataset(source: Source) -> Any:
    import datasets

    try:
        if source.kind == "dataset":
            return datasets.load_from_disk(source.path)
        name, _, split = source.path.removeprefix(HUB).partition(":")
        name, _, config = name.partition("@")
        return datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library has its own kinds, its dependencies have theirs
        raise CptError(f"Cannot open the dataset {source.path}: {error}") from error


def hash_source(source: Source) -> str:
    """Return the hash of an input's bytes; of a dataset of the hub, its fingerprint."""
    if source.kind == "hub":
        return f"fingerprint:{_open_dataset(source)._fingerprint}"
    return _hash_folder(source.path) if source.kind == "dataset" else hash_file(source.path)


def _hash_folder(folder: str) -> str:
    from pathlib import Path

    import xxhash

    hashes = "".join(hash_file(str(path)) for path in sorted(Path(folder).glob("*.arrow")))
    return xxhash.xxh3_128(hashes.encode()).hexdigest()
