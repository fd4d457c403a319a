"""Training jobs for the tests: forked from a server that has imported NeMo once, yet each a process of its own.

Not from the tests' own process: gloo does not survive a fork of a process that has used it. With a GPU each job imports
NeMo itself: that import touches CUDA, which does not survive a fork.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

SERVER = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
SERVER.set_forkserver_preload(["tests.support.preloaded"])


def process(target: Callable[..., None], args: tuple[Any, ...]) -> Any:
    """A process that is not started yet; see above."""
    if SERVER.get_start_method() == "forkserver":
        # The server finds what it imports from where it starts: from a test's own folder `tests` is another package's.
        with contextlib.chdir(Path(__file__).parents[2]):
            forkserver.ensure_running()
    return SERVER.Process(target=target, args=args)


def launch(job: Callable[[], Any], processes: int = 1, log: Path | None = None) -> list[Any]:
    """Start `job`, which must be picklable, in processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [process(_enter, (job, rank, processes, port, log)) for rank in range(processes)]
    for each in started:
        each.start()
    return started


def run(job: Callable[[], Any], processes: int = 1, log: Path | None = None, timeout: float = 900) -> int:
    """Run `job` to its end and return the first exit code that is not 0."""
    return wait(launch(job, processes, log), log, timeout)


def wait(started: list[Any], log: Path | None = None, timeout: float = 900) -> int:
    """Wait for a job's end and return the first exit code that is not 0."""
    end = time.monotonic() + timeout
    for process in started:
        process.join(max(end - time.monotonic(), 0))
    late = [process for process in started if process.is_alive()]
    kill(late)
    assert not late, f"the job took more than {timeout} s: {log and log.read_text()[-3000:]}"
    return next((code for process in started if (code := process.exitcode)), 0)


def kill(started: list[Any]) -> None:
    """SIGKILL every process of a job, with the helpers that Megatron starts for its checkpoints."""
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _enter(job: Callable[[], Any], rank: int, processes: int, port: int, log: Path | None) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a job of its own; here it would be the server's
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if processes > 1:
        os.environ.update(
            TORCHELASTIC_RUN_ID="test", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
            LOCAL_WORLD_SIZE=str(processes), GROUP_RANK="0", ROLE_RANK=str(rank),
        )  # fmt: skip
    if log:
        output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not pytest's
    try:
        job()
    except BaseException:  # as the interpreter does at the end of a script; multiprocessing would not ask the hook
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
