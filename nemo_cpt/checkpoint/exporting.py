"""NeMo → Hugging Face, tensor by tensor."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import read_architecture, read_json
from nemo_cpt.checkpoint.base import base_files, nemo_folder
from nemo_cpt.checkpoint.files import copy_small_files, new_folder
from nemo_cpt.checkpoint.safetensors_files import SHARD_BYTES, TensorPlan, check_finite, write_weights
from nemo_cpt.errors import CptError

if TYPE_CHECKING:
    import torch


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
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    ignore_fields: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Turn a NeMo checkpoint into a Hugging Face folder that transformers loads, without building the model.

    config.json, generation_config.json and every tokenizer file are the base model's, byte for byte. Weights go into
    safetensors shards with an index. One tensor at a time is in memory.

    Args:
        source: an imported or a training checkpoint, from any tensor and pipeline parallel size.
        dest: the Hugging Face folder; must not exist.
        base: the base's Hugging Face folder or imported checkpoint, for its small files; by default they are taken from
            `source`, which carries them when the training used the tokenizer of an imported base.
        dtype: "bfloat16", "float16" or "float32"; by default what the base's config.json says. Another than that is
            written into config.json.
        shard_bytes: the most that one weights file holds.
        ignore_fields: config fields to accept although they are unknown here.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
        CptError: the checkpoint is unfinished, damaged, non-finite or another model's; the base's files are missing;
            `dest` exists; not enough disk. Nothing is left at `dest` then.
    """
    from nemo_cpt.checkpoint.nemo_weights import NemoWeights

    start = time.monotonic()
    nemo = nemo_folder(source)
    files = base_files(nemo, base)
    arch = read_architecture(files, ignore_fields)
    weights = NemoWeights(nemo, arch)
    stored = str(weights.dtype).removeprefix("torch.")
    written = _written_dtype(dtype or arch.dtype or stored)
    plans = [TensorPlan(slot.name, written, slot.shape) for slot in layout.slots(arch)]
    total = sum(plan.nbytes for plan in plans)
    load = _counted(weights.read, plans, nemo, progress)
    with new_folder(dest, total + 64 * 2**20) as folder:
        names = copy_small_files(files, folder)
        if written != (arch.dtype or written):
            _set_dtype(folder / "config.json", written)
        names += write_weights(folder, plans, load, shard_bytes)
    return ExportReport(
        str(source), str(dest), arch.model_type, written, stored if stored != written else None, len(plans),
        weights.vocab_rows - arch.vocab_size, total, tuple(names), round(time.monotonic() - start, 3),
    )  # fmt: skip


def _written_dtype(dtype: str) -> str:
    if dtype not in ("bfloat16", "float16", "float32"):
        raise CptError(f"dtype {dtype!r} cannot be written; choose bfloat16, float16 or float32.")
    return dtype


def _counted(
    read: Callable[[str], torch.Tensor],
    plans: list[TensorPlan],
    where: Path,
    progress: Callable[[int, int], None] | None,
) -> Callable[[str], torch.Tensor]:
    sizes = {plan.name: plan.nbytes for plan in plans}
    total, done = sum(sizes.values()), 0

    def load(name: str) -> torch.Tensor:
        nonlocal done
        tensor = read(name)
        check_finite(tensor, name, where)
        done += sizes[name]
        if progress:
            progress(done, total)
        return tensor

    return load


def _set_dtype(path: Path, dtype: str) -> None:
    config = read_json(path)
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
