"""A NeMo checkpoint, written from tensors with Hugging Face names, of which one joined group is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import Architecture
from nemo_cpt.checkpoint.arrays import check_finite
from nemo_cpt.checkpoint.context import HF_FOLDER, TOKENIZER_FOLDER, write_context
from nemo_cpt.checkpoint.provenance import hand_on
from nemo_cpt.checkpoint.weight_sums import WeightSums

if TYPE_CHECKING:
    from nemo_cpt.checkpoint.distributed_writer import DistributedWriter


@dataclass(frozen=True)
class Tensors:
    """Where the tensors of a model come from, by their Hugging Face names.

    Attributes:
        read: gives a tensor whole.
        blocks: gives it in blocks of rows; a block is overwritten by the next one.
        path: the file or folder that it lies in, for messages.
        nbytes: its size as it is written.
    """

    read: Callable[[str], np.ndarray]
    blocks: Callable[[str], Iterable[np.ndarray]]
    path: Callable[[str], Path]
    nbytes: Callable[[str], int]


def write_nemo(
    folder: Path, tensors: Tensors, arch: Architecture, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write `weights`, `context` and the tensors' checksums into a folder that has the model's small files in `hf`.

    Args:
        folder: of the checkpoint.
        tensors: all that `arch` has.
        arch: the model; its dtype has to be set.
        progress: called with (bytes done, bytes in all) after each group of joined tensors.

    Raises:
        CptError: a weight is NaN or infinite.
    """
    sums = _write_weights(folder / "weights", tensors, arch, progress or (lambda done, total: None))
    write_context(folder / "context", arch, folder / HF_FOLDER)
    hand_on(folder / HF_FOLDER, folder / "context" / TOKENIZER_FOLDER)
    # Beside the small files, which NeMo copies into each checkpoint of a training, this one with them.
    sums.write(folder / HF_FOLDER)


def _write_weights(
    folder: Path, tensors: Tensors, arch: Architecture, progress: Callable[[int, int], None]
) -> WeightSums:
    from nemo_cpt.checkpoint.distributed_writer import DistributedWriter

    slots = layout.slots(arch)
    total = sum(tensors.nbytes(slot.name) for slot in slots)
    done, sums = 0, WeightSums()
    with DistributedWriter(folder) as writer:
        # So that groupby finds what Megatron joins (q, k and v; gate and up); what is outside the layers comes first.
        ordered = sorted(slots, key=lambda slot: (slot.layer is not None, slot.layer or 0, slot.key))
        for _, group in groupby(ordered, key=lambda slot: (slot.layer, slot.key)):
            members = list(group)
            _write_group(writer, tensors, members, arch, sums)
            done += sum(tensors.nbytes(slot.name) for slot in members)
            progress(done, total)
        _write_extra_states(writer, arch)
    return sums


def _write_group(
    writer: DistributedWriter, tensors: Tensors, slots: Sequence[layout.Slot], arch: Architecture, sums: WeightSums
) -> None:
    first = slots[0]
    # Interleaved by query group in Megatron, so all three are needed at once.
    if first.part == "q":
        parts = {slot.part: tensors.read(slot.name) for slot in slots}
        for slot in slots:
            check_finite(parts[slot.part], slot.name, tensors.path(slot.name))
            sums.add(slot.name, parts[slot.part])
        merged = layout.merge_qkv(parts, arch)
        _add(writer, first, merged, merged.shape, 0, arch)
        return
    if first.part in layout.TURNED:
        tensor = tensors.read(first.name)
        check_finite(tensor, first.name, tensors.path(first.name))
        sums.add(first.name, tensor)
        turned = layout.to_megatron(first, tensor, arch)
        _add(writer, first, turned, turned.shape, 0, arch)
        return
    row = 0
    # Gate and up stand one above the other: each is written at its row as it comes.
    shape = (sum(slot.shape[0] for slot in slots), *first.shape[1:])
    for slot in slots:
        for block in tensors.blocks(slot.name):
            check_finite(block, slot.name, tensors.path(slot.name))
            sums.add(slot.name, block)
            _add(writer, slot, block, shape, row, arch)
            row += block.shape[0]


def _add(
    writer: DistributedWriter,
    slot: layout.Slot,
    tensor: np.ndarray,
    shape: tuple[int, ...],
    row: int,
    arch: Architecture,
) -> None:
    offset = (row, *[0] * (len(shape) - 1))
    # Megatron saves the layers of one kind as one tensor, [layers, ...], of which this is a slice.
    if slot.layer is not None:
        shape, offset = (arch.num_hidden_layers, *shape), (slot.layer, *offset)
    writer.add(layout.PREFIX + slot.key, tensor, shape, offset)


def _write_extra_states(writer: DistributedWriter, arch: Architecture) -> None:
    layers = arch.num_hidden_layers
    for layer in range(layers):
        for module in layout.extra_state_modules(arch):
            # Without them Transformer Engine's strict load ends with a missing key; empty ones mean no fp8 scales.
            writer.add_empty_state(f"{layout.PREFIX}{layout.LAYERS}{module}._extra_state/shard_{layer}_{layers}")
    writer.add_empty_state(f"{layout.PREFIX}decoder.final_layernorm._extra_state/shard_0_1")
