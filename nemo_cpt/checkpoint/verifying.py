"""Is a NeMo checkpoint the same model as a Hugging Face folder? Bit by bit, then by what both compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import Architecture, read_architecture
from nemo_cpt.checkpoint.arrays import bits, cast
from nemo_cpt.checkpoint.base import base_weights, nemo_folder
from nemo_cpt.checkpoint.nemo_weights import NemoWeights
from nemo_cpt.checkpoint.safetensors_files import HFWeights
from nemo_cpt.errors import CptError

PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "日本の首都は")
_LOGITS_TOLERANCE = 1e-5  # fp32, relative to the largest logit
_COMPARED_AT_ONCE = 2**24  # values of a tensor that differs, for their fp32 copies
_LOGITS_UP_TO = 2_000_000_000  # parameters; above, two fp32 copies of the model do not fit into ordinary memory

Read = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Difference:
    """One tensor that differs: how many of its values, and by how much at most."""

    name: str
    values: int
    of: int
    largest: float


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of a comparison; `logits_difference` is None where logits were not compared."""

    nemo: str
    hf: str
    tensors: int
    differences: tuple[Difference, ...]
    logits_difference: float | None
    largest_logit: float | None
    seconds: float

    @property
    def identical(self) -> bool:
        """Whether all bits agree, and the logits where they were compared."""
        if self.differences:
            return False
        if self.logits_difference is None or self.largest_logit is None:
            return True
        return self.logits_difference <= _LOGITS_TOLERANCE * max(1.0, self.largest_logit)

    def as_dict(self) -> dict[str, Any]:
        """The report as a JSON-serialisable dict."""
        return {"identical": self.identical, **asdict(self)}


def verify(
    nemo: str | Path,
    hf: str | Path,
    base: str | Path | None = None,
    *,
    logits: bool | None = None,
    prompts: Sequence[str] = PROMPTS,
    ignore_fields: Collection[str] = (),
) -> VerifyReport:
    """Compare a NeMo checkpoint with a Hugging Face folder.

    Every tensor bit by bit, one at a time; then the logits of NeMo's and transformers' models in fp32 on the CPU. A
    LoRA run's checkpoint stands for its adapters merged into the base, as `export_hf` writes them; without logits.

    Args:
        nemo: a NeMo checkpoint.
        hf: a Hugging Face folder with weights and tokenizer.
        base: the base of a LoRA run, imported or Hugging Face's; by default the one that the run recorded.
        logits: whether to compare logits; None does so up to 2 billion parameters (both models are held in fp32).
        prompts: texts whose logits are compared.
        ignore_fields: config fields to accept although they are unknown here.

    Raises:
        CptError: either side is damaged, or they are different models altogether (other shapes or names).
    """
    from nemo_cpt.checkpoint.lora import is_lora

    start = time.monotonic()
    folder, hf = nemo_folder(nemo), Path(hf)
    arch = read_architecture(hf, ignore_fields)
    lora, theirs = is_lora(folder), HFWeights(hf)
    if lora and logits:
        raise CptError(f"{folder} holds adapters only; their logits are not compared. Leave --logits away.")
    read = _merged(folder, arch, theirs, base) if lora else NemoWeights(folder, arch).read
    slots = layout.slots(arch)
    found = [_compare(slot, read, theirs) for slot in slots]
    differences = tuple(difference for difference in found if difference)
    parameters = sum(prod(slot.shape) for slot in slots)
    gap, largest = None, None
    if logits or (logits is None and not lora and parameters <= _LOGITS_UP_TO):
        gap, largest = _compare_logits(folder, hf, prompts)
    return VerifyReport(str(nemo), str(hf), len(slots), differences, gap, largest, round(time.monotonic() - start, 3))


def _merged(nemo: Path, arch: Architecture, theirs: HFWeights, base: str | Path | None) -> Read:
    """Reads what `export_hf` would write of a LoRA run, in the dtype of `theirs`."""
    from nemo_cpt.checkpoint.lora import Adapters, base_of

    adapters, weights = Adapters(nemo, arch), base_weights(base_of(nemo, base), arch)

    def read(name: str) -> np.ndarray:
        return cast(adapters.read_merged(name, weights), name, theirs.infos[name].dtype)

    return read


def _compare(slot: layout.Slot, read: Read, theirs: HFWeights) -> Difference | None:
    if slot.name not in theirs.infos:
        raise CptError(f"{theirs.folder} lacks {slot.name}: config.json and the weights belong to different models.")
    mine, other = read(slot.name), theirs.read(slot.name)
    if mine.shape != other.shape:
        raise CptError(f"{slot.name} has shape {other.shape}, config.json asks for {slot.shape}.")
    if mine.dtype == other.dtype and np.array_equal(bits(mine), bits(other)):
        return None
    rows = max(1, _COMPARED_AT_ONCE * mine.shape[0] // mine.size)
    starts = range(0, mine.shape[0], rows)
    counts, gaps = zip(*(_differ(mine[at : at + rows], other[at : at + rows]) for at in starts), strict=True)
    return Difference(slot.name, sum(counts), mine.size, max(gaps))


def _differ(mine: np.ndarray, other: np.ndarray) -> tuple[int, float]:
    """How many values differ, in bits where the dtypes are the same, and by how much at most."""
    values = mine.astype(np.float32), other.astype(np.float32)
    unequal = bits(mine) != bits(other) if mine.dtype == other.dtype else values[0] != values[1]
    return int(unequal.sum()), float(np.abs(values[0] - values[1]).max())


def _compare_logits(nemo: Path, hf: Path, prompts: Sequence[str]) -> tuple[float, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_cpt.checkpoint.nemo_model import nemo_logits

    tokenizer = AutoTokenizer.from_pretrained(hf)
    ids = [tokens for prompt in prompts if (tokens := tokenizer(prompt)["input_ids"])]
    if not ids:
        raise CptError("The prompts have no tokens; give others.")
    ours = nemo_logits(nemo, ids)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    gap = largest = 0.0
    with torch.no_grad():
        for prompt, mine in zip(ids, ours, strict=True):
            other = model(torch.tensor([prompt])).logits[0]
            gap = max(gap, float((mine[:, : other.shape[1]] - other).abs().max()))
            largest = max(largest, float(other.abs().max()))
    return gap, largest
