"""Tokenizers' folders, complete or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_cpt.corpus.atomic_files import make_folder, sync
from nemo_cpt.errors import CptError


def check_place(output: Path) -> None:
    """Raise CptError where a folder that is not there yet could not be made: learning takes minutes."""
    if output.exists():  # whose that is says what was noted in it
        return
    nearest = next(folder for folder in output.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise CptError(f"{output} cannot be made: nothing can be written into {nearest}. Give another output.")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `output` when the block ends well, and disappears when it does not.

    Raises:
        CptError: `output` exists, or cannot be written.
    """
    check_place(output)
    if output.exists() or output.is_symlink():
        raise CptError(f"{output} exists already. Give another output, or remove it first.")
    partial = output.with_name(f".{output.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        partial.rename(output)
        sync(output.parent)
    except OSError as error:
        raise CptError(f"{output} could not be written: {error.strerror}. Nothing is left of it.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
