"""A LoRA or DoRA run's checkpoint → a NeMo checkpoint of the whole model, for another training to start from."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from nemo_cpt.arguments import checked
from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.arrays import DTYPES, cast
from nemo_cpt.checkpoint.base import check_dest, nemo_folder, unchanged
from nemo_cpt.checkpoint.context import HF_FOLDER
from nemo_cpt.checkpoint.exporting import checked_dtype, inputs_of
from nemo_cpt.checkpoint.lora import base_of, holds_adapters
from nemo_cpt.checkpoint.nemo_writer import Tensors, write_nemo
from nemo_cpt.checkpoint.trained import Trained, describe, open_trained
from nemo_cpt.corpus.atomic_folders import new_folder
from nemo_cpt.errors import CptError
from nemo_cpt.made import Making
from nemo_cpt.records import AsDict, restored


@dataclass(frozen=True)
class MergeReport(AsDict):
    """What a merge did.

    Attributes:
        source: the checkpoint with the adapters.
        base: what they were merged into.
        dest: the NeMo checkpoint that was made.
        model_type: as config.json names it.
        dtype: of the written weights.
        tensors: how many were written.
        bytes_written: of the weights.
        config_changes: where the config.json in `dest/hf` differs from the base's, in words.
        chat_template: the name of the one that `dest/hf` carries because the run was tuned on it.
        warnings: what could not be looked at.
        seconds: wall time.
        status: `written`, or `unchanged` where the same was there already.
    """

    source: str
    base: str
    dest: str
    model_type: str
    dtype: str
    tensors: int
    bytes_written: int
    config_changes: tuple[str, ...]
    chat_template: str | None
    warnings: tuple[str, ...]
    seconds: float
    status: str = "written"


@checked
def merge(
    source: str | Path,
    dest: str | Path,
    base: str | Path | None = None,
    *,
    dtype: str | None = None,
    ignore_fields: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge a LoRA or DoRA run's adapters into its base, as a NeMo checkpoint that another training can start from.

    The result is what `import_hf` makes of what `export_hf` makes of the run, byte for byte, in one pass: with the
    small files of the base, or those of a model that was tuned on a chat template.

    Args:
        source: the run's checkpoint.
        dest: the checkpoint's folder; one that this very merge made is left as it is.
        base: the base's Hugging Face folder or imported checkpoint; by default the one that the run recorded.
        dtype: "bfloat16", "float16" or "float32"; by default what the base's config.json says.
        ignore_fields: config fields to accept although they are unknown here.
        progress: called with (bytes done, bytes in all) after each group of tensors.

    Raises:
        CptError: `source` holds no adapters; whatever `export_hf` refuses. Nothing is left at `dest` then.
    """
    start = time.monotonic()
    check_options(dtype)
    nemo = nemo_folder(source)
    check_dest(dest, nemo, base)
    if not holds_adapters(nemo):
        raise CptError(f"{nemo} holds the whole model, not adapters: give it as the base of a training as it is.")
    making = Making("merge", inputs_of(nemo, base), {"dtype": dtype, "ignore_fields": sorted(ignore_fields)})
    if found := making.done(Path(dest)):
        return restored(MergeReport, found, source=str(source), dest=str(dest), status="unchanged")
    with unchanged(nemo) as check_unchanged:
        # Through the same descriptions as an export, so that both make one model of a run.
        described = describe(nemo, base, None, ignore_fields)
        trained = open_trained(nemo, described, base)
        dtype = checked_dtype(dtype or described.config.arch.dtype or trained.dtype)
        arch = described.config.arch.with_dtype(dtype)
        shapes = {slot.name: slot.shape for slot in layout.slots(arch)}
        tensors = _in_dtype(trained, dtype, shapes)
        size = sum(map(tensors.nbytes, shapes))
        with new_folder(dest, size) as folder:
            described.write(folder / HF_FOLDER, dtype, in_checkpoint=True)
            write_nemo(folder, tensors, arch, progress)
            report = MergeReport(
                source=str(source),
                base=str(base_of(nemo, base)),
                dest=str(dest),
                model_type=arch.model_type,
                dtype=dtype,
                tensors=len(shapes),
                bytes_written=size,
                config_changes=described.config.with_dtype(dtype).changes,
                chat_template=described.template.name if described.template else None,
                warnings=(*described.config.warnings, *trained.warnings),
                seconds=round(time.monotonic() - start, 3),
            )
            making.note(folder, report.as_dict())
            # Before the folder gets its name: a run may have replaced the checkpoint while it was read.
            check_unchanged()
    return report


def check_options(dtype: str | None) -> None:
    """Check the options of `merge` that need no checkpoint.

    Raises:
        CptError: weights cannot be written in the dtype.
    """
    if dtype is not None:
        checked_dtype(dtype)


def _in_dtype(trained: Trained, dtype: str, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    def blocks(name: str) -> Iterator[np.ndarray]:
        return (cast(block, name, dtype) for block in trained.blocks(name))

    return Tensors(
        read=lambda name: cast(trained.read(name), name, dtype),
        blocks=blocks,
        path=lambda name: trained.where,
        nbytes=lambda name: prod(shapes[name]) * DTYPES[dtype].itemsize,
    )
