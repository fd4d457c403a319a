"""A NeMo checkpoint's weights seen as Hugging Face tensors, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import Architecture
from nemo_cpt.checkpoint.distributed_reader import DistributedReader
from nemo_cpt.errors import CptError


class NemoWeights:
    """The tensors of a NeMo checkpoint under their Hugging Face names.

    Works for imported and for training checkpoints (whose optimizer state is passed over), from any tensor and pipeline
    parallel size, with layers stacked into one tensor or kept apart.

    Args:
        nemo: the checkpoint's folder.
        arch: the model whose tensors they are.
        partial: whether tensors may be missing, as in a LoRA run's checkpoint, which holds what was trained.

    Raises:
        CptError: a tensor is missing, or has another shape than `arch` says.
    """

    def __init__(self, nemo: Path, arch: Architecture, partial: bool = False) -> None:
        self.folder = nemo
        self.arch = arch
        self.reader = DistributedReader(nemo / "weights")
        self._slots = {slot.name: slot for slot in layout.slots(arch)}
        self._layer: int | None = None
        self._parts: dict[tuple[str, str], np.ndarray] = {}  # of this layer's joined tensors, those not asked for yet
        self.prefix = _prefix(self.reader, nemo)
        for slot in self._slots.values():
            if not partial or self.has(slot.name):
                self._check(slot)

    @property
    def dtype(self) -> str:
        """The dtype of the embedding, and so of the model's parameters: "bfloat16", "float16" or "float32"."""
        return self.reader.dtypes[self.prefix + layout.EMBEDDING].name

    @property
    def all_dtypes(self) -> list[str]:
        """The dtypes of all tensors, each once."""
        keys = {self.locate(slot.key, slot.layer)[0] for slot in self._slots.values() if self.has(slot.name)}
        return sorted({self.reader.dtypes[key].name for key in keys})

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, Megatron's padding included."""
        return self.reader.shapes[self.prefix + layout.EMBEDDING][0]

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds this Hugging Face tensor."""
        slot = self._slots[name]
        return self.reader.has(*self.locate(slot.key, slot.layer))

    def locate(self, key: str, layer: int | None) -> tuple[str, int | None]:
        """The full name of a Megatron tensor, and the index of the layer in it; None where layers are kept apart."""
        return locate(self.reader, self.prefix + key, layer)

    def _check(self, slot: layout.Slot) -> None:
        # Shapes are in the metadata: all of them are compared before the first byte of a tensor is read.
        key, layer = self.locate(slot.key, slot.layer)
        if key not in self.reader.shapes:
            raise CptError(f"{self.folder} lacks {key}. It is another model's checkpoint than config.json describes.")
        if key not in self.reader.dtypes:
            raise CptError(f"{self.folder}: {key} is not of bfloat16, float16 or float32; such weights are not read.")
        shape = self.reader.shapes[key]
        if layer is not None and shape[0] != self.arch.num_hidden_layers:
            raise CptError(f"{self.folder}: {key} has {shape[0]} layers, config.json {self.arch.num_hidden_layers}.")
        found = shape if layer is None else shape[1:]
        rows, *rest = self._expected(slot)
        if slot.part == "vocab" and found[0] < rows and found[1:] == slot.shape[1:]:
            raise CptError(
                f"{self.folder}: {key} has {found[0]} rows, config.json asks for {rows}: the model was trained without "
                f"the base's last rows. Give as base the model from which it was trained; if it is that one, train "
                f"again from it with model.config.vocab_size={rows}."
            )
        # Megatron pads the vocabulary for tensor parallelism; every other size is exact.
        enough = found[0] >= rows if slot.part == "vocab" else found[0] == rows
        if not enough or found[1:] != tuple(rest):
            raise CptError(
                f"{self.folder}: {key} has shape {found}, config.json asks for {(rows, *rest)}. "
                "Give as base the model from which this checkpoint was trained."
            )

    def _expected(self, slot: layout.Slot) -> tuple[int, ...]:
        """The shape of the Megatron tensor that a tensor is a part of, without layers and padding."""
        arch, (rows, *rest) = self.arch, slot.shape
        if slot.part in layout.TURNED:
            return slot.shape[::-1]
        if slot.part in ("q", "k", "v"):
            return (arch.num_attention_heads + 2 * arch.num_key_value_heads) * arch.head_dim, *rest
        return rows * (2 if slot.part in ("gate", "up") else 1), *rest

    def read(self, name: str) -> np.ndarray:
        """One tensor by its Hugging Face name, in the checkpoint's dtype, without padding."""
        slot = self._slots[name]
        if slot.part in ("q", "k", "v"):
            return self._read_part(slot)
        if slot.part in layout.TURNED:
            return layout.from_megatron(slot, self.reader.read(*self.locate(slot.key, slot.layer)), self.arch)
        return self.reader.read(*self.locate(slot.key, slot.layer), slot.rows)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The same tensor in blocks of rows; a block is overwritten by the next one."""
        slot = self._slots[name]
        if slot.part in ("q", "k", "v", *layout.TURNED):
            yield self.read(name)
        else:
            yield from self.reader.blocks(*self.locate(slot.key, slot.layer), *slot.rows)

    def _read_part(self, slot: layout.Slot) -> np.ndarray:
        # q, k and v are asked for one after the other: their joined tensor is read once, and kept for one layer.
        if slot.layer != self._layer:
            self._layer, self._parts = slot.layer, {}
        if (slot.key, slot.part) not in self._parts:
            joined = self.reader.read(*self.locate(slot.key, slot.layer))
            self._parts |= {(slot.key, part): piece for part, piece in layout.split_qkv(joined, self.arch).items()}
        # Popped: each is asked for once, and a layer's three would double the peak.
        return self._parts.pop((slot.key, slot.part))


def locate(reader: DistributedReader, full: str, layer: int | None) -> tuple[str, int | None]:
    """The name of a layer's tensor and the index of the layer in it; None where layers are kept apart."""
    if layer is None or full in reader.shapes:
        return full, layer
    return full.replace(layout.LAYERS, f"{layout.LAYERS}{layer}."), None


def _prefix(reader: DistributedReader, nemo: Path) -> str:
    # `module.`, say; the optimizer's states repeat the names behind a longer one.
    prefixes = [key.partition(layout.LAYERS)[0] for key in reader.shapes if layout.LAYERS in key]
    models = [prefix for prefix in prefixes if "optimizer" not in prefix]
    if not models:
        raise CptError(f"{nemo} holds no decoder layers: it is not a language model's checkpoint.")
    # A run of adapters has several wrappers' names; the shortest is the model's own.
    return min(models, key=len)
