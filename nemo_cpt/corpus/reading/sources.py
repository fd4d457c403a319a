"""The inputs of `prepare`: what a path, folder, glob or dataset name stands for."""

import glob
import os
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_cpt.corpus.reading.formats import first_bytes, recognise
from nemo_cpt.errors import CptError, near_paths

# In a folder: also what is packed in a way that is not read, so that it is named and not left out
_NAME = re.compile(
    r"\.(jsonl|json|ndjson|parquet)(\.(gz|gzip|zst|zstd|bz2|xz|lzma|lz4|sz|snappy|br|z|zip|7z|rar|tar))?$",
    re.IGNORECASE,
)
_TEXT_NAME = re.compile(r"\.(txt|text|md|markdown|csv|tsv)$", re.IGNORECASE)
_ABOUT = re.compile(r"(readme|licen[sc]e|copying|changelog|notice)\b", re.IGNORECASE)  # what a folder is, not its data
HUB = "hf:"
UNFINISHED = ".part"  # the folder in which `split` works
PLAN = "plan.json"  # of several tasks that make one output, beside the parts that they have made,
PARTS = ".parts"  # in a folder whose name ends so
DATASET_DICT = "dataset_dict.json"
SETS, SPLIT_REPORT = ("train", "validation", "test"), "split.json"  # what `split` writes
SYNTHESIS, REPLIES = "synthesis.json", "replies.jsonl"  # what `synthesize` writes beside such sets
EXTRACTED = ".wikipedia.json"  # the manifest beside a dump's text
_OF_DATASETS = tuple(f"_{kind}.{end}" for kind in ("document", "conversations") for end in ("json", "skipped.jsonl"))
Inputs = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Source:
    """One input file, or one dataset; or a range of whole lines of a plain file, which one of several tasks reads.

    Attributes:
        path: Absolute path, or `hf:NAME[@CONFIG][:SPLIT]`.
        kind: `plain`, `gzip`, `zstd`, `parquet`, `csv`, `text` (one document), `dataset` (saved on disk) or `hub`.
        size: Bytes on disk; 0 for a dataset of the hub.
        mtime_ns: Time of the last change of its content, in nanoseconds since 1970, as programs may set it.
        ctime_ns: Time of the last change of anything about it, which the system alone sets.
        array: Whether its text is a JSON array and not JSON lines.
        start: First byte of the range; 0 for a whole file.
        stop: Where the range ends; None for a whole file.
    """

    path: str
    kind: str
    size: int
    mtime_ns: int
    ctime_ns: int = 0
    array: bool = False
    start: int = 0
    stop: int | None = None

    @property
    def is_range(self) -> bool:
        """Whether it is a part of its file."""
        return self.stop is not None

    @property
    def divisible(self) -> bool:
        """Whether it can be read from the middle: lines that are neither compressed nor within an array."""
        return self.kind == "plain" and not self.array

    @property
    def end(self) -> int:
        """The byte of the file at which reading ends."""
        return self.size if self.stop is None else self.stop

    @property
    def nbytes(self) -> int:
        """Bytes on disk that are read of it."""
        return self.end - self.start

    @property
    def stamp(self) -> list[Any]:
        """What is different for any other file, and for this one after any change."""
        # With ctime: `cp -p`, `rsync -t` and `touch -r` set mtime as they like, and the system sets ctime.
        return [self.path, self.size, self.mtime_ns, self.ctime_ns]

    def unchanged(self) -> bool:
        """Say whether the file is still as it was when it was listed."""
        try:
            return self.kind == "hub" or [self.path, *_stat(self.path, self.kind)] == self.stamp
        except OSError:
            return False


class InputChangedError(CptError):
    """What an unfinished output was made of is not there any more: its rest would not belong to its beginning."""

    def __init__(self, change: str) -> None:
        super().__init__(
            f"{change}: the output would become a mixture of the two. Take another output, or begin anew with "
            "overwrite=True (--overwrite)."
        )


def check_elsewhere(sources: Iterable[Source], folder: Path, names: Iterable[str], what: str) -> None:
    """Check that no input lies where what is made of it goes, or where that is written until then.

    Args:
        sources: The inputs.
        folder: Where the output goes.
        names: Of its files.
        what: What is made, for the message.

    Raises:
        CptError: One does.
    """
    targets = {os.path.realpath(folder / name) for name in names}
    work = os.path.realpath(folder / UNFINISHED)
    for source in sources:
        path = os.path.realpath(source.path)
        if path in targets or path.startswith(work + os.sep):
            raise CptError(f"The input {source.path} lies where the {what} puts its own files. Take another folder.")


def list_sources(inputs: Inputs) -> list[Source]:
    """List the files that the inputs stand for; the order is that of the inputs, sorted within each folder and glob.

    Args:
        inputs: A path, a folder (all its JSON lines and Parquet files, recursively, but not what `fetch`, `clean`,
            `split` and `prepare` write beside them; if it has none, its .txt, .md, .csv and .tsv files), a glob,
            `hf:NAME[@CONFIG][:SPLIT]`, or a list of them.

    Raises:
        CptError: An input does not exist, stands for no file, or is listed twice, be it packed once; there is none; or
            a folder holds datasets saved by `datasets`, or the sets of a split or a synthesis, of which one must be
            named.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    sources = [source for item in given for source in _expand(str(item))]
    if not sources:
        raise CptError("There is no input: name at least one file, folder, glob or dataset.")
    seen = dict[tuple[Any, ...], str]()
    for source in sources:
        # Stores that keep one file for each content (the hub's cache, git-annex) have one for all that are empty.
        if (first := seen.get(identity(source))) and (source.size or source.path == first):
            link = "" if first == source.path else f", by a link: it is {first}, too"
            raise CptError(f"{source.path} is among the inputs twice{link}; its documents would be written twice.")
        seen[identity(source)] = source.path
    _refuse_packed_twice(sources)
    return sources


def _refuse_packed_twice(sources: list[Source]) -> None:
    """Raise where a packed file lies beside what it was unpacked to: `zstd -d` and `gunzip -k` leave both."""
    plain = {source.path for source in sources if source.kind == "plain"}
    for source in sources:
        unpacked = os.path.splitext(source.path)[0]
        if source.kind not in ("gzip", "zstd") or unpacked not in plain:
            continue
        # By their beginnings: the lengths of a packed file's content are not always noted in it.
        if (head := first_bytes(source.path, source.kind)) and head == first_bytes(unpacked, "plain"):
            raise CptError(
                f"{source.path} is among the inputs beside {unpacked}, which begins with the same bytes: what it was "
                "unpacked to. Its documents would be written twice: name one of them, or remove one."
            )


def identity(source: Source) -> tuple[Any, ...]:
    """Return what is the same for one file under several names, by links or by way of linked folders."""
    if source.kind == "hub":
        return (source.path,)
    status = os.stat(source.path)
    return status.st_dev, status.st_ino


def _expand(item: str) -> list[Source]:
    if item.startswith(HUB):
        return [Source(item, "hub", 0, 0)]
    path = Path(item)
    if path.is_dir():
        return [_source(str(path), "dataset")] if _is_saved_dataset(path) else _files(item, _in_folder(path))
    if path.exists():
        return [_source(item)]
    # Behind `exists`: a file's own name may hold brackets.
    if glob.has_magic(item):
        matches = sorted(name for name in glob.glob(item, recursive=True) if not os.path.isdir(name))
        return _files(item, matches)
    if "://" in item:
        raise CptError(f"The input {item} is an address; bring it here with `nemo-cpt fetch` first.")
    # A folder's name with a slash looks like a hub name: which of the two is meant must be said.
    raise CptError(
        f"There is no input {item}{near_paths(path)}. For a dataset of the Hugging Face hub, write {HUB}NAME."
    )


def _files(item: str, names: Iterable[str]) -> list[Source]:
    sources = [_source(name) for name in names]
    if not sources:
        raise CptError(
            f"The input {item} stands for no file (.jsonl, .json, .ndjson, also with .gz or .zst; .parquet; .txt, .md, "
            ".csv, .tsv)."
        )
    return sources


def _in_folder(folder: Path) -> list[str]:
    """List a folder's data files; the Arrow files of a saved dataset are none, so that it must be named itself.

    Plain text and CSV are data where there are no JSON lines or Parquet, beside which they only tell of those. What is
    hidden is none: editors and file systems keep earlier versions there.

    Raises:
        CptError: The folder is, or holds, a dataset saved by `datasets`, or the sets of `split` or `synthesize`.
    """
    paths = sorted(files_below(folder))
    _refuse_held_out_sets(paths)
    # Before the files are listed: `datasets` writes JSON beside its Arrow files, which would pass for the data.
    _refuse_saved_datasets(folder, paths)
    files = [p for p in paths if _NAME.search(p.name)]
    # Only where there is nothing else: README.md beside a corpus is no document of it.
    files = files or [p for p in paths if _TEXT_NAME.search(p.name) and not _ABOUT.match(p.name)]
    return sorted(str(p) for p in files if not _is_bookkeeping(p))


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and below it, but for what is hidden; of folders behind links too, each one once.

    Raises:
        CptError: A folder cannot be read.
    """
    home, seen, tops = os.path.realpath(folder), set[str](), [str(folder)]
    while tops:
        links = list[str]()
        for top in tops:
            for place, folders, files in os.walk(top, onerror=_refuse_unread):
                real = os.path.realpath(place)
                # A link to where all began, or to a folder above that, leads nowhere else.
                if real in seen or (seen and Path(home).is_relative_to(real)):
                    folders.clear()
                    continue
                seen.add(real)
                folders[:] = [name for name in folders if not name.startswith(".")]
                paths = [os.path.join(place, name) for name in folders]
                links += filter(os.path.islink, paths)  # which `walk` does not follow
                yield from (Path(place, name) for name in files if not name.startswith("."))
        # Last: a folder that is there by itself has its own name.
        tops = sorted(links)


def _refuse_unread(error: OSError) -> None:
    raise CptError(f"Cannot read the folder {error.filename}: {error.strerror}.") from error


def _refuse_saved_datasets(folder: Path, paths: list[Path]) -> None:
    splits = [str(p.parent) for p in paths if p.name == "state.json" and _is_saved_dataset(p.parent)]
    if splits:
        what = "is a saved dataset of several splits" if (folder / DATASET_DICT).exists() else "holds saved datasets"
        raise CptError(f"{folder} {what}; name the one that you mean, or a list: {', '.join(splits)}.")


def _refuse_held_out_sets(paths: list[Path]) -> None:
    """Raise where a folder holds sets of which one is held out: all together would train on that."""
    made_by = {SPLIT_REPORT: "a split", SYNTHESIS: "a synthesis"}
    for report in (path for path in paths if path.name in made_by):
        sets = [str(path) for name in SETS if (path := report.with_name(f"{name}.jsonl")).exists()]
        if len(sets) > 1:
            raise CptError(
                f"{report.parent} holds the sets of {made_by[report.name]}, and together they are no corpus: what is "
                f"held out would be trained on. Name the one that you mean: {', '.join(sets)}."
            )


def _is_bookkeeping(path: Path) -> bool:
    """Say whether this library's commands wrote a file beside data; only its neighbours tell it from data."""
    name = path.name
    # By name and neighbours: a user's own file of that name, alone, is data.
    if any(above.name.endswith(PARTS) and (above / PLAN).exists() for above in path.parents):
        return True
    if name in (SPLIT_REPORT, SYNTHESIS):
        neighbours = ["train.jsonl"]
    elif name == REPLIES:
        neighbours = [SYNTHESIS]
    elif name in ("cleaning.json", "dropped.jsonl"):
        return path.with_name("kept.jsonl").exists() and path.with_name("cleaning.json").exists()
    elif name.endswith(".part.json"):
        neighbours = [name.removesuffix(".json"), name.removesuffix(".part.json")]
    elif name.endswith(EXTRACTED):
        neighbours = [name.removesuffix(EXTRACTED) + ".jsonl"]
    elif name.endswith(_OF_DATASETS):
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
        kind, array = (kind, False) if kind else recognise(path)
        size, mtime_ns, ctime_ns = _stat(path, kind)
    except OSError as error:
        raise CptError(f"Cannot read the input {name}: {error.strerror}.") from error
    return Source(path, kind, size, mtime_ns, ctime_ns, array)


def listed_again(source: Source) -> Source:
    """Return an input as it is now, its size and its times.

    Raises:
        CptError: It is not there any more.
    """
    if source.kind == "hub":
        return source
    try:
        size, mtime_ns, ctime_ns = _stat(source.path, source.kind)
    except OSError as error:
        raise CptError(
            f"Cannot read the input {source.path} on {socket.gethostname()}: {error.strerror}. Where several machines "
            "work on it, every one must see it under this path."
        ) from error
    return replace(source, size=size, mtime_ns=mtime_ns, ctime_ns=ctime_ns)


def _stat(path: str, kind: str) -> tuple[int, int, int]:
    """Return size and times of change of a file, of a saved dataset's Arrow files together."""
    files = sorted(Path(path).glob("*.arrow")) if kind == "dataset" else [Path(path)]
    stats = [file.stat() for file in files]
    # The newest of all: one shard that is replaced changes the dataset.
    mtime_ns, ctime_ns = (max((getattr(s, f"st_{kind}_ns") for s in stats), default=0) for kind in ("mtime", "ctime"))
    return sum(s.st_size for s in stats), mtime_ns, ctime_ns
