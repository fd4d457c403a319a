"""What makes a killed run resumable: a journal beside the unfinished output.

`PREFIX.bin.part` holds tokens (and `PREFIX.mask.part`, where there is one, a byte for each), `PREFIX.lens.part` int32
document lengths, `PREFIX.journal` one JSON record a line: the job, then checkpoints, each written only after the bytes
that it vouches for are on the disk. Resuming cuts the files to the last one.
"""

import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from nemo_cpt.corpus.atomic_files import open_locked, sync, write_at
from nemo_cpt.corpus.reading.tally import Tally
from nemo_cpt.errors import CptError

SIZES = {"bin": "nbytes", "mask": "tokens"}  # files that workers write, and which count is their size


@dataclass
class Progress:
    """How far a job is; all counts are from its beginning, over all of its runs.

    Attributes:
        source: Number of the input that comes next.
        position: Position in it, in bytes or rows.
        before: Hash of its content up to there.
        read: Bytes of all inputs on disk that lie before.
        nbytes: Bytes of tokens written.
        entries: Document lengths written.
        largest: Largest token id of the texts.
        special: Literal special tokens, by id.
        counts: Whatever else a kind of job counts, by name.
        probes: What the tokenizer makes of the probe texts, see `probes`.
        compared: Passages that were compared with the reference tokenizer.
        tally: What was read, and what was left out.
        finished: All inputs are done; only the files' names remain to be put right.
    """

    source: int = 0
    position: int = 0
    before: str = ""
    read: int = 0
    nbytes: int = 0
    entries: int = 0
    tokens: int = 0
    longest: int = 0
    largest: int = -1
    empty: int = 0
    seconds: float = 0.0
    special: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    encoder: str = ""
    probes: dict[str, str] = field(default_factory=dict)
    compared: int = 0
    finished: bool = False

    @classmethod
    def of(cls, records: list[dict[str, Any]]) -> "Progress":
        """Return the progress of a journal's last record."""
        # The first record is the job; without a checkpoint, nothing is done yet.
        if len(records) < 2:
            return cls()
        # Each checkpoint holds the counts from the beginning; none depends on those before it.
        last = records[-1]["progress"]
        return cls(**last | {"tally": Tally(**last["tally"])})


@dataclass(frozen=True)
class ReadInput:
    """An input that was read to its end.

    Attributes:
        stamp: What `Source.stamp` was.
        hash: xxh3-128 of its bytes.
    """

    stamp: list[Any]
    hash: str


class Journal:
    """The journal of one output, held under a lock while it is open.

    Args:
        prefix: Megatron's full prefix.
        job: What makes two runs the same job, whatever their inputs; must be JSON.
        files: Which of `SIZES` workers write.

    Attributes:
        outputs: Open descriptors of these files, in order.
        progress: How far the job is.
        saved: How far it is on the disk.
        inputs: The inputs read to their end, in order, as far as the disk knows them.
    """

    def __init__(self, prefix: str, job: dict[str, Any], files: Sequence[str] = ("bin",)) -> None:
        self.prefix, self.path = prefix, Path(prefix + ".journal")
        self.parts = {name: Path(f"{prefix}.{name}.part") for name in files}
        self.lens_path = Path(prefix + ".lens.part")
        self.job = job
        self.progress, self.saved = Progress(), Progress()
        self.inputs: list[ReadInput] = []
        self._file: Any = None
        self._sound = 0  # bytes of the journal that hold whole records
        self.outputs: list[int] = []
        self.lens = -1

    def open(self, discard: bool, patience: float) -> bool:
        """Take the lock and find the last checkpoint; return whether there is one to go on from.

        Args:
            discard: Begin anew if what is there belongs to another job.
            patience: Seconds to wait for the lock.

        Raises:
            CptError: Another process works on this output, what is there belongs to another job, or the folder cannot
                be written.
        """
        # The journal is its own lock file: whoever holds it may write all the parts.
        self._file = open_locked(self.path, patience)  # workers share the lock: orphans of a killed run are waited for
        try:
            return self._take_up(discard)
        except BaseException:
            self.close()
            raise

    def _take_up(self, discard: bool) -> bool:
        records = self._records()
        if records and (obstacle := self._obstacle(records)):
            if not discard:
                raise CptError(obstacle)
            records = []
        if not records:
            self.begin_anew()
            return False
        # Two of them: `progress` runs ahead of the disk, `saved` is what the disk has.
        self.progress, self.saved = Progress.of(records), Progress.of(records)
        self.inputs = [ReadInput(**entry) for record in records for entry in record.get("inputs", [])]
        if not self.progress.finished:
            self._open_parts()
        return len(records) > 1

    def begin_anew(self) -> None:
        """Forget what is there, and begin with an empty output.

        Raises:
            CptError: The disk is full.
        """
        # Descriptors of the old files must not be written to after their names are gone.
        self._close_parts()
        self.progress, self.saved, self.inputs, self._sound = Progress(), Progress(), [], 0
        os.ftruncate(self._file.fileno(), 0)  # first: a journal must not outlive what it vouches for
        for path in (*self.parts.values(), self.lens_path):
            path.unlink(missing_ok=True)  # not truncated: an orphan may still hold the old one
        try:
            with self._writing():
                self._append({"job": self.job})
                sync(self.path.parent)
                self._open_parts()
        except CptError:
            self.remove()
            raise

    def is_finished(self) -> bool:
        """Say whether the journal on the disk is that of a run that had read everything when it ended."""
        if not self.path.is_file():
            return False
        records = self._records()
        return len(records) > 1 and records[0]["job"] == self.job and records[-1]["progress"]["finished"]

    def check(self) -> None:
        """Check that one could go on with what is there.

        Raises:
            CptError: It belongs to another job.
        """
        records = self._records() if self.path.is_file() else []
        if records and (obstacle := self._obstacle(records)):
            raise CptError(obstacle)

    def _records(self) -> list[dict[str, Any]]:
        """Return the whole records: one that a crash tore, and all after it, do not count."""
        records, self._sound = [], 0
        # Not text lines: a torn record may hold any bytes, and `splitlines` breaks at more than \n.
        for line in io.BytesIO(self.path.read_bytes()):
            checksum, _, body = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(body):
                break
            records.append(orjson.loads(body))
            self._sound += len(line)
        return records

    def _obstacle(self, records: list[dict[str, Any]]) -> str:
        """Return why one cannot go on from these records, an empty string if one can."""
        if records[0].get("job") != self.job:
            return self._other_job(records[0].get("job") or {})
        last = Progress.of(records)
        sizes = zip(self.parts.values(), self.sizes(last), strict=True)
        for path, size in (*sizes, (self.lens_path, last.entries * 4)):
            have = path.stat().st_size if path.exists() else 0
            # More than vouched for is normal after a crash; less means that somebody else touched the files.
            if have < size and not last.finished:
                return (
                    f"{path} has {have} bytes, but its journal vouches for {size}: it was changed. Begin anew with "
                    f"overwrite=True (--overwrite)."
                )
        return ""

    def _other_job(self, theirs: dict[str, Any]) -> str:
        changed = [key for key in self.job | theirs if theirs.get(key) != self.job.get(key)]
        return (
            f"{self.path} belongs to an unfinished job that differs in {', '.join(changed) or 'its format'}. "
            "Run that job again to finish it, take another output prefix, or discard it with overwrite=True "
            "(--overwrite)."
        )

    def _open_parts(self) -> None:
        """Open the files, cut to what the disk is known to hold of them."""
        for path, size in zip(self.parts.values(), self.sizes(self.saved), strict=True):
            # No O_APPEND: with it, Linux' pwrite ignores the offset and writes at the end.
            self.outputs.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
            # What lies beyond was written after the checkpoint, by tasks that are encoded again.
            os.ftruncate(self.outputs[-1], size)
        self.lens = os.open(self.lens_path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self.lens, self.saved.entries * 4)

    def sizes(self, counted: Any) -> list[int]:
        """Return how many bytes of each output file belong to a progress, or to what became of a task."""
        return [getattr(counted, SIZES[name]) for name in self.parts]

    def checkpoint(self, lengths: bytes, problems: list[dict[str, Any]], inputs: list[ReadInput]) -> None:
        """Make everything up to `self.progress` survive a crash; one that fails changes nothing.

        Args:
            lengths: Document lengths since the last checkpoint, in order.
            problems: Lines left out since then.
            inputs: Inputs read to their end since then.

        Raises:
            CptError: The disk is full.
        """
        with self._writing():
            # The order of these three steps is what makes a crash harmless at any moment.
            for output in self.outputs:
                os.fdatasync(output)
            write_at(self.lens, lengths, self.saved.entries * 4)  # over what a failed checkpoint left there
            os.fdatasync(self.lens)
            # Last: the record counts only what the two syncs above have put on the disk.
            record = {"problems": problems, "inputs": [asdict(entry) for entry in inputs]}
            self._append({"progress": asdict(self.progress)} | record)
        # Only now: where the disk was full, the next checkpoint takes the same lengths once more.
        self.saved = deepcopy(self.progress)
        self.inputs += inputs

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CptError(
                f"Cannot write beside {self.path}: {error.strerror}. Make room and run the same command again."
            ) from error

    def cut_tokens(self) -> None:
        """Give back the room of tokens that no checkpoint will count in; nobody may be writing any more."""
        for output, size in zip(self.outputs, self.sizes(self.progress), strict=True):
            os.ftruncate(output, size)

    def _append(self, record: dict[str, Any]) -> None:
        # The checksum stands in front of the body, so that half a line never passes for a whole one.
        body = orjson.dumps(record)
        line = b"%08x " % zlib.crc32(body) + body + b"\n"
        descriptor = self._file.fileno()
        os.ftruncate(descriptor, self._sound)  # a record that a full disk tore would hide all that follow it
        try:
            write_at(descriptor, line, self._sound)
        except OSError:
            os.ftruncate(descriptor, self._sound)  # the last whole record stays the last line, for whoever reads it
            raise
        os.fdatasync(descriptor)
        self._sound += len(line)

    def problems(self) -> list[dict[str, Any]]:
        """Return all lines left out so far."""
        return [problem for record in self._records() for problem in record.get("problems", [])]

    def remove(self) -> None:
        """Delete what is not output: the output is whole, or there was nothing to keep."""
        ends = (".lens.part", ".idx.part", ".json.part", ".skipped.jsonl.part", ".journal")
        for path in (*self.parts.values(), *(Path(self.prefix + end) for end in ends)):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of files and lock."""
        self._close_parts()
        if self._file is not None:
            self._file.close()

    def _close_parts(self) -> None:
        for descriptor in (*self.outputs, self.lens):
            if descriptor >= 0:
                os.close(descriptor)
        self.outputs, self.lens = [], -1
