"""The small files that a Hugging Face folder carries beside its weights, and how large ones are written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import IO, TYPE_CHECKING

from nemo_cpt.checkpoint.tokenizer_ids import check_tokenizer_class, end_ids
from nemo_cpt.errors import CptError, near_paths
from nemo_cpt.hub import download_advice

if TYPE_CHECKING:
    from typing_extensions import Buffer

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".index.json")
ADAPTER = "adapter_config.json"  # peft's
# A model card and the notes of transformers' Trainer describe the base, not what it became; beside an adapter's,
# transformers loads another model.
_LEFT_BEHIND = (
    "README.md", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", ADAPTER,
)  # fmt: skip
TEMPLATES = "additional_chat_templates"  # transformers' folder of templates beside the one that is used by default
_IN_ONE_FILE = f".{TEMPLATES}.json"  # in a checkpoint: NeMo copies a tokenizer's folder file by file
_PIECE_BYTES = 128 * 2**10
_CARRIED_JSON = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json",
                 "added_tokens.json", "generation_config.json")  # fmt: skip
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")  # one of them a tokenizer has


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
    files = [
        path
        for path in sorted(Path(folder).iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(_WEIGHTS)
        and path.name not in _LEFT_BEHIND
    ]
    return [*files, *sorted(Path(folder, TEMPLATES).glob("*.jinja"))]


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the folder holds a tokenizer's files."""
    return any((Path(folder) / name).is_file() for name in VOCABULARIES)


def refuse_adapter(folder: str | Path) -> None:
    """Raise CptError for a folder that holds peft's adapters, wherever a model is asked for.

    Beside a model too: where peft is installed, transformers loads another one.
    """
    folder = Path(folder)
    if not (folder / ADAPTER).is_file():
        return
    holds = f"{folder} holds adapters for peft ({ADAPTER})"
    if any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        raise CptError(
            f"{holds} beside a model: with peft, transformers loads {_base_of_adapter(folder)} with them, and not the "
            f"weights that lie here. Where these have the adapters in them already, move {ADAPTER} and "
            "adapter_model.safetensors away; else merge them first, by peft's merge_and_unload()."
        )
    raise CptError(
        f"{holds}, to be added to {_base_of_adapter(folder)}, and no model. Of a "
        "run's, `nemo-cpt export CHECKPOINT FOLDER`, without --adapter, writes the model with them in it. Of others, "
        f"peft does, PeftModel.from_pretrained(BASE, {str(folder)!r}).merge_and_unload().save_pretrained(FOLDER), and "
        "the base's tokenizer goes beside it."
    )


def _base_of_adapter(folder: Path) -> str:
    try:
        base = json.loads((folder / ADAPTER).read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    return str(base or "their base")


def require_model(folder: str | Path) -> None:
    """Raise CptError for a path that is something else than a Hugging Face folder, saying what."""
    folder = Path(folder)
    refuse_adapter(folder)
    if (folder / "config.json").is_file():
        return
    if not folder.exists():
        raise CptError(f"there is no folder {folder}{near_paths(folder) or download_advice(str(folder))}")
    if not folder.is_dir():
        raise CptError(f"{folder} is a file. Give the folder of a Hugging Face model, which holds config.json.")
    if (folder / "weights").is_dir():
        raise CptError(
            f"{folder} is a NeMo checkpoint, and a Hugging Face folder is asked for: `nemo-cpt export` makes one of it."
        )


def require_tokenizer(folder: str | Path) -> None:
    """Raise CptError unless the folder holds a tokenizer, whole, that the installed transformers has a class for."""
    if not has_tokenizer(folder):
        raise CptError(
            f"{folder} holds no tokenizer (looked for {', '.join(VOCABULARIES)}). "
            "Put the model's tokenizer files there; training and inference need them."
        )
    for path in (Path(folder) / name for name in _CARRIED_JSON):
        try:
            content = json.loads(path.read_bytes() if path.is_file() else b"{}")
        except ValueError as error:
            raise CptError(f"{path} is no JSON ({error}), as a file that was cut short: download it again.") from error
        if not isinstance(content, dict):
            raise CptError(f"{path} holds a {type(content).__name__}, not a JSON object: download it again.")
        if path.name == "generation_config.json":
            end_ids(content, str(path))
    check_tokenizer_class(folder)


def copy_small_files(source: str | Path, dest: Path, *, in_checkpoint: bool = False) -> list[str]:
    """Copy `small_files(source)` to `dest` (created if need be).

    Args:
        source: a Hugging Face folder, or one of a checkpoint's that carries such files.
        dest: where they go.
        in_checkpoint: into a folder that NeMo may copy on, which then has no folder in it.

    Returns:
        Their names; of the additional chat templates, with their folder's.
    """
    source = Path(source)
    dest.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in small_files(source) if path.parent == source]
    for name in names:
        shutil.copyfile(source / name, dest / name)
    return names + copy_additional_templates(source, dest, in_checkpoint=in_checkpoint)


def copy_additional_templates(source: Path, dest: Path, *, in_checkpoint: bool = False) -> list[str]:
    """Copy the chat templates that a tokenizer has beside its default one; see `copy_small_files`.

    Raises:
        CptError: one cannot be read.
    """
    templates = _additional_templates(source)
    if in_checkpoint:
        if templates:
            (dest / _IN_ONE_FILE).write_text(json.dumps(templates, indent=1) + "\n", encoding="utf-8")
        return []
    for name, text in templates.items():
        (dest / TEMPLATES).mkdir(exist_ok=True)
        (dest / TEMPLATES / name).write_bytes(text.encode())
    return [f"{TEMPLATES}/{name}" for name in templates]


def remove_additional_templates(folder: Path) -> None:
    """Leave a folder with the chat template alone that is used by default."""
    shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
    (folder / _IN_ONE_FILE).unlink(missing_ok=True)


def _additional_templates(folder: Path) -> dict[str, str]:
    """The texts of the additional chat templates that a folder has, or carries in one file, by their files' names."""
    carried = folder / _IN_ONE_FILE
    try:
        found = dict(json.loads(carried.read_bytes())) if carried.is_file() else {}
        files = {path.name: path.read_bytes().decode() for path in sorted(folder.glob(f"{TEMPLATES}/*.jinja"))}
        return {Path(name).name: str(text) for name, text in found.items()} | files
    except (OSError, ValueError, TypeError) as error:
        raise CptError(f"the chat templates of {folder} cannot be read ({error}). Copy it again.") from error
