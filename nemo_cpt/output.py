"""Printing, also where nobody may read any more: how a process ends must not depend on that."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

NO_READER = (errno.EPIPE, errno.EIO)  # of a pipe, and of a terminal


def say(what: str, stream: Any = None) -> None:
    """Print to a stream, by default stdout, or to nowhere where it has no reader any more."""
    stream = stream or sys.stdout
    try:
        print(what, file=stream, flush=True)
    except OSError:
        send_nowhere(stream.fileno())  # the interpreter flushes once more at its end, and fails with code 120


def say_that_nemo_loads() -> None:
    """Tell who waits at a terminal what for."""
    if sys.stderr.isatty():
        say("loading NeMo ...", sys.stderr)


def size_of(nbytes: float) -> str:
    """Return a number of bytes as people read it."""
    if nbytes < 1e5:
        return f"{nbytes / 1e3:,.1f} kB"
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.1f} MB"


def send_nowhere(descriptor: int) -> None:
    """Let what is written to a file descriptor from now on be dropped."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def span(seconds: float) -> str:
    """A length of time as people read it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def hold_standard_streams() -> None:
    """Open those that this process was started without, to nowhere.

    Else the next file that is opened is descriptor 1, and gets what a child process prints.
    """
    for number, mode in enumerate("rww"):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            name = ("stdin", "stdout", "stderr")[number]
            setattr(sys, name, getattr(sys, name) or os.fdopen(number, mode))


class WithoutReaders:
    """A stream to write to, also when its reader is gone.

    Args:
        stream: the one to write to as long as somebody reads it.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what was to be written."""
        self._try(self.stream.flush)

    def _try(self, action: Callable[..., Any], *given: str) -> None:
        try:
            action(*given)
        except OSError as error:
            if error.errno not in NO_READER:
                raise
            send_nowhere(self.stream.fileno())
