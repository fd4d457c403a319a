"""NeMo → Hugging Face, tensor by tensor."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import Architecture, read_json
from nemo_cpt.checkpoint.arrays import DTYPES, check_finite
from nemo_cpt.checkpoint.base import base_files, base_weights, carried_places, nemo_folder, unchanged
from nemo_cpt.checkpoint.exported_config import ExportedConfig, exported_config
from nemo_cpt.checkpoint.folders import copy_small_files, new_folder
from nemo_cpt.checkpoint.safetensors_files import SHARD_BYTES, TensorPlan, write_weights
from nemo_cpt.checkpoint.tokenizer_ids import count_token_ids
from nemo_cpt.errors import CptError


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        source: the NeMo checkpoint.
        dest: the Hugging Face folder.
        model_type: as config.json names it.
        dtype: of the written weights.
        cast_from: the checkpoint's dtype where it was not the written one.
        tensors: how many were written.
        padding_removed: rows of Megatron's padding that were left out of the embedding.
        bytes_written: of the weights.
        files: names of all files written.
        config_changes: where the written config.json differs from the base's, in words; else it is the base's, byte for
            byte.
        warnings: what else to know.
        seconds: wall time.
    """

    source: str
    dest: str
    model_type: str
    dtype: str
    cast_from: str | None
    tensors: int
    padding_removed: int
    bytes_written: int
    files: tuple[str, ...]
    config_changes: tuple[str, ...]
    warnings: tuple[str, ...]
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

    generation_config.json and every tokenizer file are the base model's, byte for byte, and so is config.json unless
    the checkpoint's context says that the run trained with another rotary base or scaling, window or norm epsilon, or
    with longer sequences: those are written into it. Weights go into safetensors shards with an index. One tensor at a
    time is in memory. A LoRA run's adapters are merged into the base (in fp32), or written for peft.

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
        CptError: the checkpoint is unfinished, damaged, non-finite or another model's; a run replaces it meanwhile; it
            has rows of tokens that config.json has no room for; the base's files are missing; `dest` exists; not
            enough disk. Nothing is left at `dest` then.
    """
    from nemo_cpt.checkpoint.lora import is_lora

    start = time.monotonic()
    nemo = nemo_folder(source)
    lora = is_lora(nemo)
    if adapter and not lora:
        raise CptError(f"{nemo} is no LoRA checkpoint (no weights/adapter_metadata.json): leave adapter=True away.")
    files = base_files(nemo, base)
    # A run that is under way keeps its newest checkpoints alone: this one may be replaced while it is read.
    with unchanged(nemo) as check_unchanged:
        config = exported_config(nemo, files, ignore_fields)
        write: Callable[[Path], dict[str, Any]]
        if adapter:
            # Adapters are small: no room has to be looked for.
            size = 0
            write = partial(_write_adapter, nemo, config, files, _checked(dtype or "float32"))
        else:
            model = _open_lora(nemo, config.arch, base) if lora else _open_model(nemo, config.arch)
            _refuse_to_cut_tokens(model, config.arch, (files, *carried_places(nemo)))
            dtype = _checked(dtype or config.arch.dtype or model.dtype)
            plans = [TensorPlan(slot.name, dtype, slot.shape) for slot in layout.slots(config.arch)]
            size = sum(plan.nbytes for plan in plans)
            load = _counted(model, plans, progress)
            write = partial(_write_model, model, config.with_dtype(dtype), files, plans, load, shard_bytes)
        # 64 MiB beside the weights: tokenizer, index and configuration.
        with new_folder(dest, size + 64 * 2**20) as folder:
            written = write(folder)
            check_unchanged()  # before the folder gets its name
    return ExportReport(
        source=str(source),
        dest=str(dest),
        model_type=config.arch.model_type,
        seconds=round(time.monotonic() - start, 3),
        **written,
    )


@dataclass(frozen=True)
class _Model:
    """Something to export: where it is, its tensors in blocks of rows, their dtype and the rows of its embedding."""

    where: Path
    blocks: Callable[[str], Iterable[np.ndarray]]
    dtype: str
    rows: int
    warnings: tuple[str, ...] = ()


def _open_model(nemo: Path, arch: Architecture) -> _Model:
    from nemo_cpt.checkpoint.nemo_weights import NemoWeights

    weights = NemoWeights(nemo, arch)
    return _Model(nemo, weights.blocks, weights.dtype, weights.vocab_rows)


def _open_lora(nemo: Path, arch: Architecture, base: str | Path | None) -> _Model:
    from nemo_cpt.checkpoint.lora import Adapters, base_of

    weights, adapters = base_weights(base_of(nemo, base), arch), Adapters(nemo, arch)
    rows = adapters.trained_rows or weights.vocab_rows
    return _Model(nemo, partial(adapters.merged, base=weights), weights.dtype, rows, adapters.warnings)


def _refuse_to_cut_tokens(model: _Model, arch: Architecture, tokenizers: Iterable[Path]) -> None:
    """Refuse to cut off a row as padding that belongs to a token and so may have been trained."""
    for folder in tokenizers:
        tokens = count_token_ids(folder) or 0
        if arch.vocab_size < min(tokens, model.rows):
            raise CptError(
                f"{model.where} has {model.rows} rows in its embedding and the tokenizer in {folder} {tokens} tokens, "
                f"but config.json has room for {arch.vocab_size} rows: those above belong to tokens, may have been "
                "trained, and would be lost. Give the base a row for every token (transformers: "
                f"model.resize_token_embeddings({tokens})), import it, and train from that."
            )


def _write_model(
    model: _Model,
    config: ExportedConfig,
    files: Path,
    plans: Sequence[TensorPlan],
    load: Callable[[str], Iterator[np.ndarray]],
    shard_bytes: int,
    folder: Path,
) -> dict[str, Any]:
    names = copy_small_files(files, folder)
    # Unchanged, config.json stays the copy of the base's, byte for byte.
    if config.changes:
        (folder / "config.json").write_text(json.dumps(config.fields, indent=2) + "\n", encoding="utf-8")
    names += write_weights(folder, plans, load, shard_bytes)
    dtype = plans[0].dtype
    return {
        "dtype": dtype,
        "cast_from": model.dtype if model.dtype != dtype else None,
        "tensors": len(plans),
        "padding_removed": model.rows - config.arch.vocab_size,
        "bytes_written": sum(plan.nbytes for plan in plans),
        "files": tuple(names),
        "config_changes": config.changes,
        "warnings": (*config.warnings, *model.warnings),
    }


def _write_adapter(nemo: Path, config: ExportedConfig, files: Path, dtype: str, folder: Path) -> dict[str, Any]:
    from nemo_cpt.checkpoint.lora import Adapters, write_peft_adapter

    if config.trained_otherwise:
        raise CptError(
            f"{nemo} was trained as another model than {files}/config.json describes: "
            f"{'; '.join(config.trained_otherwise)}. An adapter cannot say so; export the merged model."
        )
    adapters = Adapters(nemo, config.arch)
    names = write_peft_adapter(folder, adapters, _base_name(files), dtype)
    return {
        "dtype": dtype,
        "cast_from": None,
        "tensors": 2 * len(adapters.adapted),
        "padding_removed": 0,
        "bytes_written": sum((folder / name).stat().st_size for name in names),
        "files": tuple(names),
        "config_changes": (),
        "warnings": config.warnings,
    }


def _base_name(files: Path) -> str:
    """What an adapter names as its base: the repository that config.json remembers, else the folder of the files."""
    return str(read_json(files / "config.json").get("_name_or_path") or files.resolve())


def _checked(dtype: str) -> str:
    if dtype not in DTYPES:
        raise CptError(f"dtype {dtype!r} cannot be written; choose {', '.join(DTYPES)}.")
    return dtype


def _counted(
    model: _Model, plans: Sequence[TensorPlan], progress: Callable[[int, int], None] | None
) -> Callable[[str], Iterator[np.ndarray]]:
    sizes = {plan.name: plan.nbytes for plan in plans}
    total, done = sum(sizes.values()), 0

    def load(name: str) -> Iterator[np.ndarray]:
        nonlocal done
        # Before anything of the block is written: a run that diverged must not leave a model that loads.
        for block in model.blocks(name):
            check_finite(block, name, model.where)
            yield block
        done += sizes[name]
        if progress:
            progress(done, total)

    return load
