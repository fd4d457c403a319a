"""Writing files so that they are complete or absent."""

import os
from pathlib import Path

from nemo_cpt.errors import CptError


def sync_directory(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path`: beside, fsync, rename.

    Raises:
        CptError: The disk is full or the folder cannot be written.
    """
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CptError(f"Cannot write {path}: {error.strerror}.") from error
