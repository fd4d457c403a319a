"""What models were asked and answered, kept as it comes: a killed job goes on where it was."""

import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import orjson

from nemo_cpt.corpus.atomic_files import make_folder, open_locked, write_at
from nemo_cpt.errors import CptError


def key_of(*asked: Any) -> str:
    """Return the digest of everything that an answer depends on: the model, the prompt, the sampling, ... as JSON."""
    return sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_DATACLASS)).hexdigest()


class Journal:
    """Records under keys in a file of JSON lines, locked while it is open; safe for several threads.

    Args:
        path: the file, which may be there already; its folder is made.

    Raises:
        CptError: another process holds it, it cannot be written, or a line of it is not a record.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        make_folder(self.path.parent)
        self._lock, self._records = Lock(), dict[str, dict[str, Any]]()
        self._by_question: dict[str, list[dict[str, Any]]] = {}
        # No patience: who holds it is another job in this folder, which takes long.
        self._file = open_locked(self.path, patience=0)
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        sound = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):  # torn by a crash, and never counted
                os.ftruncate(self._file.fileno(), sound)
                break
            try:
                record = orjson.loads(line)
                self._add(record.pop("key"), record)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CptError(
                    f"{self.path}, line {number} is not a record of answers: {line[:80]!r}. Mend or remove that "
                    "line, or take another folder; the rest is kept."
                ) from error
            sound += len(line)

    def _add(self, key: str, record: dict[str, Any]) -> None:
        self._records[key] = record
        if "asked" in record:
            self._by_question.setdefault(record["asked"], []).append(record)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the record under a key, None where there is none yet."""
        return self._records.get(key)

    def asked(self, question: str) -> Sequence[dict[str, Any]]:
        """Return the records that have a question as their `asked`, whatever their keys hold beside it."""
        return self._by_question.get(question, ())

    def keep(self, key: str, record: dict[str, Any]) -> None:
        """Add a record; it is on the disk when this returns.

        Raises:
            CptError: the disk is full.
        """
        line = orjson.dumps({"key": key} | record) + b"\n"
        with self._lock:
            descriptor = self._file.fileno()
            size = os.fstat(descriptor).st_size
            try:
                # Past the file's own buffer: what a full disk does not take of a line would be left in that, and be
                # written behind the records when the file is closed.
                write_at(descriptor, line, size)
                os.fsync(descriptor)
            except OSError as error:
                # A part of a line would hide itself and, once the disk has room, join the next one.
                os.ftruncate(descriptor, size)
                raise CptError(f"cannot write {self.path}: {error.strerror}. Make room and run it again.") from error
            # After the fsync: what is not on the disk has not been answered.
            self._add(key, record)

    def close(self) -> None:
        """Let go of the file and its lock."""
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
