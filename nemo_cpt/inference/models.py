"""From what users have to an engine: a Hugging Face folder as it is, NeMo checkpoints through a cache of exports."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_cpt.cache import cache_folder
from nemo_cpt.checkpoint import export_hf
from nemo_cpt.checkpoint.context import RUN_JSON
from nemo_cpt.errors import CptError
from nemo_cpt.inference.engine import Engine
from nemo_cpt.training.run_folder import newest_whole

if TYPE_CHECKING:
    from nemo_cpt.inference.transformers_engine import TransformersEngine

SAMPLED_BYTES = 64 * 1024  # read at each of SAMPLES places of a file, to tell its content from another's
SAMPLES = 16
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def open_engine(
    model: str | Path,
    *,
    base: str | Path | None = None,
    api_key: str | None = None,
    served_as: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Engine:
    """Return an engine for a model, wherever it is.

    Args:
        model: a Hugging Face folder, a NeMo checkpoint, a run's folder (its newest complete checkpoint), or the
            http address of an OpenAI-compatible server.
        base: the base of a LoRA checkpoint whose own record of it does not hold any more.
        api_key: an endpoint's key.
        served_as: the model's name at an endpoint that serves several.
        say: called with a line about what takes time or was chosen.
        **options: of `TransformersEngine` (device, dtype, chat_template).

    Raises:
        CptError: there is no such model, it cannot be loaded, or the endpoint does not answer.
    """
    # Before anything is looked for on the disk: an address is never a path.
    if str(model).startswith(("http://", "https://")):
        from nemo_cpt.inference.endpoint import EndpointEngine

        if options:
            raise CptError(f"{', '.join(options)} cannot be set for a model that {model} serves")
        return EndpointEngine(str(model), served_as, api_key=api_key)
    return open_transformers(model, base=base, say=say, **options)


def open_transformers(
    model: str | Path, *, base: str | Path | None = None, say: Callable[[str], None] = lambda line: None, **options: Any
) -> "TransformersEngine":
    """`open_engine` for what runs in this process alone, such as the server's model."""
    folder = hugging_face_folder(model, base=base, say=say)
    from nemo_cpt.inference.transformers_engine import TransformersEngine  # imports torch: after the cheap refusals

    return TransformersEngine(folder, **options)


def hugging_face_folder(
    model: str | Path, *, base: str | Path | None = None, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Return the Hugging Face folder of a model; a NeMo checkpoint is exported into the cache first.

    The export is kept under `$XDG_CACHE_HOME/nemo_cpt/exports` (`~/.cache` by default), named by the checkpoint's
    content: the size of every weights file and 64 KiB at sixteen places of it, and what it records of its run.

    Raises:
        CptError: there is no model at `model`, or it cannot be exported.
    """
    path = Path(model)
    if not path.exists():
        raise CptError(f"there is no model at {model}{_advice(str(model))}")
    # In this order: an imported base holds `hf/config.json`, not one of its own.
    if (path / "config.json").is_file():
        return path
    checkpoint = _checkpoint(path)
    if checkpoint != path:
        say(f"the newest complete checkpoint of {path} is {checkpoint.name}")
    export = cache_folder("exports") / _content_key(checkpoint, base)
    if export.exists():
        say(f"its export is in the cache: {export}")
        return export
    say(f"exporting {checkpoint} into the cache: {export}")
    export.parent.mkdir(parents=True, exist_ok=True)
    try:
        export_hf(checkpoint, export, base)
    except CptError:
        if export.exists():  # another process was first; what stands there is whole
            return export
        raise
    return export


def _checkpoint(path: Path) -> Path:
    if (path / "weights").is_dir():
        return path
    if (path / "checkpoints").is_dir():
        if (newest := newest_whole(path / "checkpoints")) is not None:
            return newest.path
        raise CptError(f"{path} is a run that has no complete checkpoint yet")
    found = ", ".join(sorted(each.name for each in path.iterdir())[:6]) if path.is_dir() else "a file"
    raise CptError(
        f"{path} is neither a Hugging Face folder (config.json) nor a NeMo checkpoint (weights/) nor a run's folder "
        f"(checkpoints/); it holds {found or 'nothing'}"
    )


def _advice(model: str) -> str:
    if HUB_NAME.fullmatch(model):
        return f"; if it is on the hub: nemo-cpt download {model} models/{model.partition('/')[2]}"
    return ""


def folder_key(folder: Path) -> str:
    """A digest by which a Hugging Face folder's content is known: every file's size, and 64 KiB at sixteen places."""
    return _sampled(hashlib.sha256(), [path for path in folder.iterdir() if path.is_file()])


def _content_key(checkpoint: Path, base: str | Path | None) -> str:
    files = [path for path in (checkpoint / "weights").rglob("*") if path.is_file()]
    digest = hashlib.sha256(str(Path(base).resolve() if base else "").encode())
    records = [path for path in (checkpoint / "context" / "io.json", checkpoint / RUN_JSON) if path.is_file()]
    return _sampled(digest, [*files, *records])


def _sampled(digest: Any, files: list[Path]) -> str:
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            # Sampled: reading 16 GB to find a cached export would take longer than making one.
            for place in sorted({max(0, size - SAMPLED_BYTES) * sample // (SAMPLES - 1) for sample in range(SAMPLES)}):
                file.seek(place)
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()[:32]
