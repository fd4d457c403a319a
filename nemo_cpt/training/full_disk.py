"""What a training says that could not write: which disk is full, what is kept, and what to do."""

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from nemo_cpt.checkpoint.context import UNFINISHED
from nemo_cpt.errors import CptError
from nemo_cpt.training import run_lock
from nemo_cpt.training.run_folder import newest_whole

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBE_BYTES = 2**20
_NOTE, _FULL = "disk", "disk-full"  # a file, and its name when rank 0 has found the disk full


@contextlib.contextmanager
def say_which_disk_is_full(run_folder: Path, checkpoints: Path, clear_away: bool) -> Iterator[None]:
    """Make one CptError of whatever a full disk makes of a training, and clear away the checkpoint that had no room.

    Checkpoints are written by this process, by writers that it forked and by PyTorch's own code, metrics and logs by
    others; hardly any of their exceptions says what happened. So the disk is asked; ranks that come to ask when rank 0
    has cleared away find its note.

    Args:
        run_folder: the run's.
        checkpoints: where its checkpoints are.
        clear_away: remove what is unfinished there; for rank 0.

    Raises:
        CptError: a write failed for want of room.
    """
    note = run_folder / run_lock.FOLDER / _NOTE
    if clear_away:
        _lay_out(note)
    try:
        with _log_files_do_not_complain():
            yield
    except CptError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is PyTorch's, and a BaseException
        folder = checkpoints if checkpoints.is_dir() else run_folder
        # The disk before the exception: a writer's often says only that a child ended.
        what = _refusal(folder) or _noted(note, folder) or _complaint(error)
        if what is None:
            raise
        if clear_away:
            # What is unfinished may be another job's by now.
            run_lock.check_held(run_folder)
            with contextlib.suppress(OSError):
                note.rename(note.with_name(_FULL))  # which takes no room; before there is some again
            _remove_unfinished(checkpoints)
        newest = newest_whole(checkpoints)
        kept = (
            f"{newest.path} is whole, and the same command goes on from its step {newest.step}"
            if newest
            else "No checkpoint was written yet, and the same command starts again"
        )
        free = shutil.disk_usage(folder).free
        raise CptError(
            f"{what} ({type(error).__name__}). {kept}, once there is room ({free / 1e9:.2f} GB are free in {folder})"
        ) from error


def _lay_out(note: Path) -> None:
    """Make the file that a full disk has no room to make, and forget what an earlier start noted."""
    with contextlib.suppress(OSError):
        note.with_name(_FULL).unlink(missing_ok=True)
        note.touch()


def _noted(note: Path, folder: Path) -> str | None:
    """What rank 0 found of the disk, if it has noted that."""
    full = note.with_name(_FULL).exists()
    return f"{folder} cannot be written any more: {os.strerror(errno.ENOSPC)}" if full else None


@contextlib.contextmanager
def _log_files_do_not_complain() -> Iterator[None]:
    """Pass over lines that a log file has no room for, each with a traceback: metrics and checkpoints say it once."""
    complain = logging.Handler.handleError

    def handle_error(handler: logging.Handler, record: logging.LogRecord) -> None:
        # Every other complaint stays: only want of room is said elsewhere.
        if getattr(sys.exc_info()[1], "errno", None) not in _NO_ROOM:
            complain(handler, record)

    logging.Handler.handleError = handle_error  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        logging.Handler.handleError = complain  # type: ignore[method-assign]


def _refusal(folder: Path) -> str | None:
    """What a full disk says to a small file in `folder`; None if it takes the file."""
    probe = folder / f".room-{uuid.uuid4().hex[:8]}"
    try:
        with open(probe, "wb") as file:
            # A megabyte, and fsync: small files may fit into what a full file system keeps back, and quotas are counted
            # late.
            file.write(bytes(_PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as error:
        return f"{folder} cannot be written any more: {error.strerror}" if error.errno in _NO_ROOM else None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return None


def _complaint(error: BaseException) -> str | None:
    """What an exception, or one that it came from, says of a want of room; None if nothing.

    Those of other processes arrive as text: pickle drops what they came from.
    """
    reasons = "|".join(re.escape(os.strerror(number)) for number in _NO_ROOM)
    cause: BaseException | None = error
    while cause is not None:
        if found := re.search(rf"[^\n]*({reasons})[^\n]*", str(cause)):
            return found[0].strip()
        cause = cause.__cause__ or cause.__context__
    return None


def _remove_unfinished(checkpoints: Path) -> None:
    for marker in checkpoints.glob(f"*{UNFINISHED}"):
        # The folder first: without its marker, what is left of it would pass for a whole checkpoint.
        shutil.rmtree(str(marker).removesuffix(UNFINISHED), ignore_errors=True)
        marker.unlink(missing_ok=True)
