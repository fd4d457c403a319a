"""NeMo → Hugging Face, tensor by tensor."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nemo_cpt.arguments import checked
from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import read_json
from nemo_cpt.checkpoint.arrays import DTYPES, check_finite
from nemo_cpt.checkpoint.base import check_dest, model_files, nemo_folder, unchanged
from nemo_cpt.checkpoint.provenance import hand_on, read_provenance, trainings_of
from nemo_cpt.checkpoint.safetensors_files import SHARD_BYTES, TensorPlan, write_weights
from nemo_cpt.checkpoint.trained import Description, Trained, describe, open_trained
from nemo_cpt.corpus.atomic_folders import new_folder
from nemo_cpt.errors import CptError
from nemo_cpt.made import Making, Stamps, stamps
from nemo_cpt.records import AsDict, restored


@dataclass(frozen=True)
class ExportReport(AsDict):
    """What an export did.

    Attributes:
        source: the NeMo checkpoint.
        dest: the Hugging Face folder.
        model_type: as config.json names it.
        dtype: of the written weights.
        cast_from: the checkpoint's dtypes that were not the written one; None where there are none.
        tensors: how many were written.
        padding_removed: rows of Megatron's padding that were left out of the embedding.
        bytes_written: of the weights.
        files: names of all files written, but for the hidden ones that say where the model comes from and how it was
            made.
        config_changes: where the written config.json differs from the base's, in words; else it is the base's, byte for
            byte.
        chat_template: the name of the one that the folder carries because the run was tuned on it, or it was chosen;
            None where it has the base's tokenizer and generation settings, byte for byte.
        warnings: what else to know.
        seconds: wall time.
        status: `written`, or `unchanged` where the same was there already.
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
    chat_template: str | None
    warnings: tuple[str, ...]
    seconds: float
    status: str = "written"


@checked
def export_hf(
    source: str | Path,
    dest: str | Path,
    base: str | Path | None = None,
    *,
    adapter: bool = False,
    dtype: str | None = None,
    chat_template: str | None = None,
    shard_bytes: float = SHARD_BYTES,
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
        dest: the Hugging Face folder; one that this very export made is left as it is.
        base: the base's Hugging Face folder or imported checkpoint, for its small files and, after LoRA, its weights.
            By default the files are taken from `source`, which carries them when the training used the tokenizer of an
            imported base, and the weights from where a LoRA run recorded that it started.
        adapter: write a LoRA run's adapters for `peft.PeftModel.from_pretrained` instead of the merged model.
        dtype: "bfloat16", "float16" or "float32"; by default what the base's config.json says. Another than that is
            written into config.json.
        chat_template: None for the one that the run recorded, "none" for the base's files as they are, or another: a
            name or a Jinja file that `prepare --template` takes.
        shard_bytes: the most that one weights file holds.
        ignore_fields: config fields to accept although they are unknown here.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
        CptError: the checkpoint is unfinished, damaged, non-finite or another model's; a run replaces it meanwhile; it
            has rows of tokens that config.json has no room for; the base's files are missing; `dest` holds
            something else; not enough disk. Nothing is left at `dest` then.
    """
    from nemo_cpt.checkpoint.lora import holds_adapters

    start = time.monotonic()
    check_options(adapter, dtype, chat_template)
    nemo = nemo_folder(source)
    check_dest(dest, nemo, base)
    if adapter and not holds_adapters(nemo):
        raise CptError(f"{nemo} is no LoRA checkpoint (no weights/adapter_metadata.json): leave adapter=True away.")
    options = {"adapter": adapter, "dtype": dtype, "chat_template": chat_template, "shard_bytes": shard_bytes}
    making = Making(
        "export",
        inputs_of(nemo, base, adapter) | {"chat_template": stamps(_template_file(chat_template))},
        options | {"ignore_fields": sorted(ignore_fields)},
    )
    if found := making.done(Path(dest)):
        return restored(ExportReport, found, source=str(source), dest=str(dest), status="unchanged")
    # A run that is under way keeps its newest checkpoints alone: this one may be replaced while it is read.
    with unchanged(nemo) as check_unchanged:
        described = describe(nemo, base, chat_template, ignore_fields)
        if adapter:
            size, name = 0, _base_name(nemo, described.files, base)
            write = partial(_write_adapter, nemo, described, name, checked_dtype(dtype or "float32"))
        else:
            trained = open_trained(nemo, described, base)
            plans = _plans(described, checked_dtype(dtype or described.config.arch.dtype or trained.dtype))
            size = sum(plan.nbytes for plan in plans)
            load = _counted(trained, plans, progress)
            write = partial(_write_model, trained, described, plans, load, shard_bytes)
        with new_folder(dest, size) as folder:
            report = ExportReport(
                source=str(source),
                dest=str(dest),
                model_type=described.config.arch.model_type,
                **write(folder),
                seconds=round(time.monotonic() - start, 3),
            )
            making.note(folder, report.as_dict())
            check_unchanged()  # before the folder gets its name
    return report


def inputs_of(nemo: Path, base: str | Path | None, adapter: bool = False) -> dict[str, Stamps]:
    """What is read to export or merge a checkpoint, where adapters are merged their base too.

    Raises:
        CptError: the base of adapters that are merged is gone.
    """
    from nemo_cpt.checkpoint.lora import base_of, holds_adapters

    read = base_of(nemo, base) if holds_adapters(nemo) and not adapter else base
    return {"source": stamps(model_files(nemo)), "base": stamps(model_files(read)) if read else []}


def _template_file(chat_template: str | None) -> list[Path]:
    return [Path(chat_template)] if chat_template and Path(chat_template).is_file() else []


def _plans(described: Description, dtype: str) -> list[TensorPlan]:
    """All sizes before the first tensor: a safetensors file begins with its index."""
    return [TensorPlan(slot.name, dtype, slot.shape) for slot in layout.slots(described.config.arch)]


def _write_model(
    trained: Trained,
    described: Description,
    plans: Sequence[TensorPlan],
    load: Callable[[str], Iterator[np.ndarray]],
    shard_bytes: float,
    folder: Path,
) -> dict[str, Any]:
    dtype, config, template = plans[0].dtype, described.config, described.template
    names = described.write(folder, dtype)
    names += write_weights(folder, plans, load, shard_bytes)
    return {
        "dtype": dtype,
        "cast_from": ", ".join(each for each in trained.dtypes if each != dtype) or None,
        "tensors": len(plans),
        # Rows beyond config.json's, which no token has: `_refuse_to_cut_tokens` has looked.
        "padding_removed": trained.rows - config.arch.vocab_size,
        "bytes_written": sum(plan.nbytes for plan in plans),
        "files": tuple(names),
        "config_changes": config.with_dtype(dtype).changes,
        "chat_template": template.name if template else None,
        "warnings": (*config.warnings, *trained.warnings),
    }


def _write_adapter(nemo: Path, described: Description, base_name: str, dtype: str, folder: Path) -> dict[str, Any]:
    from nemo_cpt.checkpoint.lora import Adapters, write_peft_adapter

    files, config, template = described.files, described.config, described.template
    if config.trained_otherwise:
        raise CptError(
            f"{nemo} was trained as another model than {files}/config.json describes: "
            f"{'; '.join(config.trained_otherwise)}. An adapter cannot say so; export the merged model."
        )
    adapters = Adapters(nemo, config.arch)
    names = write_peft_adapter(folder, adapters, base_name, dtype)
    hand_on(files, folder, nemo)
    warnings = config.warnings
    if template:
        warnings += (
            f"the run was tuned on the chat template {template.name}, which an adapter does not carry, and ends its "
            f"answers with {template.stop[0]} ({template.stop[1]}): the merged export says so to whatever loads it",
        )
    return {
        "dtype": dtype,
        "cast_from": None,
        # A and B of each adapter, and DoRA's magnitude.
        "tensors": (3 if adapters.dora else 2) * len(adapters.adapted),
        "padding_removed": 0,
        "bytes_written": sum((folder / name).stat().st_size for name in names),
        "files": tuple(names),
        "config_changes": (),
        "chat_template": None,
        "warnings": warnings,
    }


def _base_name(nemo: Path, files: Path, base: str | Path | None) -> str:
    """What an adapter names as its base: the repository that config.json remembers, or where it was downloaded from,
    else the folder of the files.

    Raises:
        CptError: the base was trained before, and `base` is not the Hugging Face folder of that.
    """
    # Where the base is the result of a training, its config.json remembers the model before that.
    if trainings_of(nemo)[:-1] or read_provenance(files).trainings:
        if base is None or not any(Path(base).glob("*.safetensors")):
            raise CptError(
                f"the adapters of {nemo} belong to a model that was trained before: give base= (--base), the Hugging "
                "Face folder of that (`nemo-cpt export` makes it of a checkpoint), which the adapters will name"
            )
        return str(Path(base).resolve())
    named = read_json(files / "config.json").get("_name_or_path")
    # A checkpoint carries the small files alone: with its folder nobody could load the base.
    if not named and not any(files.glob("*.safetensors")):
        named = read_provenance(files).repo_id
    return str(named or files.resolve())


def check_options(adapter: bool, dtype: str | None, chat_template: str | None) -> None:
    """Check the options of `export_hf` that need no checkpoint.

    Raises:
        CptError: one is unusable, or does not belong to the others.
    """
    if adapter and chat_template is not None:
        raise CptError("An adapter for peft carries no chat template: leave it away, or export the merged model.")
    if dtype is not None:
        checked_dtype(dtype)


def checked_dtype(dtype: str) -> str:
    """The dtype.

    Raises:
        CptError: weights cannot be written in it.
    """
    if dtype not in DTYPES:
        raise CptError(f"dtype {dtype!r} cannot be written; choose {', '.join(DTYPES)}.")
    return dtype


def _counted(
    trained: Trained, plans: Sequence[TensorPlan], progress: Callable[[int, int], None] | None
) -> Callable[[str], Iterator[np.ndarray]]:
    sizes = {plan.name: plan.nbytes for plan in plans}
    total, done = sum(sizes.values()), 0

    def load(name: str) -> Iterator[np.ndarray]:
        nonlocal done
        # Before anything of the block is written: a run that diverged must not leave a model that loads.
        for block in trained.blocks(name):
            check_finite(block, name, trained.where)
            yield block
        done += sizes[name]
        if progress:
            progress(done, total)

    return load
