"""Megatron's index of a dataset, kept on disk for the next run: which documents, in which order, make which sequences.

An index is one file, named for the content that it was built from, and appears whole: it is written under a name of its
own and then linked to its own. So nothing has to wait for anything else, whatever starts or is killed at the same time,
and a dataset that was made again gets another index. Locks only keep apart who uses an index and who tidies up.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from nemo_cpt.errors import CptError

ARRAYS = 3  # documents, samples, shuffle
INDEX = re.compile(r"([0-9a-f]{32})-[0-9a-f]{32}\.index")  # content, parameters
PART = re.compile(r"[0-9a-f]{32}\.part")
RUN_FOLDER = "index_cache"

Arrays = tuple[np.ndarray, ...]


def load_or_build(dataset: Any, build: Callable[[], Arrays]) -> Arrays:
    """Return a dataset's index: mapped from its cache, or built and put there.

    The cache is beside the data, or in the run's folder where that cannot be written; `config.path_to_cache` names
    another folder, and an empty string none at all.

    Args:
        dataset: a Megatron `GPTDataset` that has no index yet.
        build: builds it in memory.

    Returns:
        Document index [documents * epochs], sample index [samples + 1, 2], shuffle index [samples].

    Raises:
        CptError: neither folder, or not the one that was named, can be written.
    """
    folders, name = _folders(dataset), f"{_content(dataset)}-{_parameters(dataset)}.index"
    # All are read before anything is built: what an earlier run could not put beside the data is in its own folder.
    for folder in folders:
        if (kept := _load(folder / name)) is not None:
            return kept
    arrays, problem = build(), None
    for folder in folders:
        try:
            _store(folder / name, arrays)
        except OSError as error:
            problem = f"the data's index cannot be written to {folder} ({error.strerror})"
            continue
        if problem:
            _warn(f"{problem}: it is kept in {folder}")
        # Mapped, not the arrays just built: forked workers then share the page cache instead of copies.
        return _load(folder / name) or arrays
    if problem and (dataset.config.path_to_cache or len(folders) > 1):
        raise CptError(f"{problem}: name a folder that can be written, data.index_mapping_dir=FOLDER")
    return arrays


def _content(dataset: Any) -> str:
    """A digest of what an index is built from: the lengths of all sequences, 4 bytes of each, read at 1.3 GB/s."""
    # Lengths suffice: they alone decide which documents make which sequences; the tokens are read through the index
    # each time.
    return hashlib.sha256(dataset.dataset.sequence_lengths).hexdigest()[:32]


def _parameters(dataset: Any) -> str:
    """A digest of everything else that makes an index: what Megatron tells apart, and what it forgets to."""
    from megatron.core import __version__

    config = dataset.config
    forgotten = (config.add_extra_token_to_sequence, config.drop_last_partial_validation_sequence)
    text = f"{dataset.unique_description}{forgotten}{__version__}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _folders(dataset: Any) -> list[Path]:
    """Where an index may be, best first."""
    prefix, named = os.path.realpath(dataset.dataset.path_prefix), dataset.config.path_to_cache
    # Several datasets share a named folder, and two of them may be called the same.
    own = f"{os.path.basename(prefix)}-{hashlib.sha256(prefix.encode()).hexdigest()[:8]}"
    if named is not None:
        return [Path(named, own)] if named else []
    from nemo.utils import AppState

    run = AppState().log_dir
    return [Path(prefix, "cache"), *([Path(run, RUN_FOLDER, own)] if run else [])]


def _warn(text: str) -> None:
    from nemo.utils import logging

    logging.warning(text)


def _load(path: Path) -> Arrays | None:
    """Map a whole index; None where there is none, or a damaged one."""
    try:
        with path.open("rb") as file:
            _hold(file)  # for as long as the arrays live: a mapping keeps a duplicate of the file's descriptor
            return tuple(_mapped(file) for _ in range(ARRAYS))
    except (OSError, ValueError):
        return None


def _mapped(file: BinaryIO) -> np.ndarray:
    """Map the array that begins at the file's position, and go on to its end."""
    npy.read_magic(file)
    shape, _, dtype = npy.read_array_header_1_0(file)
    start = file.tell()
    # mmap refuses a length of 0, which a validation of no samples has.
    array = np.memmap(file, dtype, "r", start, shape) if 0 not in shape else np.empty(shape, dtype)
    file.seek(start + array.nbytes)
    return array


def _store(path: Path, arrays: Arrays) -> None:
    """Put an index in its place, unless another process has done so in the meantime; then tidy up there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _new_part(path.parent) as file:
        part = Path(file.name)
        try:
            for array in arrays:
                # Version 1.0 is what `_mapped` reads; arrays of objects, which would need pickle, are refused here.
                npy.write_array(file, array, version=(1, 0), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
            _name(part, path)
        finally:
            part.unlink(missing_ok=True)
    _tidy(path)


def _new_part(folder: Path) -> BinaryIO:
    while True:
        file = open(folder / f"{uuid.uuid4().hex}.part", "x+b")  # noqa: SIM115  NFS locks what is open for reading only
        if _hold(file) and os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # who tidies up took it for a leftover, before it was held


def _name(part: Path, path: Path) -> None:
    """Give a written index its name, without a moment in which another one of that name, perhaps in use, is gone."""
    try:
        os.link(part, path)
    except FileExistsError:
        # Whoever came first wrote the same content. Only a damaged one is replaced.
        if _load(path) is None:
            os.replace(part, path)
    except OSError:  # a file system without hard links
        os.replace(part, path)


def _tidy(path: Path) -> None:
    """Remove, beside an index, what killed processes left and the indices of other contents, unless they are in use.

    A file system without locks keeps them: nobody could know.
    """
    content = path.name.partition("-")[0]
    for other in path.parent.iterdir():
        index = INDEX.fullmatch(other.name)
        if PART.fullmatch(other.name) or (index and index[1] != content):
            with contextlib.suppress(OSError), other.open("r+b") as file:
                # Refused while anybody has it mapped: users hold a shared lock.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                other.unlink()


def _hold(file: BinaryIO) -> bool:
    """Keep a file from being tidied up while it is open; False where that is just happening."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, where nobody tidies up
        pass
    return True
