"""The inputs of `prepare`: what a path, folder, glob or dataset name stands for."""

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_cpt.errors import CptError

SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
HUB = "hf:"
UNFINISHED = ".part"  # the folder in which `split` works
DATASET_DICT = "dataset_dict.json"
Inputs = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Source:
    """One input file, or one dataset.

    Attributes:
        path: Absolute path, or `hf:NAME[@CONFIG][:SPLIT]`.
        kind: `plain`, `gzip`, `zstd`, `parquet`, `dataset` (saved on disk) or `hub`.
        size: Bytes on disk; 0 for a dataset of the hub.
        mtime_ns: Time of the last change, in nanoseconds since 1970.
    """

    path: str
    kind: str
    size: int
    mtime_ns: int

    def unchanged(self) -> bool:
        """Say whether the file is still as it was when it was listed."""
        try:
            return self.kind == "hub" or _stat(self.path, self.kind) == (self.size, self.mtime_ns)
        except OSError:
            return False


def list_sources(inputs: Inputs) -> list[Source]:
    """List the files that the inputs stand for; the order is that of the inputs, sorted within each folder and glob.

    Args:
        inputs: A path, a folder (all its JSON lines and Parquet files, recursively, but not what `fetch`, `split` and
            `prepare` write beside them), a glob, `hf:NAME[@CONFIG][:SPLIT]`, or a list of them.

    Raises:
        CptError: An input does not exist, stands for no file, or is listed twice; there is none; or a folder holds
            datasets saved by `datasets` of which one must be named.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    sources = [source for item in given for source in _expand(str(item))]
    if not sources:
        raise CptError("There is no input: name at least one file, folder, glob or dataset.")
    seen: set[str] = set()
    for source in sources:
        if source.path in seen:
            raise CptError(f"{source.path} is among the inputs twice; its documents would be written twice.")
        seen.add(source.path)
    return sources


def _expand(item: str) -> list[Source]:
    if item.startswith(HUB):
        return [Source(item, "hub", 0, 0)]
    path = Path(item)
    if path.is_dir():
        return [_source(str(path), "dataset")] if _is_saved_dataset(path) else _files(item, _in_folder(path))
    if path.exists():
        return [_source(item)]
    if glob.has_magic(item):
        matches = sorted(name for name in glob.glob(item, recursive=True) if not os.path.isdir(name))
        return _files(item, matches)
    raise CptError(f"There is no input {item}. For a dataset of the Hugging Face hub, write {HUB}NAME.")


def _files(item: str, names: Iterable[str]) -> list[Source]:
    sources = [_source(name) for name in names]
    if not sources:
        raise CptError(f"The input {item} stands for no file ({', '.join(SUFFIXES)}).")
    return sources


def _in_folder(folder: Path) -> list[str]:
    """List a folder's data files; the Arrow files of a saved dataset are none, so that it must be named itself.

    Raises:
        CptError: The folder is, or holds, a dataset saved by `datasets`.
    """
    paths = sorted(folder.rglob("*"))
    _refuse_saved_datasets(folder, paths)
    files = (p for p in paths if p.name.endswith(SUFFIXES) and p.is_file())
    return sorted(str(p) for p in files if not (_is_bookkeeping(p) or UNFINISHED in p.relative_to(folder).parts))


def _refuse_saved_datasets(folder: Path, paths: list[Path]) -> None:
    splits = [str(p.parent) for p in paths if p.name == "state.json" and _is_saved_dataset(p.parent)]
    if splits:
        what = "is a saved dataset of several splits" if (folder / DATASET_DICT).exists() else "holds saved datasets"
        raise CptError(f"{folder} {what}; name the one that you mean, or a list: {', '.join(splits)}.")


def _is_bookkeeping(path: Path) -> bool:
    """Say whether `fetch`, `split` or `prepare` wrote a file beside data; only its neighbours tell it from data."""
    name = path.name
    if name == "split.json":
        neighbours = ["train.jsonl"]
    elif name.endswith(".part.json"):
        neighbours = [name.removesuffix(".json"), name.removesuffix(".part.json")]
    elif name.endswith(("_document.json", "_document.skipped.jsonl")):
        prefix = name.removesuffix(".json").removesuffix(".skipped.jsonl")
        neighbours = [prefix + ".idx", prefix + ".journal"]
    else:
        return name == "dataset_info.json"
    return any(path.with_name(neighbour).exists() for neighbour in neighbours)


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_info.json").exists() and (folder / "state.json").exists()


def _source(name: str, kind: str = "") -> Source:
    path = os.path.abspath(name)
    try:
        kind = kind or _kind(path)
        return Source(path, kind, *_stat(path, kind))
    except OSError as error:
        raise CptError(f"Cannot read the input {name}: {error.strerror}.") from error


def _stat(path: str, kind: str) -> tuple[int, int]:
    """Return size and time of change of a file, of a saved dataset's Arrow files together."""
    files = sorted(Path(path).glob("*.arrow")) if kind == "dataset" else [Path(path)]
    stats = [file.stat() for file in files]
    return sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)


def _kind(path: str) -> str:
    """Tell the format from the first bytes: names lie more often than contents."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic.startswith(b"\x1f\x8b"):
        return "gzip"
    known = {b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet"}
    return known.get(magic, "plain")
