"""Work shared out among forked processes, its results in the order of the tasks."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from nemo_cpt.errors import CptError
from nemo_cpt.signals import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")
AHEAD = 4  # tasks for each worker that wait, are worked on, or are done before their turn

# A global, set before the workers are forked: they inherit it, and what it holds is too large to go with every task.
_work: Callable[[Any], Any] | None = None


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[tuple[Task, Result]]:
    """Yield each task with what a forked worker made of it, in order; few tasks are taken ahead.

    Raises:
        CptError: A worker died, or `work` raised it.
    """
    global _work
    _work = work
    fork = multiprocessing.get_context("fork")
    ahead = deque[tuple[Task, Future[Result]]]()
    with ProcessPoolExecutor(workers, mp_context=fork, initializer=follow, initargs=(os.getpid(),)) as pool:
        try:
            for task in tasks:
                ahead.append((task, pool.submit(_call, task)))
                if len(ahead) > AHEAD * workers:
                    done, future = ahead.popleft()
                    yield done, future.result()
            while ahead:
                done, future = ahead.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise CptError("A worker process died; the system may have run out of memory: use fewer workers.") from None
        finally:
            # Else the pool would work through all that was given to it before it ends.
            for _, future in ahead:
                future.cancel()


def follow(parent: int) -> None:
    """Leave Ctrl-C to the parent, and let the kernel end this worker when that is killed; it would wait for ever.

    A terminal interrupts every process of the command: a worker that died of it with the pool's lock or with its own
    order to end in hand would leave the others, and the parent, waiting for each other.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    # The parent may have died between the fork and the line above: then no signal comes any more.
    if os.getppid() != parent:
        os._exit(1)


def _call(task: Any) -> Any:
    assert _work is not None
    return _work(task)
