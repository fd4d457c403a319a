"""The small files that a Hugging Face folder carries beside its weights, and how large ones are written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import IO, TYPE_CHECKING

from nemo_cpt.checkpoint.tokenizer_ids import check_tokenizer_class
from nemo_cpt.errors import CptError, near_paths
from nemo_cpt.hub import download_advice

if TYPE_CHECKING:
    from typing_extensions import Buffer

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".index.json")
ADAPTER = "adapter_config.json"  # peft's
# A model card describes the base, not what it became; beside an adapter's, transformers loads another model.
_LEFT_BEHIND = ("README.md", ".gitattributes", ".gitignore", ADAPTER)
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
            json.loads(path.read_bytes() if path.is_file() else b"{}")
        except ValueError as error:
            raise CptError(f"{path} is no JSON ({error}), as a file that was cut short: download it again.") from error
    check_tokenizer_class(folder)


def copy_small_files(source: str | Path, dest: Path) -> list[str]:
    """Copy `small_files(source)` to `dest` (created if need be) and return their names."""
    dest.mkdir(parents=True, exist_ok=True)
    names = []
    for path in small_files(source):
        shutil.copyfile(path, dest / path.name)
        names.append(path.name)
    return names
