"""The manifest beside a dataset, `PREFIX_text_document.json`: what it was made of, with what, and what came out."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from nemo_cpt.arguments import checked
from nemo_cpt.corpus.atomic_files import write_whole
from nemo_cpt.corpus.dataset.index import ANEW, full_prefix
from nemo_cpt.corpus.reading.chunks import hash_source
from nemo_cpt.corpus.reading.sources import Source
from nemo_cpt.errors import CptError

# Of the file, not of the library: raised when an older reader would misread what is new.
FORMAT = 1


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    """Return where a dataset's manifest is."""
    return Path(full_prefix(prefix) + ".json")


@checked
def read_manifest(prefix: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a dataset's manifest.

    Returns:
        Its JSON object; among its keys: `tokenizer` (`name`, `sha256`, `vocabulary_size`, `eos`), `probes` (ids by
        text), `largest` (token id), `inputs` (`path`, `size`, `mtime_ns`, `hash`), `options`, `documents`, `tokens`,
        `dtype`, `encoder`. Datasets that version 0.1.0 made have neither `probes` nor `largest`.

    Raises:
        CptError: There is none (the dataset was not made by `prepare`), or it is damaged.
    """
    path = manifest_path(prefix)
    try:
        manifest = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise CptError(f"There is no manifest {path}: the dataset was not made by `nemo-cpt prepare`.") from None
    except ValueError as error:
        raise CptError(f"The manifest {path} is damaged: {error}; {ANEW}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CptError(f"{path} is not a manifest of `nemo-cpt prepare`, or one of another version.")
    return manifest


def write_manifest(prefix: str, manifest: dict[str, Any]) -> None:
    """Write a dataset's manifest."""
    write_whole(Path(prefix + ".json"), orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")


def sizes_of(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Return the sizes of a folder's files, for its manifest; of those that are there."""
    return {name: (folder / name).stat().st_size for name in names if (folder / name).exists()}


def check_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    """Check that a folder's files are there as its manifest says.

    Raises:
        CptError: One is missing, or has another size: somebody has changed it.
    """
    for name, size in sizes.items():
        there = (folder / name).stat().st_size if (folder / name).exists() else None
        if there != size:
            found = "is not there any more" if there is None else f"has {there:,} bytes, and had {size:,}"
            raise CptError(f"{folder / name} {found}. overwrite=True (--overwrite) makes all of {folder} again.")


def describe_inputs(sources: list[Source], hashes: dict[str, str]) -> list[dict[str, Any]]:
    """Return the manifest's entry for each input."""
    return [
        {"path": s.path, "kind": s.kind, "size": s.size, "mtime_ns": s.mtime_ns, "hash": hashes.get(str(number), "")}
        | ({"start": s.start, "stop": s.stop} if s.is_range else {})
        for number, s in enumerate(sources)
    ]


def copies_of_inputs(recorded: list[dict[str, Any]]) -> list[str]:
    """Return a sentence about inputs of a manifest with the same bytes as an earlier one; none where all differ."""
    first = dict[str, str]()
    hashed = [entry for entry in recorded if entry["size"] and entry["hash"]]  # empty files are all alike
    of = {entry["path"]: first.setdefault(entry["hash"], entry["path"]) for entry in hashed}
    copies = [path for path, original in of.items() if path != original]
    if not copies:
        return []
    more = f", and {len(copies) - 1:,} more inputs are such copies" if len(copies) > 1 else ""
    return [f"{copies[0]} has the same bytes as {of[copies[0]]}{more}: the dataset has what is in them more than once."]


def changed_input(sources: list[Source], recorded: list[dict[str, Any]]) -> str | None:
    """Return what differs between the inputs and those of a manifest, None if they hold the same bytes.

    A file whose size and time are as recorded counts as unchanged; one that was moved or touched is hashed, and a
    dataset of the hub is asked for its fingerprint.
    """
    if len(sources) != len(recorded):
        return f"there were {len(recorded)} inputs, now there are {len(sources)}"
    for source, was in zip(sources, recorded, strict=True):
        as_listed = (source.path, source.size, source.mtime_ns) == (was["path"], was["size"], was["mtime_ns"])
        # A dataset of the hub has neither size nor time: only its fingerprint tells.
        if as_listed and source.kind != "hub":
            continue
        if source.size != was["size"] or source.kind != was["kind"]:
            return f"{source.path} is not the {was['path']} of {was['size']} bytes that it was made of"
        if hash_source(source) != was["hash"]:
            return f"the content of {source.path} changed"
    return None
