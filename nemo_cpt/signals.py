"""The signals that tell a job to stop, and how the processes that a job starts live through them."""

import contextlib
import ctypes
import functools
import multiprocessing
import multiprocessing.popen_fork
import multiprocessing.process
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
training_began = False  # in this process: from then on there may be something to save
ECHO_SECONDS = 1.0
STOPPED_DOWNLOAD = "nemo-cpt: stopped; what arrived is kept, and the same command goes on"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)


class Given:
    """How often each signal was given. One that comes again within a second was given once.

    `timeout` signals its command and then the command's whole group, and a terminal's Ctrl-C may come by two ways: to
    end a job unsaved, somebody has to ask for it a second time.
    """

    def __init__(self) -> None:
        self._last: dict[int, float] = {}
        self._counts: Counter[int] = Counter()

    def __bool__(self) -> bool:
        """Whether any was given."""
        return bool(self._counts)

    def add(self, number: int) -> int:
        """Note a signal, and return how often it was given by now; 0 for an echo."""
        now = time.monotonic()
        if number in self._last and now - self._last[number] < ECHO_SECONDS:
            return 0
        self._last[number] = now
        self._counts[number] += 1
        return self._counts[number]


def listen(handler: Callable[[int, Any], None], numbers: Iterable[int]) -> None:
    """Call `handler` on signals, also on those that were held back until now; not on a SIGHUP that nohup ignores."""
    heard = [each for each in numbers if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)


@contextlib.contextmanager
def held(numbers: Iterable[int]) -> Iterator[None]:
    """Hold signals back from this thread until the block ends, and from what it starts until that listens."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def ctrl_c_ends(told: str) -> Iterator[None]:
    """Let Ctrl-C end this process at once, with a line on stderr, while threads run that Python would wait for.

    For commands, whose process is theirs; a Ctrl-C that is handled otherwise, or ignored, stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end(*_: object) -> None:
        os.write(2, f"\n{told}\n".encode())
        os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when the one that started it dies; Linux alone can.

    A parent that was dead before this call sends none: look for it afterwards.
    """
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)


def shield_children() -> None:
    """Let what this process starts from now on live through the signals that tell the job to stop, and end with it.

    Slurm, a terminal and `docker stop` signal every process of a job. Megatron's queue of write results, asynchronous
    checkpoint writers, DataLoader and compile workers would die of it, and the save that the signal asks for with them.
    They start with these signals blocked, which what they start inherits in turn, through `exec` too. A child that its
    parent ends on purpose is killed instead of terminated. Processes of `multiprocessing` also end when this one dies,
    even of SIGKILL: an orphaned writer keeps a GPU's memory, and the files of the next start, busy.

    A second call changes nothing.
    """
    if hasattr(multiprocessing.process.BaseProcess.start, "shielded"):
        return
    multiprocessing.process.BaseProcess.start = _shielded(_start_bound_to_parent)  # type: ignore[method-assign]
    multiprocessing.popen_fork.Popen.terminate = multiprocessing.popen_fork.Popen.kill  # type: ignore[method-assign]
    subprocess.Popen.__init__ = _shielded(subprocess.Popen.__init__)  # type: ignore[method-assign]
    subprocess.Popen.terminate = subprocess.Popen.kill  # type: ignore[method-assign]
    with held(STOP_SIGNALS):
        resource_tracker.ensure_running()  # within the first start by `spawn` it would unblock what is blocked there


def _shielded(start: Callable[..., Any]) -> Any:
    @functools.wraps(start)
    def start_with_signals_blocked(*args: Any, **kwargs: Any) -> Any:
        with held(STOP_SIGNALS):
            return start(*args, **kwargs)

    start_with_signals_blocked.shielded = True  # type: ignore[attr-defined]
    return start_with_signals_blocked


_start: Callable[[Any], None] = multiprocessing.process.BaseProcess.start


def _start_bound_to_parent(process: Any) -> None:
    # Linux sends the signal at the end of the thread that started the child; the main one's is the process's.
    if process._target is not None and threading.current_thread() is threading.main_thread():
        process._target = functools.partial(_run_bound_to_parent, process._target)
    _start(process)


def _run_bound_to_parent(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In the child: what it starts is shielded as well; `spawn` gives it an interpreter that does not know yet."""
    shield_children()
    end_with_parent(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before the line above
        os._exit(1)
    return target(*args, **kwargs)
