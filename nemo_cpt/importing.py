"""Imports of packages that make millions of objects."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the garbage collector: NeMo's import takes 15 s of CPU with its walks over all that was made, 11 without.

    What is imported stays, so that there is nothing to collect.
    """
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()
