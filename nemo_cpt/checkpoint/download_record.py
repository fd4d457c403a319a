"""What `download` notes in a folder: which revision it holds, and the checksums of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from isal.isal_zlib import crc32

from nemo_cpt.errors import CptError
from nemo_cpt.records import restored

_RECORD = ".download.json"
_READ_AT_ONCE = 2**20  # bytes, so that they stay in the processor's cache


@dataclass(frozen=True)
class FileRecord:
    """A file as it arrived: `content` is the hub's name of its bytes (`sha256:…` or `git:…`), `crc32` our own."""

    content: str
    crc32: int


@dataclass(frozen=True)
class DownloadRecord:
    """The revision that a folder holds, and its files by name."""

    repo_id: str
    commit: str
    files: Mapping[str, FileRecord]

    def write(self, folder: Path) -> None:
        """Keep it in the folder."""
        (folder / _RECORD).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> DownloadRecord | None:
    """The folder's record; None where it was not made by `download`, or the record is of no use."""
    try:
        content = json.loads((folder / _RECORD).read_bytes())
        files = {name: restored(FileRecord, file) for name, file in content["files"].items()}
        return DownloadRecord(content["repo_id"], content["commit"], files)
    # Of no use is as good as none: sizes and hashes are then compared with the hub's.
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def check_file(path: Path, recorded: FileRecord) -> None:
    """Raise CptError when a file's bytes are not those that arrived."""
    found = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_AT_ONCE):
            found = crc32(piece, found)
    if found != recorded.crc32:
        raise CptError(
            f"{path} is not what was downloaded: its bytes changed since. Download it again; if you saved another "
            f"model there yourself, remove {path.with_name(_RECORD)}."
        )
