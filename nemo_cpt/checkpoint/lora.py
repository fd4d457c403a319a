"""LoRA runs: their checkpoints hold adapters only; these are merged into the base, or written for PEFT.

NeMo puts one adapter on a joined linear layer, so its `linear_in` [rank, in] serves query, key and value (or gate and
up) alike and its `linear_out` [out, rank] is laid out like the layer's weight (nemo/collections/llm/peft/lora.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import Architecture, read_json
from nemo_cpt.checkpoint.arrays import check_finite
from nemo_cpt.checkpoint.base import carried_places
from nemo_cpt.checkpoint.nemo_weights import NemoWeights
from nemo_cpt.checkpoint.safetensors_files import HFWeights, TensorPlan, write_weights
from nemo_cpt.checkpoint.weight_sums import checked, read_sums
from nemo_cpt.errors import CptError

ADAPTER_METADATA = "adapter_metadata.json"
_NEMO_DEFAULT_ALPHA = 32  # nemo.collections.llm.peft.LoRA; a context records only what differs from the defaults


def is_lora(nemo: Path) -> bool:
    """Whether a checkpoint was written by a LoRA run, and so holds adapters instead of the model."""
    return (nemo / "weights" / ADAPTER_METADATA).is_file()


def recorded_base(nemo: Path) -> Path | None:
    """The NeMo checkpoint that a LoRA run started from, as it recorded it; None when that is not there any more."""
    recorded = Path(str(read_json(nemo / "weights" / ADAPTER_METADATA).get("model_ckpt_path")))
    # NeMo records the folder of the weights, or the checkpoint's own.
    folder = recorded.parent if recorded.name == "weights" else recorded
    return folder if (folder / "weights").is_dir() else None


def base_of(nemo: Path, base: str | Path | None) -> Path:
    """The base that is given, or the one that a LoRA run recorded; CptError where that is gone."""
    found = Path(base) if base else recorded_base(nemo)
    if found is None:
        raise CptError(f"{nemo} holds adapters only and its base is gone. Give base=, the model it started from.")
    return found


@dataclass(frozen=True)
class Pair:
    """A tensor's low-rank update, scale * b @ a: `a` is [rank, in], `b` is [out, rank]."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    def merged_into(self, weight: np.ndarray) -> np.ndarray:
        """weight + scale * b @ a, in fp32."""
        a, b = self.a.astype(np.float32), self.b.astype(np.float32)
        # In fp32, and cast once at the end: sums in bf16 would round the update away.
        merged = weight.astype(np.float32)
        merged += np.float32(self.scale) * (b @ a)
        return merged


class Adapters:
    """The adapters of a LoRA run's checkpoint, by the name of the Hugging Face tensor that they adapt.

    Attributes:
        warnings: where the checkpoint does not carry the checksums of its base, with which any other is refused.

    Raises:
        CptError: the run used DoRA or another method, or adapted layers that have no Hugging Face counterpart.
    """

    def __init__(self, nemo: Path, arch: Architecture) -> None:
        self.arch = arch
        self._weights = NemoWeights(nemo, arch, partial=True)
        self._slots = {slot.name: slot for slot in layout.slots(arch)}
        self._sums = read_sums(carried_places(nemo))
        self.warnings: tuple[str, ...] = (
            () if self._sums else (f"{nemo} does not know its base's weights: they were taken on trust",)
        )
        self.alpha = _alpha(nemo)
        self.adapted = [name for name in self._slots if self._has(name)]
        # A LoRA run's checkpoint holds what was trained: adapters, and whole the tensors that were trained beside them.
        self.trained_whole = [name for name in self._slots if self._weights.has(name)]
        _refuse_others(self._weights, nemo)
        if not self.adapted:
            raise CptError(f"{nemo} holds no adapters on linear_qkv, linear_proj, linear_fc1 or linear_fc2.")

    def _has(self, name: str) -> bool:
        slot = self._slots[name]
        if not slot.key.endswith(".weight"):
            return False
        return self._weights.reader.has(*self._weights.locate(_adapter_key(slot, "linear_in"), slot.layer))

    @property
    def rank(self) -> int:
        """The rank of the adapters."""
        return self.pair(self.adapted[0]).a.shape[0]

    @property
    def trained_rows(self) -> int | None:
        """Rows of the embedding, or of the head, where the run trained them whole, Megatron's padding included."""
        for name in self.trained_whole:
            if self._slots[name].part == "vocab":
                return self._weights.reader.shapes[self._weights.prefix + self._slots[name].key][0]
        return None

    def pair(self, name: str) -> Pair:
        """The update of one tensor."""
        slot = self._slots[name]
        a, b = (
            self._weights.reader.read(*self._weights.locate(_adapter_key(slot, side), slot.layer))
            for side in ("linear_in", "linear_out")
        )
        return Pair(a, self._part(slot, b), self.alpha / a.shape[0])

    def _part(self, slot: layout.Slot, joined: np.ndarray) -> np.ndarray:
        # NeMo adapts Megatron's joined tensors: `a` is shared by their parts, `b` has the rows of all of them.
        if slot.part in ("q", "k", "v"):
            return layout.split_qkv(joined, self.arch)[slot.part]
        return joined[slice(*slot.rows)]

    def read_merged(self, name: str, base: NemoWeights | HFWeights) -> np.ndarray:
        """One tensor of the adapted model: what the run trained, or the base's, with its update."""
        if name in self.trained_whole:
            weight = self._weights.read(name)
        else:
            (weight,) = checked(name, [base.read(name)], self._sums, base.folder)
        return self.pair(name).merged_into(weight) if self._has(name) else weight

    def merged(self, name: str, base: NemoWeights | HFWeights) -> Iterator[np.ndarray]:
        """The same in blocks of rows; a block is overwritten by the next one."""
        if self._has(name):
            yield self.read_merged(name, base)
        elif name in self.trained_whole:
            yield from self._weights.blocks(name)
        else:
            yield from checked(name, base.blocks(name), self._sums, base.folder)


def _adapter_key(slot: layout.Slot, side: str) -> str:
    return f"{slot.key.removesuffix('.weight')}.adapter.{side}.weight"


def _refuse_others(weights: NemoWeights, nemo: Path) -> None:
    modules = (layout.QKV, layout.PROJ, layout.FC1, layout.FC2)
    for key in weights.reader.shapes:
        if ".adapter." not in key or not key.startswith(weights.prefix + layout.LAYERS):
            continue
        module, _, side = key.partition(".adapter.")
        if not module.endswith(modules) or side not in ("linear_in.weight", "linear_out.weight"):
            raise CptError(
                f"{nemo}: {key} belongs to another method than LoRA (DoRA, canonical LoRA, experts), which cannot be "
                "exported. Merge it with NeMo's own llm.peft.merge_lora first."
            )


def _alpha(nemo: Path) -> float:
    """The scale that the run's context records for `model.model_transform`."""
    path = nemo / "context" / "io.json"
    for entry in read_json(path).get("objects", {}).values():
        if "<root>.model.model_transform" in entry.get("paths", ()):
            arguments = {key.removeprefix("Attr(name='").removesuffix("')"): value for key, value in entry["items"]}
            return float(arguments.get("alpha", {}).get("value", _NEMO_DEFAULT_ALPHA))
    raise CptError(
        f"{path} does not say how the adapters are scaled: it has no model.model_transform. "
        "The training could not save its context; save the checkpoint again with it."
    )


def write_peft_adapter(folder: Path, adapters: Adapters, base_name: str, dtype: str) -> list[str]:
    """Write adapter_config.json and adapter_model.safetensors as `peft` reads them.

    Args:
        folder: where they go.
        adapters: of the run's checkpoint.
        base_name: the base model's path or repository, for adapter_config.json.
        dtype: of the adapter's tensors.

    Raises:
        CptError: the run trained other tensors as well, or not all parts of a layer, which an adapter cannot hold.
    """
    if adapters.trained_whole:
        raise CptError(
            f"The run also trained {', '.join(adapters.trained_whole[:3])}, which an adapter cannot hold. "
            "Export the merged model instead."
        )
    plans, loads = [], {}
    for name in adapters.adapted:
        pair = adapters.pair(name)
        for side, tensor in (("lora_A", pair.a), ("lora_B", pair.b)):
            full = f"base_model.model.{name.removesuffix('.weight')}.{side}.weight"
            plans.append(TensorPlan(full, dtype, tensor.shape))
            loads[full] = (name, "a" if side == "lora_A" else "b")

    def load(full: str) -> Iterator[np.ndarray]:
        name, side = loads[full]
        tensor: np.ndarray = getattr(adapters.pair(name), side)
        check_finite(tensor, full, folder)
        yield tensor

    # peft reads one file alone.
    write_weights(folder, plans, load, shard_bytes=2**62)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = _peft_config(adapters, base_name)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return ["adapter_config.json", "adapter_model.safetensors"]


def _peft_config(adapters: Adapters, base_name: str) -> dict[str, Any]:
    paths = [name.removesuffix(".weight").removeprefix("model.layers.") for name in adapters.adapted]
    layers = sorted({int(path.partition(".")[0]) for path in paths})
    modules = sorted({path.rpartition(".")[2] for path in paths})
    # Not the same modules in each layer: layer by layer, in full.
    if len(paths) != len(layers) * len(modules):
        modules = sorted("layers." + path for path in paths)  # peft matches these as the ends of module names
    everywhere = len(layers) == adapters.arch.num_hidden_layers
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "target_modules": modules,
        "layers_to_transform": None if everywhere or "layers." in modules[0] else layers,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }
