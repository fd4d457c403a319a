"""Tasks of the inputs given to forked workers, and their answers in the inputs' order."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from nemo_cpt.corpus.reading.chunks import Feed, Task
from nemo_cpt.errors import CptError

Answer = TypeVar("Answer")
AHEAD = 4  # tasks for each worker that are waiting, worked on, or done before their turn

# What the workers of this pass do. A global, set before they are forked: they inherit the bound method and all that it
# refers to, which may be too large to be sent with every task.
_take: Callable[[Task], Any] | None = None


def in_order(take: Callable[[Task], Answer], feed: Feed, workers: int) -> Iterator[tuple[Task, Answer]]:
    """Yield each task with what forked workers made of it, in the tasks' order, whichever is done first.

    Args:
        take: What to make of a task; the workers are forked, and see what it refers to as it is now.
        feed: The tasks.
        workers: Processes.

    Raises:
        CptError: A worker died, or raised one.
    """
    global _take
    # Before the pool: its workers are forked at the first task and see what stands here then.
    _take = take
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, mp_context=fork, initializer=_end_with, initargs=(os.getpid(),))
    ahead = deque[tuple[Task, Future[Any]]]()
    try:
        for task in feed:
            ahead.append((task, pool.submit(_call, task)))
            # So few at a time: the whole corpus is never in memory.
            if len(ahead) > AHEAD * workers:
                first, answer = ahead.popleft()
                yield first, answer.result()
        for first, answer in ahead:
            yield first, answer.result()
    except BrokenProcessPool:
        raise CptError("A worker process died; the system may have run out of memory: use fewer workers.") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _call(task: Task) -> Any:
    assert _take is not None
    return _take(task)


def _end_with(parent: int) -> None:
    """Let the kernel end this worker when its parent is killed; it would wait for tasks for ever."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # The parent may have died between the fork and prctl: then no signal comes any more.
    if os.getppid() != parent:
        os._exit(1)
