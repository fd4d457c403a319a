"""From what users have to an engine: a Hugging Face folder as it is, NeMo checkpoints through a cache of exports."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_cpt import __version__
from nemo_cpt.arguments import checked
from nemo_cpt.cache import cache_folder
from nemo_cpt.checkpoint import export_hf
from nemo_cpt.checkpoint.base import model_files
from nemo_cpt.checkpoint.folders import refuse_adapter
from nemo_cpt.errors import CptError, near_paths
from nemo_cpt.hub import download_advice
from nemo_cpt.inference.asked_as import check_template_choice, reply_warnings, template_text
from nemo_cpt.inference.engine import Engine
from nemo_cpt.training.run_folder import Checkpoint, newest_whole
from nemo_cpt.urls import is_address

if TYPE_CHECKING:
    from nemo_cpt.inference.transformers_engine import TransformersEngine

SAMPLED_BYTES = 64 * 1024  # read at each of SAMPLES places of a file, to tell its content from another's
SAMPLES = 16
MOST_TRIES = 5  # at the newest checkpoint of a run that replaces it meanwhile


@dataclass(frozen=True)
class Found:
    """A model on this machine.

    Attributes:
        folder: its Hugging Face folder.
        name: what messages call it: what the user named, and the step of a run's checkpoint.
    """

    folder: Path
    name: str


@checked
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
            http address of an OpenAI-compatible server, as ADDRESS#MODEL where it serves several.
        base: the base of a LoRA checkpoint whose own record of it does not hold any more.
        api_key: an endpoint's key.
        served_as: the model's name at an endpoint that serves several, in place of #MODEL.
        say: called with a line about what takes time or was chosen.
        **options: of `open_transformers`.

    Raises:
        CptError: there is no such model, it cannot be loaded, or the endpoint does not answer.
    """
    # Before anything is looked for on the disk: an address is never a path.
    if is_address(str(model)):
        from nemo_cpt.inference.endpoint import EndpointEngine

        if options:
            raise CptError(f"{', '.join(options)} cannot be set for a model that {model} serves")
        address, _, named = str(model).partition("#")
        return EndpointEngine(address, served_as or named or None, api_key=api_key)
    return open_transformers(model, base=base, say=say, **options)


@checked
def open_transformers(
    model: str | Path, *, base: str | Path | None = None, template: str | None = None,
    say: Callable[[str], None] = lambda line: None, **options: Any,
) -> "TransformersEngine":  # fmt: skip
    """`open_engine` for what runs in this process alone, such as the server's model.

    Args:
        model: as for `open_engine`, without addresses.
        base: as for `open_engine`.
        template: a chat template in place of the model's own: the name of one that ships (`alpaca-ja`), or a Jinja
            file. A reply then ends, too, where the model begins the next question itself, as base models do.
        say: as for `open_engine`; called, too, with what will make replies go wrong.
        **options: of `TransformersEngine` (device, dtype, chat_template).
    """
    if template is not None:
        check_template_choice(template)
    found = find_model(model, base=base, say=say)
    if template is not None:
        options["chat_template"] = template_text(template, found.folder)
    elif "chat_template" not in options:
        for warning in reply_warnings(found.folder):
            say(f"warning: {warning}")
    from nemo_cpt.inference.transformers_engine import TransformersEngine  # imports torch: after the cheap refusals

    engine = TransformersEngine(found.folder, name=found.name, **options)
    if template is not None:
        engine.end_at_next_turn()
    return engine


@checked
def hugging_face_folder(
    model: str | Path, *, base: str | Path | None = None, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Return the Hugging Face folder of a model; see `find_model`."""
    return find_model(model, base=base, say=say).folder


@checked
def find_model(
    model: str | Path, *, base: str | Path | None = None, say: Callable[[str], None] = lambda line: None
) -> Found:
    """Return the Hugging Face folder of a model; a NeMo checkpoint is exported into the cache first.

    The export is kept under `$XDG_CACHE_HOME/nemo_cpt/exports` (`~/.cache` by default), named by this library's version
    and the checkpoint's content: the size of every file and 64 KiB at sixteen places of it (smaller ones whole), of the
    checkpoint and of `base`. A run may go on meanwhile: where it replaces the newest checkpoint while that is read, the
    then newest is taken.

    Raises:
        CptError: there is no model at `model`, or it cannot be exported.
    """
    check_model(model)
    path = Path(model)
    # In this order: an imported base holds `hf/config.json`, not one of its own.
    if not takes_base(path):
        if base is not None:
            raise CptError(
                f"{path} is a Hugging Face folder, and has no base to be merged into: leave base={base} away"
            )
        return Found(path, str(path))
    if (path / "weights").is_dir():
        return Found(_exported(path, base, say), str(path))
    return _of_run(path, base, say)


def check_model(model: str | Path) -> None:
    """Refuse a path that is no model's, at once: whoever opens several looks at all of them first; addresses pass.

    Raises:
        CptError: nothing is there, or something else.
    """
    if is_address(str(model)):
        return
    path = Path(model)
    if not path.exists():
        raise CptError(f"there is no model at {model}{near_paths(path) or download_advice(str(model))}")
    refuse_adapter(path)
    if (path / "config.json").is_file() or (path / "weights").is_dir() or (path / "checkpoints").is_dir():
        return
    found = ", ".join(sorted(each.name for each in path.iterdir())[:6]) if path.is_dir() else "a file"
    raise CptError(
        f"{path} is neither a Hugging Face folder (config.json) nor a NeMo checkpoint (weights/) nor a run's folder "
        f"(checkpoints/); it holds {found or 'nothing'}"
    )


def takes_base(model: str | Path) -> bool:
    """Say whether a model is exported first, perhaps merged into its base: no Hugging Face folder, and no endpoint."""
    return not is_address(str(model)) and not (Path(model) / "config.json").is_file()


def _of_run(run: Path, base: str | Path | None, say: Callable[[str], None]) -> Found:
    for _ in range(MOST_TRIES):
        newest = _newest(run)
        say(f"the newest complete checkpoint of {run} is {newest.path.name}, step {newest.step}")
        try:
            return Found(_exported(newest.path, base, say), f"{run} at step {newest.step}")
        except CptError:
            # The checkpoint is still there: it is at fault, and not the run that goes on.
            if _newest(run).path == newest.path:
                raise
            say(f"the run has replaced {newest.path.name} meanwhile")
    raise CptError(f"{run} replaces its checkpoints faster than they can be read: name one of {run / 'checkpoints'}")


def _newest(run: Path) -> Checkpoint:
    for _ in range(MOST_TRIES):
        try:
            newest = newest_whole(run / "checkpoints")
        except FileNotFoundError:  # one was removed while they were looked through
            continue
        if newest is not None:
            return newest
        break
    raise CptError(f"{run} is a run that has no complete checkpoint yet")


def _exported(checkpoint: Path, base: str | Path | None, say: Callable[[str], None]) -> Path:
    try:
        export = cache_folder("exports") / _content_key(checkpoint, base)
    except FileNotFoundError as error:
        raise CptError(f"{checkpoint} was removed while it was read: {error.filename} is gone") from None
    if export.exists():
        say(f"its export is in the cache: {export}")
        return export
    say(f"exporting {checkpoint} into the cache: {export}")
    try:
        export_hf(checkpoint, export, base)
    except CptError:
        if export.exists():  # another process was first; what stands there is whole
            return export
        raise
    return export


def _content_key(checkpoint: Path, base: str | Path | None) -> str:
    # The version: another one may export otherwise.
    digest = hashlib.sha256(f"{__version__} {Path(base).resolve() if base else ''}".encode())
    # The small files too, of which the export's tokenizer, template and ends are made.
    for path in [*model_files(checkpoint), *(model_files(base) if base else [])]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        if size <= SAMPLES * SAMPLED_BYTES:
            digest.update(path.read_bytes())
            continue
        with path.open("rb") as file:
            # Sampled: reading 16 GB to find a cached export would take longer than making one.
            for place in sorted({max(0, size - SAMPLED_BYTES) * sample // (SAMPLES - 1) for sample in range(SAMPLES)}):
                file.seek(place)
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()[:32]
