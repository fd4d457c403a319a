"""Imports that wait until they are needed, and those of packages that make millions of objects."""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def on_first_use(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__` (PEP 562), which import its public names when they are first used.

    So that `--help`, and whoever wants one name, do not wait for torch, NumPy and tokenizers.

    Args:
        package: its `__name__`.
        homes: the module within it that each public name lives in.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return load, lambda: [*vars(sys.modules[package]), *homes]


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
