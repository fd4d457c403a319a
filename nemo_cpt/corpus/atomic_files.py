"""Writing files so that they are complete or absent, by one process at a time."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from nemo_cpt.errors import CptError

Made = TypeVar("Made")
COPIED = 64 << 20  # bytes copied at once


def make_folder(path: Path) -> None:
    """Make a folder and those above it; one that exists is left as it is.

    Raises:
        CptError: A file has its name or stands in its path, or the folder above cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CptError(f"Cannot make the folder {path}: {error.strerror}. Take another output.") from error


@contextmanager
def folder_to_fill(path: Path) -> Iterator[None]:
    """Make a folder, as `make_folder` does; one that was not there, and in which nothing is at an error, goes again."""
    new = not path.exists()
    make_folder(path)
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):  # it holds something by now
                path.rmdir()
        raise


def open_locked(path: Path, patience: float) -> BinaryIO:
    """Open a file for reading and appending, and lock it until it is closed; forked processes share the lock.

    The holder may remove the file before it lets go: whoever waited then notices, and makes a new one.

    Args:
        path: The file; made if it is not there.
        patience: Seconds to wait for the lock.

    Raises:
        CptError: Another process holds the lock, or the file cannot be opened.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            # "a+b", not "wb": whoever waits for the lock must not empty the file that the holder is writing.
            file = open(path, "a+b")  # noqa: SIM115  the lock lives as long as the file is open
        except OSError as error:
            raise CptError(f"Cannot write {path}: {error.strerror}. Take another output.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock belongs to the inode, not to the name: the one just locked may be a file that was removed
            # meanwhile.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except OSError:
            if time.monotonic() > deadline:
                file.close()
                raise CptError(f"Another process is writing this output: it holds {path}.") from None
        file.close()  # busy, or another process finished this output and removed the file just now
        time.sleep(0.05)


@contextmanager
def locked(path: Path, patience: float) -> Iterator[None]:
    """Hold a lock file for a while, as `open_locked` does, and remove it afterwards."""
    with open_locked(path, patience):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at a place of an open file; a full disk writes a part of it before it says so.

    Raises:
        OSError: It cannot be written.
    """
    # A view: `view[written:]` copies nothing, and a piece of tokens may be many megabytes.
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Return `size` bytes of an open file, fewer where it ends before; one read gives 2 GiB at most."""
    pieces = []
    while size > 0 and (piece := os.pread(descriptor, size, offset)):
        pieces.append(piece)
        size, offset = size - len(piece), offset + len(piece)
    return b"".join(pieces)


def copy_to(path: Path, descriptor: int, offset: int) -> None:
    """Copy a file to a place of an open one; file systems that can share or copy blocks by themselves do.

    Raises:
        CptError: The disk is full, or the file becomes shorter meanwhile.
    """
    with path.open("rb") as file:
        size, done = os.fstat(file.fileno()).st_size, 0
        try:
            while done < size:
                with suppress(OSError):  # of a file system, or a pair of them, that cannot
                    if copied := os.copy_file_range(
                        file.fileno(), descriptor, min(size - done, COPIED), done, offset + done
                    ):
                        done += copied
                        continue
                piece = read_at(file.fileno(), min(size - done, COPIED), done)
                if not piece:
                    raise CptError(f"{path} became shorter while it was copied. Run the same command again.")
                write_at(descriptor, piece, offset + done)
                done += len(piece)
        except OSError as error:
            raise CptError(
                f"Cannot copy {path}: {error.strerror}. Make room and run the same command again."
            ) from error


def written_beside(
    work: Path,
    last: str,
    move: Callable[[], None],
    write: Callable[[], Made],
    *,
    existing: Callable[[], Made | None],
    refuse_foreign: Callable[[], None],
    overwrite: bool,
) -> Made:
    """Write what belongs together into a folder of its own, then move it to its place; killed anywhere, it goes on.

    Args:
        work: The folder to write into.
        last: The file that `write` writes last: where it is, everything beside it is whole.
        move: Moves them to their place, `last` last; may be repeated.
        write: Writes the files.
        existing: What is there already; None where it is to be made.
        refuse_foreign: Refuses to replace files that nobody made with `write`.
        overwrite: Make it whatever is there.

    Returns:
        What `existing` or `write` gives.
    """
    if (work / last).exists():  # killed while it moved them
        move()
    shutil.rmtree(work, ignore_errors=True)
    if not overwrite:
        if (there := existing()) is not None:
            return there
        refuse_foreign()
    work.mkdir()
    try:
        made = write()
        move()
    finally:
        # With the last file, all is written: the next run moves it (above).
        if not (work / last).exists():
            shutil.rmtree(work, ignore_errors=True)
    return made


def refuse_foreign_files(folder: Path, names: Iterable[str], last: str, what: str, does: str) -> None:
    """Refuse to write where files of these names are, without the one that says who made them.

    Args:
        folder: Where they would go.
        names: Of the files.
        last: The file that says that all are there.
        what: What would be made, for the message.
        does: What that would do to a file that is there.

    Raises:
        CptError: One is there.
    """
    if found := [name for name in names if os.path.lexists(folder / name)]:
        raise CptError(
            f"{folder} holds {', '.join(found)} without a {last}: no {what} wrote that, and this one would {does} it. "
            "Take another folder, or overwrite=True (--overwrite)."
        )


def move_into_place(work: Path, folder: Path, names: Iterable[str], last: str, gone: Iterable[str] = ()) -> None:
    """Move finished files into their folder, `last` last; each step may be repeated after a crash.

    Args:
        work: Where they are.
        folder: Where they go.
        names: The others beside `last`.
        last: The file that says that all are there.
        gone: Files of the folder that the new ones leave without a meaning.
    """
    (folder / last).unlink(missing_ok=True)  # first: until the new one is there, the folder holds nothing whole
    for name in names:
        if (work / name).exists():
            (work / name).replace(folder / name)
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    sync(folder)
    (work / last).replace(folder / last)
    sync(folder)


def sync(path: Path) -> None:
    """Make a file's content, or the renames and removals in a folder, survive a power cut."""
    # A rename is an entry in the folder, which has a cache of its own: syncing the file does not sync its name.
    descriptor = os.open(path, os.O_RDONLY)
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
        # After the fsync: the other way round, a power cut could leave the new name with no bytes behind it.
        partial.rename(path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CptError(f"Cannot write {path}: {error.strerror}.") from error
