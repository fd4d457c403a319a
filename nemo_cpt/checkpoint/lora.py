"""LoRA and DoRA runs: their checkpoints hold adapters only; these are merged into the base, or written for PEFT.

NeMo puts one adapter on a joined linear layer, so its `linear_in` [rank, in] serves query, key and value (or gate and
up) alike and its `linear_out` [out, rank] is laid out like the layer's weight (nemo/collections/llm/peft/lora.py). So
is DoRA's `weight_magnitude` [out], the norms that the rows of the weight with its update are given (dora.py there).
"""

from __future__ import annotations

import glob
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
from nemo_cpt.checkpoint.folders import ADAPTER
from nemo_cpt.checkpoint.model_config import fiddle_call
from nemo_cpt.checkpoint.nemo_weights import NemoWeights
from nemo_cpt.checkpoint.safetensors_files import HFWeights, TensorPlan, write_weights
from nemo_cpt.checkpoint.weight_sums import checked, read_sums, sum_of
from nemo_cpt.checkpoint.weights_digest import are_of_the_base, base_weights_of, weights_digest
from nemo_cpt.errors import CptError
from nemo_cpt.moved import places

ADAPTER_METADATA = "adapter_metadata.json"
NeMoOrHF = NemoWeights | HFWeights
LAST = "-last"  # how a run names its newest checkpoint
# Of nemo.collections.llm.peft's LoRA and DoRA: a context records only what differs from the defaults.
_DEFAULT_ALPHAS = {"LoRA": 32, "DoRA": 64}
_MAGNITUDE = "weight_magnitude"
_PARTS = ("linear_in.weight", "linear_out.weight", _MAGNITUDE)
_HEAD = layout.HEAD.removesuffix(".weight")
_PEFT_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}  # of an `Update`


def holds_adapters(nemo: Path) -> bool:
    """Whether a checkpoint was written by a LoRA or DoRA run, and so holds adapters instead of the model."""
    return (nemo / "weights" / ADAPTER_METADATA).is_file()


def recorded_base(nemo: Path) -> Path | None:
    """The NeMo checkpoint that a run of adapters started from, where it recorded it; None when that is gone.

    Where a project was moved, or is seen from another folder, it is looked for at the same place beside the run, and in
    the other runs; it is taken for the base if it has the base's weights.
    """
    recorded = Path(str(read_json(nemo / "weights" / ADAPTER_METADATA).get("model_ckpt_path")))
    # NeMo records the folder of the weights, or the checkpoint's own.
    folder = recorded.parent if recorded.name == "weights" else recorded
    there = folder if (folder / "weights").is_dir() else None
    if (began_with := base_weights_of(nemo)) is None or (there and weights_digest(there) == began_with):
        return there
    found = (each for each in _elsewhere(folder, nemo) if (each / "weights").is_dir())
    return next((each for each in found if weights_digest(each) == began_with), there)


def _elsewhere(recorded: Path, nemo: Path) -> Iterator[Path]:
    """What may be the recorded base of a checkpoint, where the project was moved, or the base's run renamed."""
    # A run's `-last` is a link, which is gone when the run has saved the next one.
    for name in dict.fromkeys([recorded.name, recorded.name.removesuffix(LAST)]):
        yield from places(recorded.with_name(name), nemo)
        for runs in list(nemo.absolute().parents)[2:3]:
            yield from runs.glob(f"*/checkpoints/{glob.escape(name)}")


def base_of(nemo: Path, base: str | Path | None) -> Path:
    """The base that is given, or the one that a run of adapters recorded; CptError where that is gone."""
    found = Path(base) if base else recorded_base(nemo)
    if found is None:
        recorded = read_json(nemo / "weights" / ADAPTER_METADATA).get("model_ckpt_path")
        raise CptError(
            f"{nemo} holds adapters only and its base is gone from {recorded}. Give base=, the model it started from."
        )
    return found


@dataclass(frozen=True)
class Update:
    """What a run made of a tensor: weight + scale * b @ a; with DoRA, each row of that at a norm of its own.

    Attributes:
        a: [rank, in].
        b: [out, rank].
        scale: alpha / rank.
        magnitude: the rows' norms, [out]; None where LoRA left them alone.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    def applied_to(self, weight: np.ndarray) -> np.ndarray:
        """The trained weight, in fp32."""
        merged = self._direction(weight)
        if self.magnitude is not None:
            merged *= self._row_scales(merged)[:, None]
        return merged

    def row_scales(self, weight: np.ndarray) -> np.ndarray:
        """What DoRA multiplies the layer's outputs by, its bias included, [out] in fp32."""
        return self._row_scales(self._direction(weight))

    def _direction(self, weight: np.ndarray) -> np.ndarray:
        a, b = self.a.astype(np.float32), self.b.astype(np.float32)
        # In fp32, and cast once at the end: sums in bf16 would round the update away.
        merged = weight.astype(np.float32)
        merged += np.float32(self.scale) * (b @ a)
        return merged

    def _row_scales(self, direction: np.ndarray) -> np.ndarray:
        """In the magnitudes' dtype, as NeMo has them: rows that were not trained keep a scale of exactly 1."""
        assert self.magnitude is not None
        norms = np.linalg.norm(direction, axis=1).astype(self.magnitude.dtype)
        return (self.magnitude / norms).astype(np.float32)


class Adapters:
    """The adapters of a checkpoint, by the name of the Hugging Face tensor that they adapt.

    Raises:
        CptError: the run used another method than LoRA and DoRA, or adapted layers that have no Hugging Face
            counterpart, or GPT-2's.
    """

    def __init__(self, nemo: Path, arch: Architecture) -> None:
        if arch.like_gpt2:
            raise CptError(f"{nemo} holds adapters on GPT-2's layers, which cannot be exported: train every parameter.")
        self.nemo, self.arch = nemo, arch
        # Partial: the frozen tensors are not in the checkpoint.
        self._weights = NemoWeights(nemo, arch, partial=True)
        self._slots = {slot.name: slot for slot in layout.slots(arch)}
        # By which a base of the same shape, or another revision of it, is told from the right one.
        carried = read_sums(carried_places(nemo))
        self._sums = carried if carried and are_of_the_base(carried, nemo) else None
        self._before = {} if self._sums or not carried else carried
        self.alpha = _alpha(nemo)
        self.adapted = [name for name in self._slots if self._has(name)]
        # A LoRA run's checkpoint holds what was trained: adapters, and whole the tensors that were trained beside them.
        self.trained_whole = [name for name in self._slots if self._weights.has(name)]
        self._refuse_others()
        _refuse_unpatched(self._weights, nemo)
        if not self.adapted:
            raise CptError(f"{nemo} holds no adapters on linear_qkv, linear_proj, linear_fc1 or linear_fc2.")

    def check_base(self, base: NeMoOrHF) -> tuple[str, ...]:
        """Compare a base with the one that was adapted; its tensors are compared as they are read, with sums of them.

        Returns:
            A warning where it cannot be known.

        Raises:
            CptError: it is another one.
        """
        if self._sums:
            return ()
        began_with, is_nemo = base_weights_of(self.nemo), (base.folder / "weights").is_dir()
        if began_with and is_nemo and weights_digest(base.folder) == began_with:
            return ()
        if (began_with and is_nemo) or self._is_before(base):
            raise CptError(
                f"{base.folder} is not what the adapters of {self.nemo} were trained on: it has other weights. Give "
                "base=, the one that the run started from."
            )
        if began_with is None:
            return (f"{self.nemo} does not know its base's weights: they were taken on trust",)
        return (f"{self.nemo} knows its base's weights as a NeMo checkpoint alone: {base.folder} was taken on trust",)

    def _is_before(self, base: NeMoOrHF) -> bool:
        """Whether it is the model that the base was trained from, which its checkpoint carries the sums of."""
        name = self.adapted[0]
        return name in self._before and sum_of(base.read(name)) == self._before[name]

    def _has(self, name: str, part: str = "linear_in.weight") -> bool:
        slot = self._slots[name]
        # Biases and norms have no adapters.
        if not slot.key.endswith(".weight"):
            return False
        return self._weights.reader.has(*self._weights.locate(_adapter_key(slot, part), slot.layer))

    def _refuse_others(self) -> None:
        """Refuse an adapter that no tensor of the model would be merged with."""
        slots, weights = [self._slots[name] for name in self.adapted], self._weights
        known = {weights.locate(_adapter_key(slot, part), slot.layer)[0] for slot in slots for part in _PARTS}
        for key in weights.reader.shapes:
            # The optimizer's states repeat the names behind their own.
            if ".adapter." in key and key.startswith(weights.prefix) and "optimizer" not in key and key not in known:
                raise CptError(
                    f"{self.nemo}: {key} belongs to another method than LoRA and DoRA (canonical LoRA, experts), or to "
                    "the head of a model whose embedding it is, which cannot be exported."
                )

    @property
    def rank(self) -> int:
        """The rank of the adapters."""
        return self.update(self.adapted[0]).a.shape[0]

    @property
    def dora(self) -> bool:
        """Whether the rows have norms of their own."""
        return any(self._has(name, _MAGNITUDE) for name in self.adapted)

    @property
    def trained_rows(self) -> int | None:
        """Rows of the embedding, or of the head, where the run trained them whole, Megatron's padding included."""
        for name in self.trained_whole:
            if self._slots[name].part == "vocab":
                return self._weights.reader.shapes[self._weights.prefix + self._slots[name].key][0]
        return None

    def update(self, name: str) -> Update:
        """What the run made of one tensor."""
        slot = self._slots[name]
        a, b = (self._read(slot, f"{side}.weight") for side in ("linear_in", "linear_out"))
        magnitude = self._part(slot, self._read(slot, _MAGNITUDE)) if self._has(name, _MAGNITUDE) else None
        return Update(a, self._part(slot, b), self.alpha / a.shape[0], magnitude)

    def _read(self, slot: layout.Slot, part: str) -> np.ndarray:
        return self._weights.reader.read(*self._weights.locate(_adapter_key(slot, part), slot.layer))

    def _part(self, slot: layout.Slot, joined: np.ndarray) -> np.ndarray:
        # NeMo adapts Megatron's joined tensors: `a` is shared by their parts, `b` has the rows of all of them.
        if slot.part in ("q", "k", "v"):
            return layout.split_qkv(joined, self.arch)[slot.part]
        return joined[slice(*slot.rows)]

    def read_merged(self, name: str, base: NeMoOrHF) -> np.ndarray:
        """One tensor of the adapted model: what the run trained, or the base's, with its update."""
        if name in self.trained_whole:
            tensor = self._weights.read(name)
        else:
            (tensor,) = checked(name, [base.read(name)], self._sums, base.folder)
        if self._has(name):
            return self.update(name).applied_to(tensor)
        # DoRA scales a layer's whole output, and Megatron's layers have added their bias by then.
        if self._scales_bias(name):
            weight = self._weight_of(name)
            return tensor.astype(np.float32) * self.update(weight).row_scales(base.read(weight))
        return tensor

    def merged(self, name: str, base: NeMoOrHF) -> Iterator[np.ndarray]:
        """The same in blocks of rows; a block is overwritten by the next one."""
        # Whole: an update is a product over all rows, and DoRA's norms need the whole row.
        if self._has(name) or self._scales_bias(name):
            yield self.read_merged(name, base)
        elif name in self.trained_whole:
            yield from self._weights.blocks(name)
        else:
            yield from checked(name, base.blocks(name), self._sums, base.folder)

    def _scales_bias(self, name: str) -> bool:
        """Whether it is the bias of a layer whose outputs DoRA scales: Megatron adds the bias before that."""
        return name.endswith(".bias") and self._has(self._weight_of(name), _MAGNITUDE)

    def _weight_of(self, bias: str) -> str:
        return f"{bias.removesuffix('.bias')}.weight"


def _adapter_key(slot: layout.Slot, part: str) -> str:
    return f"{slot.key.removesuffix('.weight')}.adapter.{part}"


def _refuse_unpatched(weights: NemoWeights, nemo: Path) -> None:
    """Refuse DoRA that plain NeMo trained at a tensor-parallel size above 1, where it is no method (`dora_patches`).

    It is seen by the pieces of linear_fc1's magnitudes: one a rank, where a patched NeMo cuts them as `linear_out`.
    """
    for key in weights.reader.shapes:
        if layout.FC1 in key and key.endswith(f".adapter.{_MAGNITUDE}"):
            pieces = weights.reader.pieces(key, -1)
            # One piece a rank against two (gate and up): the patched order has as many of either.
            if 1 < pieces < weights.reader.pieces(key.replace(_MAGNITUDE, "linear_out.weight"), -2):
                raise CptError(
                    f"{nemo} was trained with DoRA on {pieces} tensor-parallel ranks, which NeMo 2.7 gets wrong where "
                    "this library does not patch it (nemo_cpt/training/dora_patches.py): each rank had other "
                    "magnitudes, and one rank's were saved. Train again by this library's recipes, or with LoRA."
                )


def _alpha(nemo: Path) -> float:
    """The scale that the run's context records for its adapters."""
    path = nemo / "context" / "io.json"
    transform = fiddle_call(read_json(path), "<root>.model.model_transform")
    if not transform:
        raise CptError(
            f"{path} does not say how the adapters are scaled: it has no model.model_transform. "
            "The training could not save its context; save the checkpoint again with it."
        )
    # Our own classes are NeMo's beside an embedding that is trained; their alpha is NeMo's.
    kind = transform["_target_"].rpartition(".")[2].removesuffix("WithEmbeddings")
    alpha = transform.get("alpha", _DEFAULT_ALPHAS.get(kind))
    if alpha is None:
        raise CptError(f"{path} names adapters of the class {kind}, and not their alpha, whose default is not known.")
    return float(alpha)


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
    if adapters.dora and adapters.arch.qkv_bias:
        raise CptError(
            "NeMo's DoRA scales the biases of query, key and value, peft's does not: an adapter would be another "
            "model. Export the merged model instead."
        )
    plans, loads = [], {}
    for name in adapters.adapted:
        update = adapters.update(name)
        for part, field in _PEFT_PARTS.items():
            if (tensor := getattr(update, field)) is not None:
                full = f"base_model.model.{name.removesuffix('.weight')}.{part}"
                plans.append(TensorPlan(full, dtype, tensor.shape))
                loads[full] = (name, field)

    def load(full: str) -> Iterator[np.ndarray]:
        name, field = loads[full]
        tensor: np.ndarray = getattr(adapters.update(name), field)
        check_finite(tensor, full, folder)
        yield tensor

    # peft reads one file alone.
    write_weights(folder, plans, load, shard_bytes=2**62)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = _peft_config(adapters, base_name)
    (folder / ADAPTER).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return [ADAPTER, "adapter_model.safetensors"]


def _peft_config(adapters: Adapters, base_name: str) -> dict[str, Any]:
    paths = [name.removesuffix(".weight").removeprefix("model.layers.") for name in adapters.adapted]
    layers = sorted({int(path.partition(".")[0]) for path in paths if path != _HEAD})
    modules = sorted({path.rpartition(".")[2] for path in paths})
    # Not the same modules in each layer: layer by layer, in full.
    if len(paths) != len(layers) * len(modules):
        # peft matches these as the ends of module names.
        modules = sorted(path if path == _HEAD else f"layers.{path}" for path in paths)
    # None means all layers to peft, which is what a recipe usually adapts.
    everywhere = len(layers) == adapters.arch.num_hidden_layers
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "target_modules": modules,
        "layers_to_transform": None if everywhere or any("layers." in each for each in modules) else layers,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": adapters.dora,
        "use_rslora": False,
    }
