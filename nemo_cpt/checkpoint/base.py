"""Where the small files of a checkpoint's base model are: its config.json, generation settings and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_cpt.checkpoint.architecture import Architecture
from nemo_cpt.checkpoint.context import HF_FOLDER, RUN_JSON, UNFINISHED
from nemo_cpt.checkpoint.folders import has_tokenizer, refuse_adapter, require_tokenizer, small_files
from nemo_cpt.errors import CptError, near_paths

if TYPE_CHECKING:
    from nemo_cpt.checkpoint.nemo_weights import NemoWeights
    from nemo_cpt.checkpoint.safetensors_files import HFWeights


def nemo_folder(path: str | Path) -> Path:
    """The folder of a NeMo checkpoint that holds `weights` and `context`, given it or its `weights`.

    Raises:
        CptError: it is none, or a run is writing or removing it.
    """
    path = Path(path)
    # NeMo's own configurations name the `weights` folder; people name the checkpoint.
    folder = path.parent if path.name == "weights" else path
    if folder.is_symlink():  # a run points `<name>-last` at its newest, maybe while this one is read
        folder = folder.resolve()
    if Path(f"{folder}{UNFINISHED}").exists():
        raise CptError(
            f"{folder} is being written or removed by a run, or was left half by one that was killed "
            f"({folder.name}{UNFINISHED} lies beside it). Wait for the run, or take another checkpoint."
        )
    if not folder.exists():
        raise CptError(f"there is no folder {folder}{near_paths(folder) or '; `nemo-cpt ls` lists runs'}")
    refuse_adapter(folder)
    if (folder / "config.json").is_file() and not (folder / "weights").is_dir():
        raise CptError(
            f"{path} is a Hugging Face folder, and a NeMo checkpoint is asked for: `nemo-cpt import` makes one of it."
        )
    if not (folder / "weights").is_dir():
        newest = next(folder.glob("checkpoints/*-last"), "<run>/checkpoints/<name>-last")
        raise CptError(
            f"{path} is no NeMo checkpoint: it has no folder `weights`. "
            f"Give the folder of one checkpoint, such as {newest}."
        )
    return folder


def check_dest(dest: str | Path, *read: str | Path | None) -> None:
    """Refuse a place within a checkpoint that is read: what is made would be taken for a part of it.

    Args:
        dest: the folder to make.
        *read: the folders that it is made of; those that are no NeMo checkpoint may hold it.

    Raises:
        CptError: it lies within one of them.
    """
    place = Path(dest).resolve()
    for folder in (Path(each) for each in read if each is not None):
        folder = folder.parent if folder.name == "weights" else folder
        if (folder / "weights").is_dir() and folder.resolve() in place.parents:
            raise CptError(
                f"{dest} lies within {folder}, a checkpoint that is read for it, and would go with that: give a "
                "folder outside of it."
            )


@contextmanager
def unchanged(nemo: Path) -> Iterator[Callable[[], None]]:
    """Raise CptError if a run replaces or removes the checkpoint while the block reads it.

    Yields:
        A function that checks it at once, for before what was read is put to use.
    """
    before = _stamp(nemo)

    def check() -> None:
        if _stamp(nemo) != before:
            raise CptError(
                f"{nemo} was replaced or removed while it was read: a run goes on there that keeps its best "
                "checkpoints only. Take its newest (the name ends in -last), or copy the checkpoint aside first."
            )

    try:
        yield check
    # A file that vanished in the middle raises anything; that the checkpoint was replaced is the better answer.
    except Exception:
        check()
        raise
    check()


def _stamp(nemo: Path) -> object:
    """What changes when a checkpoint is written anew or removed, which begins and ends with these files."""
    if Path(f"{nemo}{UNFINISHED}").exists():
        return "unfinished"
    try:
        # The inode tells: NeMo writes a new checkpoint of the same name as new files.
        found = [(nemo / "weights" / name).stat() for name in ("metadata.json", ".metadata")]
    except FileNotFoundError:
        return "gone"
    return [(each.st_ino, each.st_size, each.st_mtime_ns) for each in found]


def carried_places(nemo: Path) -> list[Path]:
    """Where a checkpoint carries its base's files: beside the weights, or in the tokenizer's folder of its context."""
    return [nemo / HF_FOLDER, *sorted(path for path in nemo.glob("context/*") if path.is_dir())]


def carried_tokenizer(nemo: Path) -> Path | None:
    """The folder of the tokenizer that a checkpoint carries; None where it carries none."""
    return next((place for place in carried_places(nemo) if has_tokenizer(place)), None)


def model_files(folder: str | Path) -> list[Path]:
    """All files that a model is read from: a Hugging Face folder's, or those below a checkpoint's folders."""
    folder = Path(folder)
    if (folder / "weights").is_dir():
        parts = [each for part in ("weights", "context", HF_FOLDER) for each in sorted((folder / part).rglob("*"))]
        return [path for path in (*parts, folder / RUN_JSON) if path.is_file()]
    return [*small_files(folder), *sorted(folder.glob("*.safetensors*"))] if folder.is_dir() else []


def base_weights(base: Path, arch: Architecture) -> NemoWeights | HFWeights:
    """The weights of a base, be it an imported NeMo checkpoint or a Hugging Face folder."""
    from nemo_cpt.checkpoint.nemo_weights import NemoWeights  # these need numpy, the small files do not
    from nemo_cpt.checkpoint.safetensors_files import HFWeights

    return NemoWeights(base, arch) if (base / "weights").is_dir() else HFWeights(base)


def base_files(nemo: Path, base: str | Path | None) -> Path:
    """The folder with the base model's config.json and tokenizer.

    Args:
        nemo: the checkpoint to export.
        base: the base's Hugging Face folder, or its imported NeMo checkpoint; None looks in `nemo` itself, whose
            tokenizer folder carries the files when the base was imported with `import_hf`.

    Raises:
        CptError: there is no such base, no config.json or no tokenizer.
    """
    if base and not Path(base).exists():
        raise CptError(f"there is no base {base}{near_paths(Path(base))}")
    places = [Path(base), *carried_places(Path(base))] if base else carried_places(nemo)
    for place in places:
        if (place / "config.json").is_file():
            require_tokenizer(place)
            return place
    raise CptError(
        f"The base model's config.json is not in {base or nemo / 'context'}. "
        "Give base=, the Hugging Face folder (or the imported checkpoint) that the training started from."
    )
