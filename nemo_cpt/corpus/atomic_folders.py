"""Folders that are complete or absent, whoever else makes one of their name or is killed at it."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nemo_cpt.corpus.atomic_files import sync
from nemo_cpt.errors import CptError

_OWNER = ".owner"  # in a folder that is being written: the machine's name, under the writing process's lock
_SMALL_FILES = 64 * 2**20  # bytes, at most, beside weights: tokenizer, configuration, index or context


def check_place(output: Path) -> None:
    """Raise CptError where a folder that is not there yet could not be made: learning takes minutes."""
    if output.exists():  # whose that is says what was noted in it
        return
    nearest = next(folder for folder in output.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise CptError(f"{output} cannot be made: nothing can be written into {nearest}. Give another output.")


@contextmanager
def new_folder(dest: str | Path, weight_bytes: int = 0) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `dest` when the block ends well, and disappears when it does not.

    What a process that was killed on this machine left of the same `dest` is removed first, and said on stderr.

    Args:
        dest: where it shall be; has to be free.
        weight_bytes: of the weights that will be written, if any; with the small files, checked against the disk's free
            space beforehand.

    Raises:
        CptError: `dest` exists, its parent cannot be written, or the disk is or becomes too full.
    """
    dest = Path(dest)
    if dest.exists() or dest.is_symlink():
        raise CptError(f"{dest} exists already. Give another destination, or remove it first.")
    _remove_leftovers(dest)
    # Beside `dest`: a rename is atomic only within a file system. Of a name of its own, so that two at once do not mix.
    partial = dest.with_name(f"{_partial_prefix(dest)}{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        with _owned(partial):  # past the renaming, or another process could take it for left
            _check_free_space(partial, weight_bytes + _SMALL_FILES)
            yield partial
            _flush(partial)
            # After the flush, and before the name: `dest` holds nothing of ours, and nobody mistakes it for left.
            (partial / _OWNER).unlink()
            partial.rename(dest)
            sync(dest.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and os.path.lexists(dest):
            raise CptError(f"{dest} was made by another process meanwhile. It stands as that made it.") from error
        raise CptError(
            f"{dest} could not be written: {error}. Nothing is left of it; free the cause, rerun."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial_prefix(dest: Path) -> str:
    return f".{dest.name}.partial-"


@contextmanager
def _owned(partial: Path) -> Iterator[None]:
    """Let the folder say whose it is; the name appears when the lock is held, so that nobody else can take it first."""
    with (partial / f"{_OWNER}.new").open("x", encoding="utf-8") as owner:
        owner.write(socket.gethostname())
        owner.flush()
        _locked(owner)
        Path(owner.name).rename(partial / _OWNER)
        yield


def _remove_leftovers(dest: Path) -> None:
    """Remove what killed processes left of `dest`: their lock is free, and the lock is this machine's to judge."""
    for partial in sorted(dest.parent.glob(f"{glob.escape(_partial_prefix(dest))}*")):
        try:
            with (partial / _OWNER).open("r+", encoding="utf-8") as owner:
                host = owner.read()
                if host != socket.gethostname():
                    print(f"{partial} was left or is being written on {host}; it is not touched.", file=sys.stderr)
                # The lock ends with its process, however it ended: whoever gets it knows that the writer is gone.
                elif _locked(owner):
                    print(f"Removing {partial}, which a killed command left.", file=sys.stderr)
                    shutil.rmtree(partial, ignore_errors=True)
        except FileNotFoundError:  # nothing of ours, or finished meanwhile
            continue


def _locked(file: IO[str]) -> bool:
    """Take the file's lock, which ends with the process; False where another holds it or the disk knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _check_free_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CptError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB are needed. "
            "Free some space or choose another destination."
        )


def _flush(folder: Path) -> None:
    # The folder last: its entries must not reach the disk before what they name.
    for path in [*folder.rglob("*"), folder]:
        sync(path)
