"""What a piece of work costs, in seconds of CPU: these grow with the work, not with what else the machine does."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

COUNTS = 0.06  # seconds in which the machine that the limits are of counts to a million


@contextmanager
def within_cpu_seconds(limit: float) -> Iterator[None]:
    """Fail where the block, with the processes that it waits for, takes more seconds of CPU.

    A machine that counts more slowly than the one that the limits are of has so many times longer.
    """
    slower = max(1.0, min(_seconds_of_counting() for _ in range(3)) / COUNTS)
    before = _spent()
    yield
    assert _spent() - before < limit * slower


def _seconds_of_counting() -> float:
    began, total = time.process_time(), 0
    for each in range(1_000_000):
        total += each
    return time.process_time() - began


def _spent() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
