"""Processes that are killed at a chosen line of the library's code, not after a chosen time: a busy machine changes
nothing about where a kill hits."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

FORK = multiprocessing.get_context("fork")  # a started interpreter, so that the kills hit the work and not the imports


@dataclass(frozen=True)
class Lines:
    """What an undisturbed run executed.

    Attributes:
        count: lines of the watched folder that the main process went through.
        with_workers: the first and the last of them at which it had child processes; (0, 0) if it never had any.
    """

    count: int
    with_workers: tuple[int, int]


def lines_of(action: Callable[[], object], folder: Path) -> Lines:
    """Count the lines under `folder` that a process of its own executes in `action`; its workers' are not counted."""
    ours, theirs = FORK.Pipe()

    def job() -> None:
        reached, busy = 0, []

        def count(line: int) -> None:
            nonlocal reached
            reached = line
            if multiprocessing.active_children():
                busy.append(line)

        _trace(folder, count)
        action()
        sys.settrace(None)
        theirs.send((reached, (busy[0], busy[-1]) if busy else (0, 0)))

    process = FORK.Process(target=job)
    process.start()
    process.join()
    assert process.exitcode == 0
    return Lines(*ours.recv())


def killed_at(line: int, action: Callable[[], object], folder: Path) -> tuple[bool, list[psutil.Process]]:
    """Run `action` in a process that dies of SIGKILL at the `line`-th line under `folder`.

    Returns:
        Whether it got there (a run may need fewer lines than another one), and the workers that it had then.
    """
    process = paused_at(line, action, folder)
    if process.exitcode is not None:
        assert process.exitcode == 0
        return False, []
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.join()
    return True, workers


def paused_at(line: int, action: Callable[[], object], folder: Path) -> BaseProcess:
    """Run `action` in a process that stops (SIGSTOP) at the `line`-th line under `folder`; `go_on` continues it.

    Returns:
        The process: stopped there, or ended where `action` took fewer lines.
    """

    def job() -> None:
        def stop(reached: int) -> None:
            if reached == line:
                sys.settrace(None)
                os.kill(os.getpid(), signal.SIGSTOP)

        _trace(folder, stop)
        action()

    process = FORK.Process(target=job)
    process.start()
    # Without WNOHANG this returns when the process stops or ends; WNOWAIT leaves its end to multiprocessing.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    return process


def go_on(process: BaseProcess) -> None:
    """Continue a process that `paused_at` stopped."""
    os.kill(process.pid, signal.SIGCONT)


def _trace(folder: Path, on_line: Callable[[int], None]) -> None:
    own, lines = os.getpid(), 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if os.getpid() != own:  # a worker, forked with this function in place
            sys.settrace(None)
            return None
        if not frame.f_code.co_filename.startswith(str(folder)):
            return None
        if event == "line":
            lines += 1
            on_line(lines)
        return trace

    sys.settrace(trace)
