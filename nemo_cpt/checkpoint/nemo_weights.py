"""A NeMo checkpoint's weights seen as Hugging Face tensors, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import Architecture
from nemo_cpt.checkpoint.distributed import DistributedReader
from nemo_cpt.errors import CptError

if TYPE_CHECKING:
    import torch


class NemoWeights:
    """The tensors of a NeMo checkpoint under their Hugging Face names.

    Works for imported and for training checkpoints (whose optimizer state is passed over), from any tensor and pipeline
    parallel size, with layers stacked into one tensor or kept apart.

    Raises:
        CptError: a tensor is missing, or has another shape than `arch` says.
    """

    def __init__(self, nemo: Path, arch: Architecture) -> None:
        self.folder = nemo
        self._arch = arch
        self._reader = DistributedReader(nemo / "weights")
        self._slots = {slot.name: slot for slot in layout.slots(arch)}
        self._joined: tuple[str, dict[str, torch.Tensor]] = ("", {})
        prefix = next((key.partition(layout.EMBEDDING)[0] for key in self._reader.shapes if _is_embedding(key)), None)
        if prefix is None:
            raise CptError(f"{nemo} holds no word embeddings: it is not a language model's checkpoint.")
        self._prefix = prefix
        for slot in self._slots.values():
            self._check(slot)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, and so of the model's parameters."""
        return self._reader.dtypes[self._prefix + layout.EMBEDDING]

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, Megatron's padding included."""
        return self._reader.shapes[self._prefix + layout.EMBEDDING][0]

    def slot(self, name: str) -> layout.Slot:
        """Where the tensor of this Hugging Face name lies."""
        return self._slots[name]

    def _locate(self, slot: layout.Slot) -> tuple[str, int | None]:
        key = self._prefix + slot.key
        if slot.layer is None or key in self._reader.shapes:
            return key, slot.layer
        return key.replace(layout.LAYERS, f"{layout.LAYERS}{slot.layer}."), None

    def _check(self, slot: layout.Slot) -> None:
        key, layer = self._locate(slot)
        if key not in self._reader.shapes:
            raise CptError(f"{self.folder} lacks {key}. It is another model's checkpoint than config.json describes.")
        shape = self._reader.shapes[key]
        if layer is not None and shape[0] != self._arch.num_hidden_layers:
            raise CptError(f"{self.folder}: {key} has {shape[0]} layers, config.json {self._arch.num_hidden_layers}.")
        found = shape if layer is None else shape[1:]
        rows = self._rows(slot)
        enough = found[0] >= rows if slot.part == "vocab" else found[0] == rows
        if not enough or found[1:] != slot.shape[1:]:
            raise CptError(
                f"{self.folder}: {key} has shape {found}, config.json asks for {(rows, *slot.shape[1:])}. "
                "Give as base the model from which this checkpoint was trained."
            )

    def _rows(self, slot: layout.Slot) -> int:
        arch = self._arch
        if slot.part in ("q", "k", "v"):
            return (arch.num_attention_heads + 2 * arch.num_key_value_heads) * arch.head_dim
        return slot.shape[0] * (2 if slot.part in ("gate", "up") else 1)

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its Hugging Face name, in the checkpoint's dtype, without padding."""
        slot = self._slots[name]
        key, layer = self._locate(slot)
        rows = slot.shape[0]
        if slot.part in ("q", "k", "v"):
            return self._read_joined(key, layer).pop(slot.part)
        start = rows if slot.part == "up" else 0
        return self._reader.read(key, layer, (start, start + rows))

    def _read_joined(self, key: str, layer: int | None) -> dict[str, torch.Tensor]:
        label = f"{key} {layer}"
        if self._joined[0] != label or not self._joined[1]:
            self._joined = (label, layout.split_qkv(self._reader.read(key, layer), self._arch))
        return self._joined[1]


def _is_embedding(key: str) -> bool:
    return key.endswith(layout.EMBEDDING) and not key.startswith("optimizer")
