"""Folders that are complete or absent, and the small files that a Hugging Face folder carries beside its weights."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from nemo_cpt.checkpoint.tokenizer_ids import check_tokenizer_class
from nemo_cpt.corpus.atomic_files import sync
from nemo_cpt.errors import CptError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".index.json")
_LEFT_BEHIND = ("README.md", ".gitattributes", ".gitignore")  # a model card describes the base, not what it became
_OWNER = ".owner"  # in a folder that is being written: the machine's name, under the writing process's lock
_PIECE_BYTES = 128 * 2**10
_SMALL_FILES = 64 * 2**20  # bytes, at most, beside the weights: tokenizer, configuration, index or context
ADAPTER = "adapter_config.json"  # peft's
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")  # one of them a tokenizer has


@contextmanager
def new_folder(dest: str | Path, weight_bytes: int) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `dest` when the block ends well, and disappears when it does not.

    What a process that was killed on this machine left of the same `dest` is removed first, and said on stderr.

    Args:
        dest: where it shall be; has to be free.
        weight_bytes: of the weights that will be written; with the small files, checked against the disk's free space
            beforehand.

    Raises:
        CptError: `dest` exists, its parent cannot be written, or the disk is or becomes too full.
    """
    dest = Path(dest)
    if dest.exists() or dest.is_symlink():
        raise CptError(f"{dest} exists already. Give another destination, or remove it first.")
    _remove_leftovers(dest)
    # Beside `dest`: a rename is atomic only within a file system. Of a name of its own, so that two at once do not mix.
    partial = dest.with_name(f"{_partial_prefix(dest)}{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        with _owned(partial):  # past the renaming, or another process could take it for left
            _check_free_space(partial, weight_bytes + _SMALL_FILES)
            yield partial
            _flush(partial)
            # After the flush, and before the name: `dest` holds nothing of ours, and nobody mistakes it for left.
            (partial / _OWNER).unlink()
            partial.rename(dest)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and os.path.lexists(dest):
            raise CptError(f"{dest} was made by another process meanwhile. It stands as that made it.") from error
        raise CptError(
            f"{dest} could not be written: {error}. Nothing is left of it; free the cause, rerun."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial_prefix(dest: Path) -> str:
    return f".{dest.name}.partial-"


@contextmanager
def _owned(partial: Path) -> Iterator[None]:
    """Let the folder say whose it is; the name appears when the lock is held, so that nobody else can take it first."""
    with (partial / f"{_OWNER}.new").open("x", encoding="utf-8") as owner:
        owner.write(socket.gethostname())
        owner.flush()
        _locked(owner)
        Path(owner.name).rename(partial / _OWNER)
        yield


def _remove_leftovers(dest: Path) -> None:
    """Remove what killed processes left of `dest`: their lock is free, and the lock is this machine's to judge."""
    for partial in sorted(dest.parent.glob(f"{glob.escape(_partial_prefix(dest))}*")):
        try:
            with (partial / _OWNER).open("r+", encoding="utf-8") as owner:
                host = owner.read()
                if host != socket.gethostname():
                    print(f"{partial} was left or is being written on {host}; it is not touched.", file=sys.stderr)
                # The lock ends with its process, however it ended: whoever gets it knows that the writer is gone.
                elif _locked(owner):
                    print(f"Removing {partial}, which a killed import, export or merge left.", file=sys.stderr)
                    shutil.rmtree(partial, ignore_errors=True)
        except FileNotFoundError:  # nothing of ours, or finished meanwhile
            continue


def _locked(file: IO[str]) -> bool:
    """Take the file's lock, which ends with the process; False where another holds it or the disk knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _check_free_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CptError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB are needed. "
            "Free some space or choose another destination."
        )


def _flush(folder: Path) -> None:
    # The folder last: its entries must not reach the disk before what they name.
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def write_pieces(file: IO[bytes], data: Buffer) -> int:
    """Write all of `data` to an unbuffered file, a little at a time; return its size.

    A large write makes ext4 look for large regions of free memory for its cache, which can cost several times the
    copying (docs/checkpoints.md).
    """
    rest = memoryview(data).cast("B")
    size = len(rest)
    while rest:
        rest = rest[file.write(rest[:_PIECE_BYTES]) :]
    return size


def small_files(folder: str | Path) -> list[Path]:
    """The files of a Hugging Face folder that a derived model needs beside the weights.

    config.json, generation_config.json, all of the tokenizer's, chat templates, licences; not the weights, the model
    card or hidden files.
    """
    return [
        path
        for path in sorted(Path(folder).iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(_WEIGHTS)
        and path.name not in _LEFT_BEHIND
    ]


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the folder holds a tokenizer's files."""
    return any((Path(folder) / name).is_file() for name in VOCABULARIES)


def refuse_adapter(folder: str | Path) -> None:
    """Raise CptError for a folder that holds peft's adapters and no model, wherever a model is asked for."""
    folder = Path(folder)
    if not (folder / ADAPTER).is_file() or (folder / "config.json").is_file():
        return
    try:
        base = json.loads((folder / ADAPTER).read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    raise CptError(
        f"{folder} holds adapters for peft ({ADAPTER}), to be added to {base or 'their base'}, and no model. Of a "
        "run's, `nemo-cpt export CHECKPOINT FOLDER`, without --adapter, writes the model with them in it. Of others, "
        f"peft does, PeftModel.from_pretrained(BASE, {str(folder)!r}).merge_and_unload().save_pretrained(FOLDER), and "
        "the base's tokenizer goes beside it."
    )


def require_tokenizer(folder: str | Path) -> None:
    """Raise CptError unless the folder holds a tokenizer that the installed transformers has a class for."""
    if not has_tokenizer(folder):
        raise CptError(
            f"{folder} holds no tokenizer (looked for {', '.join(VOCABULARIES)}). "
            "Put the model's tokenizer files there; training and inference need them."
        )
    check_tokenizer_class(folder)


def copy_small_files(source: str | Path, dest: Path) -> list[str]:
    """Copy `small_files(source)` to `dest` (created if need be) and return their names."""
    dest.mkdir(parents=True, exist_ok=True)
    names = []
    for path in small_files(source):
        shutil.copyfile(path, dest / path.name)
        names.append(path.name)
    return names
