"""What makes a killed run resumable: a journal beside the unfinished output.

`PREFIX.bin.part` holds tokens, `PREFIX.lens.part` int32 document lengths, `PREFIX.journal` one JSON record a line: the
job, then checkpoints, each written only after the bytes that it vouches for are on the disk. Resuming cuts both files
to the last one.
"""

import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from nemo_cpt.corpus.files import open_locked, sync_directory
from nemo_cpt.errors import CptError


@dataclass
class Progress:
    """How far a job is; all counts are from its beginning, over all of its runs.

    Attributes:
        source: Number of the input that comes next.
        position: Position in it, in bytes or rows.
        lines: Lines of it that lie before.
        read: Bytes of all inputs on disk that lie before.
        nbytes: Bytes of tokens written.
        entries: Document lengths written.
        skipped: Lines left out, by reason.
        largest: Largest token id of the texts.
        special: Literal special tokens, by id.
        probes: What the tokenizer makes of the probe texts, see `probes`.
        compared: Passages that were compared with the reference tokenizer.
        finished: All inputs are done; only the files' names remain to be put right.
    """

    source: int = 0
    position: int = 0
    lines: int = 0
    read: int = 0
    nbytes: int = 0
    entries: int = 0
    tokens: int = 0
    longest: int = 0
    largest: int = -1
    empty: int = 0
    blank: int = 0
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    encoder: str = ""
    probes: dict[str, str] = field(default_factory=dict)
    compared: int = 0
    finished: bool = False


class Journal:
    """The journal of one output, held under a lock while it is open.

    Args:
        prefix: Megatron's full prefix.
        job: What makes two runs the same job; must be JSON.
    """

    def __init__(self, prefix: str, job: dict[str, Any]) -> None:
        self.path = Path(prefix + ".journal")
        self.bin_path, self.lens_path = Path(prefix + ".bin.part"), Path(prefix + ".lens.part")
        self.job = job
        self.progress = Progress()
        self._file: Any = None
        self.bin = self.lens = -1

    def open(self, discard: bool, patience: float) -> bool:
        """Take the lock and find the last checkpoint; return whether there is one to go on from.

        Args:
            discard: Begin anew if what is there belongs to another job.
            patience: Seconds to wait for the lock.

        Raises:
            CptError: Another process works on this output, what is there belongs to another job, or the folder cannot
                be written.
        """
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
        if records:
            self._cut_torn_tail()
        else:
            self._begin()
        self.progress = Progress(**records[-1]["progress"]) if len(records) > 1 else Progress()
        if not self.progress.finished:
            self.bin = self._open_part(self.bin_path, self.progress.nbytes)
            self.lens = self._open_part(self.lens_path, self.progress.entries * 4)
        return len(records) > 1

    def is_finished(self) -> bool:
        """Say whether the journal on the disk is that of a run that was killed while it gave its files their names."""
        if not self.path.is_file():
            return False
        with open(self.path, "rb") as self._file:
            records = self._records()
        self._file = None
        return len(records) > 1 and records[0]["job"] == self.job and records[-1]["progress"]["finished"]

    def _records(self) -> list[dict[str, Any]]:
        """Return the whole records: one that a crash tore, and all after it, do not count."""
        self._file.seek(0)
        records, self._sound = [], 0
        for line in self._file:
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
        last = Progress(**records[-1]["progress"]) if len(records) > 1 else Progress()
        for path, size in ((self.bin_path, last.nbytes), (self.lens_path, last.entries * 4)):
            have = path.stat().st_size if path.exists() else 0
            if have < size and not last.finished:
                return (
                    f"{path} has {have} bytes, but its journal vouches for {size}: it was changed. Begin anew with "
                    f"overwrite=True (--overwrite)."
                )
        return ""

    def _other_job(self, theirs: dict[str, Any]) -> str:
        changed = [key for key in self.job if theirs.get(key) != self.job[key]]
        return (
            f"{self.path} belongs to an unfinished job that differs in {', '.join(changed) or 'its format'}. "
            "Run that job again to finish it, take another output prefix, or discard it with overwrite=True "
            "(--overwrite)."
        )

    def _cut_torn_tail(self) -> None:
        self._file.truncate(self._sound)

    def _begin(self) -> None:
        self._file.truncate(0)
        self.bin_path.unlink(missing_ok=True)  # not truncated: an orphan may still hold the old one
        self.lens_path.unlink(missing_ok=True)
        self._append({"job": self.job})
        sync_directory(self.path.parent)

    def _open_part(self, path: Path, size: int) -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(descriptor, size)
        os.lseek(descriptor, size, os.SEEK_SET)
        return descriptor

    def checkpoint(self, lengths: bytes, problems: list[dict[str, Any]]) -> None:
        """Make everything up to `self.progress` survive a crash.

        Args:
            lengths: Document lengths since the last checkpoint, in order.
            problems: Lines left out since then.

        Raises:
            CptError: The disk is full.
        """
        try:
            os.fdatasync(self.bin)
            if os.write(self.lens, lengths) != len(lengths):
                raise OSError(28, "No space left on device")
            os.fdatasync(self.lens)
            self._append({"progress": asdict(self.progress), "problems": problems})
        except OSError as error:
            raise CptError(
                f"Cannot write beside {self.path}: {error.strerror}. Make room and run the same command again: it "
                "resumes."
            ) from error

    def _append(self, record: dict[str, Any]) -> None:
        body = orjson.dumps(record)
        self._file.write(b"%08x " % zlib.crc32(body) + body + b"\n")
        self._file.flush()
        os.fdatasync(self._file.fileno())

    def problems(self) -> list[dict[str, Any]]:
        """Return all lines left out so far."""
        return [problem for record in self._records() for problem in record.get("problems", [])]

    def remove(self) -> None:
        """Delete what is not output: the output is whole, or there was nothing to keep."""
        for path in (self.bin_path, self.lens_path, self.path):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of files and lock."""
        for descriptor in (self.bin, self.lens):
            if descriptor >= 0:
                os.close(descriptor)
        self.bin = self.lens = -1
        if self._file is not None:
            self._file.close()
