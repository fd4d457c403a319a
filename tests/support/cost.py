"""What a piece of work costs: its CPU time, which a busy machine stretches less than the time that passes."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def within_cpu_seconds(limit: float) -> Iterator[None]:
    """Fail where the block, with the processes that it waits for, takes more seconds of CPU."""
    before = _spent()
    yield
    assert _spent() - before < limit


def _spent() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
