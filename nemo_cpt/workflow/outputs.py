"""What lies behind a path that a step names: a file, a folder, a dataset by its prefix, a run's newest checkpoint."""

import contextlib
import glob
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from nemo_cpt.corpus.dataset.index import full_prefix
from nemo_cpt.corpus.reading.chunks import hash_file
from nemo_cpt.corpus.reading.sources import files_below
from nemo_cpt.made import RECORD
from nemo_cpt.training.run_folder import newest_whole

# Without the manifest, which says when it was made: it would be another one each time.
OF_A_DATASET = (".bin", ".idx", ".mask")
CONVERSATIONS = "_conversations"
SUFFIXES = ("_text_document", CONVERSATIONS)  # which `prepare` appends, and which nobody needs to write
PREFIXES = ("_document", "_conversations")  # how the prefixes of datasets end
Files = dict[str, dict[str, Any]]


def related(read: str, made: str, folder: Path = Path()) -> bool:
    """Whether what is read is, or is part of, or holds what is made; by their places, however they are written.

    Args:
        read: a path.
        made: another.
        folder: what relative ones are relative to.
    """
    here, made_path = PurePath(os.path.realpath(folder)), PurePath(os.path.realpath(folder / made))
    for name in (read, *(read + suffix for suffix in SUFFIXES)):
        path = PurePath(os.path.realpath(folder / _without_magic(name)))
        if path == made_path or path in made_path.parents or made_path in path.parents:
            # The workflow's own folder holds all that is made, and depends on none of it.
            return path != here
    return False


def _without_magic(path: str) -> str:
    """The part of a glob that is plain."""
    parts = PurePath(path).parts
    plain = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return str(PurePath(*parts[:plain]))


def files_of(path: Path, linked: bool = False) -> list[Path]:
    """The files that a path stands for, in a fixed order; none where there is nothing.

    Args:
        path: what a step names.
        linked: of a folder also the files behind links to folders, as who reads a corpus takes them.
    """
    if path.is_file():
        return [path]
    # Before folders: Megatron keeps the indices that a training made of a dataset in a folder of the prefix's name.
    for prefix in (path.name, Path(full_prefix(path)).name, path.name + CONVERSATIONS):
        parts = [path.with_name(prefix + ending) for ending in OF_A_DATASET]
        if parts[0].is_file():
            return [part for part in parts if part.is_file()]
    if (path / "checkpoints").is_dir():
        newest = newest_whole(path / "checkpoints")
        return _below(newest.path) if newest else []
    if path.is_dir():
        return sorted({*_below(path), *filter(Path.is_file, files_below(path))}) if linked else _below(path)
    found = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else []
    return [Path(each) for each in found if os.path.isfile(each)]


def _below(folder: Path) -> list[Path]:
    # Without the record of what a folder was made of, which would be another one each time.
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)


def look(path: Path, known: Mapping[str, Mapping[str, Any]] | None = None, linked: bool = False) -> Files:
    """The files of a path by their names in it, with size, time of change and a hash of the content.

    Args:
        path: what a step names.
        known: as it was looked at before: a file whose size and time are the same is not read again.
        linked: see `files_of`.
    """
    found: Files = {}
    for file in files_of(path, linked):
        stat = file.stat()
        name = os.path.relpath(file, path.parent)
        before = (known or {}).get(name, {})
        # To hash a terabyte at each look would take hours: size and time stand for what was hashed then.
        same = (before.get("size"), before.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)
        # Stamped before it is read: what is written meanwhile has another time at the next look.
        found[name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        found[name]["hash"] = before["hash"] if same else hash_file(str(file))
    return found


def content(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The hashes alone: equal for equal content, whenever it was written."""
    return {name: each["hash"] for name, each in files.items()}


def changed(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> str:
    """The first file that is not as before; empty where all are."""
    one, other = content(before), content(now)
    return next((name for name in sorted({*one, *other}) if one.get(name) != other.get(name)), "")


def spoilt(made: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> str:
    """The first file that was made and is another now; empty where none is. Files beside them are nobody's business."""
    one, other = content(made), content(now)
    return next((name for name in one if name in other and other[name] != one[name]), "")


def size(files: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of the files."""
    return sum(each["size"] for each in files.values())


def remove(path: Path, made: Mapping[str, Any]) -> None:
    """Remove what a step has made: a folder, a file, or a dataset with all that lies under its name.

    Args:
        path: where.
        made: the names of what it made, as `look` gives them; of a folder what else lies there stays. Empty where
            nobody knows, since the step was killed: the place was free before it.
    """
    if made and path.is_dir() and not path.is_symlink() and is_plain(path):
        for file in (*(path.parent / name for name in made), path / RECORD):
            file.unlink(missing_ok=True)
        folders = sorted((each for each in path.rglob("*") if each.is_dir() and not each.is_symlink()), reverse=True)
        for folder in (*folders, path):  # from the innermost; one that holds what somebody put there stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        return
    for each in _parts(path):
        shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()


def is_plain(path: Path) -> bool:
    """Whether a path stands for all the files below it: not for a dataset by its prefix, nor for a run."""
    return files_of(path) == _below(path)


def set_aside(path: Path) -> Path:
    """Rename what a step has made, to the first free name of `PATH.1`, `PATH.2`, ...; returns it."""
    number = 1
    while (free := aside(path, number)).exists():
        number += 1
    path.rename(free)
    return free


def aside(path: Path, number: int) -> Path:
    """Where what a step has made is when it was the so manieth to be set aside."""
    return path.with_name(f"{path.name}.{number}")


def look_aside(path: Path, number: int, known: Files) -> Files:
    """What was set aside, looked at by the names that it had; see `look`."""
    there = aside(path, number)

    def renamed(files: Files, was: str, now: str) -> Files:
        return {now + name.removeprefix(was): each for name, each in files.items()}

    return renamed(look(there, renamed(known, path.name, there.name)), there.name, path.name)


def is_there(path: Path) -> bool:
    """Whether there is anything under a path that a step makes."""
    return bool(_parts(path))


def _parts(path: Path) -> list[Path]:
    own = [path] if path.exists() or path.is_symlink() else []
    # Of a prefix alone: beside corpus.jsonl, corpus.jsonl.gz is a file of its own.
    if not path.name.endswith(PREFIXES) or not path.parent.is_dir():
        return own
    return own + sorted(path.parent.glob(f"{glob.escape(path.name)}.*"))
