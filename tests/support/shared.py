"""Folders that a run of the tests makes once, though several processes of pytest-xdist use them."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder `name`, which `make` has filled in this process or in another; the others wait for it.

    Args:
        factory: pytest's.
        name: the folder's, of its own for everything that is made.
        make: fills an empty folder. Every process reads what it left: none may write there.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, made = root / name, root / f"{name}.made"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a `make` that failed left
            folder.mkdir()
            make(folder)
            made.touch()
    return folder
