"""Is a NeMo checkpoint the same model as a Hugging Face folder? Bit by bit, then by what both compute."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import read_architecture
from nemo_cpt.checkpoint.base import nemo_folder
from nemo_cpt.checkpoint.safetensors_files import HFWeights
from nemo_cpt.errors import CptError

if TYPE_CHECKING:
    import torch

PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "日本の首都は")
_LOGITS_TOLERANCE = 1e-5  # fp32, relative to the largest logit
_COMPARED_AT_ONCE = 2**24  # values of a tensor that differs, for their fp32 copies
_LOGITS_UP_TO = 2_000_000_000  # parameters; above, two fp32 copies of the model do not fit into ordinary memory


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
    *,
    logits: bool | None = None,
    prompts: Sequence[str] = PROMPTS,
    ignore_fields: Collection[str] = (),
) -> VerifyReport:
    """Compare a NeMo checkpoint with a Hugging Face folder.

    Every tensor bit by bit, one at a time; then the logits of NeMo's and transformers' models in fp32 on the CPU.

    Args:
        nemo: a NeMo checkpoint.
        hf: a Hugging Face folder with weights and tokenizer.
        logits: whether to compare logits; None does so up to 2 billion parameters (both models are held in fp32).
        prompts: texts whose logits are compared.
        ignore_fields: config fields to accept although they are unknown here.

    Raises:
        CptError: either side is damaged, or they are different models altogether (other shapes or names).
    """
    from nemo_cpt.checkpoint.nemo_weights import NemoWeights

    start = time.monotonic()
    folder, hf = nemo_folder(nemo), Path(hf)
    arch = read_architecture(hf, ignore_fields)
    ours, theirs = NemoWeights(folder, arch), HFWeights(hf)
    slots = layout.slots(arch)
    found = [_compare(slot, ours, theirs) for slot in slots]
    differences = tuple(difference for difference in found if difference)
    parameters = sum(theirs.infos[slot.name].nbytes for slot in slots) // 2
    gap, largest = None, None
    if logits or (logits is None and parameters <= _LOGITS_UP_TO):
        gap, largest = _compare_logits(folder, hf, prompts)
    return VerifyReport(str(nemo), str(hf), len(slots), differences, gap, largest, round(time.monotonic() - start, 3))


def _compare(slot: layout.Slot, ours: Any, theirs: HFWeights) -> Difference | None:
    if slot.name not in theirs.infos:
        raise CptError(f"{theirs.folder} lacks {slot.name}: config.json and the weights belong to different models.")
    mine, other = ours.read(slot.name), theirs.read(slot.name)
    if mine.shape != other.shape:
        raise CptError(f"{slot.name} has shape {tuple(other.shape)}, config.json asks for {slot.shape}.")
    if mine.dtype == other.dtype and _bits(mine).equal(_bits(other)):
        return None
    rows = max(1, _COMPARED_AT_ONCE * mine.shape[0] // mine.numel())
    counts, gaps = zip(*map(_differ, mine.split(rows), other.split(rows)), strict=True)
    return Difference(slot.name, sum(counts), mine.numel(), max(gaps))


def _differ(mine: torch.Tensor, other: torch.Tensor) -> tuple[int, float]:
    """How many values differ, in bits where the dtypes are the same, and by how much at most."""
    values = mine.float(), other.float()
    unequal = _bits(mine) != _bits(other) if mine.dtype == other.dtype else values[0] != values[1]
    return int(unequal.sum()), float((values[0] - values[1]).abs().max())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


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
