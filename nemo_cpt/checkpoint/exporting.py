"""NeMo → Hugging Face, tensor by tensor."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import Architecture, read_architecture, read_json
from nemo_cpt.checkpoint.arrays import DTYPES, check_finite
from nemo_cpt.checkpoint.base import base_files, base_weights, nemo_folder
from nemo_cpt.checkpoint.files import copy_small_files, new_folder
from nemo_cpt.checkpoint.safetensors_files import SHARD_BYTES, TensorPlan, write_weights
from nemo_cpt.errors import CptError


@dataclass(frozen=True)
class ExportReport:
    """What an export did; `cast_from` names the checkpoint's dtype where it was not the written one."""

    source: str
    dest: str
    model_type: str
    dtype: str
    cast_from: str | None
    tensors: int
    padding_removed: int
    bytes_written: int
    files: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The report as a JSON-serialisable dict."""
        return asdict(self)


def export_hf(
    source: str | Path,
    dest: str | Path,
    base: str | Path | None = None,
    *,
    adapter: bool = False,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    ignore_fields: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Turn a NeMo checkpoint into a Hugging Face folder that transformers loads, without building the model.

    config.json, generation_config.json and every tokenizer file are the base model's, byte for byte. Weights go into
    safetensors shards with an index. One tensor at a time is in memory. A LoRA run's adapters are merged into the base
    (in fp32), or written for peft.

    Args:
        source: an imported or a training checkpoint, from any tensor and pipeline parallel size.
        dest: the Hugging Face folder; must not exist.
        base: the base's Hugging Face folder or imported checkpoint, for its small files and, after LoRA, its weights.
            By default the files are taken from `source`, which carries them when the training used the tokenizer of an
            imported base, and the weights from where a LoRA run recorded that it started.
        adapter: write a LoRA run's adapters for `peft.PeftModel.from_pretrained` instead of the merged model.
        dtype: "bfloat16", "float16" or "float32"; by default what the base's config.json says. Another than that is
            written into config.json.
        shard_bytes: the most that one weights file holds.
        ignore_fields: config fields to accept although they are unknown here.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
        CptError: the checkpoint is unfinished, damaged, non-finite or another model's; the base's files are missing;
            `dest` exists; not enough disk. Nothing is left at `dest` then.
    """
    from nemo_cpt.checkpoint.lora import is_lora

    start = time.monotonic()
    nemo = nemo_folder(source)
    lora = is_lora(nemo)
    if adapter and not lora:
        raise CptError(f"{nemo} is no LoRA checkpoint (no weights/adapter_metadata.json): leave adapter=True away.")
    files = base_files(nemo, base)
    arch = read_architecture(files, ignore_fields)
    if adapter:
        written = _export_adapter(nemo, Path(dest), arch, files, _checked(dtype or "float32"))
    else:
        model = _open_lora(nemo, arch, base) if lora else _open_model(nemo, arch)
        written = _export_model(
            model, Path(dest), arch, files, _checked(dtype or arch.dtype or model.dtype), shard_bytes, progress
        )
    return ExportReport(
        source=str(source),
        dest=str(dest),
        model_type=arch.model_type,
        seconds=round(time.monotonic() - start, 3),
        **written,
    )


@dataclass(frozen=True)
class _Model:
    """Something to export: where it is, its tensors in blocks of rows, their dtype and the embedding's padding."""

    where: Path
    blocks: Callable[[str], Iterable[np.ndarray]]
    dtype: str
    padding: int


def _open_model(nemo: Path, arch: Architecture) -> _Model:
    from nemo_cpt.checkpoint.nemo_weights import NemoWeights

    weights = NemoWeights(nemo, arch)
    return _Model(nemo, weights.blocks, weights.dtype, weights.vocab_rows - arch.vocab_size)


def _open_lora(nemo: Path, arch: Architecture, base: str | Path | None) -> _Model:
    from nemo_cpt.checkpoint.lora import Adapters, base_of

    weights = base_weights(base_of(nemo, base), arch)
    return _Model(
        nemo, partial(Adapters(nemo, arch).merged, base=weights), weights.dtype, weights.vocab_rows - arch.vocab_size
    )


def _export_model(
    model: _Model,
    dest: Path,
    arch: Architecture,
    files: Path,
    dtype: str,
    shard_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    plans = [TensorPlan(slot.name, dtype, slot.shape) for slot in layout.slots(arch)]
    total = sum(plan.nbytes for plan in plans)
    with new_folder(dest, total + 64 * 2**20) as folder:
        names = copy_small_files(files, folder)
        if dtype != (arch.dtype or dtype):
            _set_dtype(folder / "config.json", dtype)
        names += write_weights(folder, plans, _counted(model, plans, progress), shard_bytes)
    return {
        "dtype": dtype,
        "cast_from": model.dtype if model.dtype != dtype else None,
        "tensors": len(plans),
        "padding_removed": model.padding,
        "bytes_written": total,
        "files": tuple(names),
    }


def _export_adapter(nemo: Path, dest: Path, arch: Architecture, files: Path, dtype: str) -> dict[str, Any]:
    from nemo_cpt.checkpoint.lora import Adapters, write_peft_adapter

    adapters = Adapters(nemo, arch)
    with new_folder(dest, 64 * 2**20) as folder:
        names = write_peft_adapter(folder, adapters, _base_name(files), dtype)
        size = sum((folder / name).stat().st_size for name in names)
    return {
        "dtype": dtype,
        "cast_from": None,
        "tensors": 2 * len(adapters.adapted),
        "padding_removed": 0,
        "bytes_written": size,
        "files": tuple(names),
    }


def _base_name(files: Path) -> str:
    """What an adapter names as its base: the repository that config.json remembers, else the folder of the files."""
    return str(read_json(files / "config.json").get("_name_or_path") or files.resolve())


def _checked(dtype: str) -> str:
    if dtype not in DTYPES:
        raise CptError(f"dtype {dtype!r} cannot be written; choose {', '.join(DTYPES)}.")
    return dtype


def _counted(
    model: _Model, plans: list[TensorPlan], progress: Callable[[int, int], None] | None
) -> Callable[[str], Iterator[np.ndarray]]:
    sizes = {plan.name: plan.nbytes for plan in plans}
    total, done = sum(sizes.values()), 0

    def load(name: str) -> Iterator[np.ndarray]:
        nonlocal done
        for block in model.blocks(name):
            check_finite(block, name, model.where)
            yield block
        done += sizes[name]
        if progress:
            progress(done, total)

    return load


def _set_dtype(path: Path, dtype: str) -> None:
    config = read_json(path)
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
