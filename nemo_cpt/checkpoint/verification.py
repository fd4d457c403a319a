"""Is a NeMo checkpoint the same model as a Hugging Face folder? Bit by bit, by constants, then by what both compute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isqrt, prod
from pathlib import Path
from typing import Any

import numpy as np

from nemo_cpt.arguments import checked
from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import Architecture, read_architecture
from nemo_cpt.checkpoint.arrays import DTYPES, bits, cast
from nemo_cpt.checkpoint.base import carried_places, nemo_folder, unchanged
from nemo_cpt.checkpoint.chat_template import InstructionTemplate, instruction_template, template_differences
from nemo_cpt.checkpoint.exported_config import differing_vocabulary
from nemo_cpt.checkpoint.importing import check_tensors
from nemo_cpt.checkpoint.model_config import context_differences, read_model_config
from nemo_cpt.checkpoint.nemo_weights import NemoWeights
from nemo_cpt.checkpoint.safetensors_files import HFWeights
from nemo_cpt.checkpoint.trained import open_adapted
from nemo_cpt.conversations.templates import own_template
from nemo_cpt.errors import CptError
from nemo_cpt.quiet import bars_of_transformers

PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "日本の首都は")
_LOGITS_TOLERANCE = 1e-5  # fp32, relative to the largest logit
_COMPARED_AT_ONCE = 2**24  # values of a tensor that differs, for their fp32 copies
_LOGITS_UP_TO = 2_000_000_000  # parameters; above, two fp32 copies of the model do not fit into ordinary memory
_BEYOND = 32  # tokens past a window or the length that a scaling starts from
_USUAL_TOKENS = 256  # of the long prompt where neither asks for more
_PRODUCTS = 10**12  # parameters x tokens of the long prompt: tens of seconds for each model on two cores
_SCORES = 2**27  # heads x tokens^2 of its attention, and tokens x vocabulary of its logits: 0.5 GiB of fp32

Read = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Difference:
    """One tensor that differs: how many of its values, and by how much at most."""

    name: str
    values: int
    of: int
    largest: float

    def __str__(self) -> str:
        return f"{self.name}: {self.values:,} of {self.of:,} values, by {self.largest:.3g} at most"


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of a comparison.

    Attributes:
        nemo: the checkpoint.
        hf: the Hugging Face folder.
        tensors: how many were compared.
        cast: "float32 -> bfloat16" where the checkpoint's dtype is not the folder's: its values were cast, as an export
            does, before they were compared; else None.
        differences: of tensors.
        constants: differences between the checkpoint's context and config.json, in words.
        chat_template: the one that the run was tuned on, as its record names it; None where it read texts alone.
        chat: where the folder would not ask and stop as the run was tuned, in words.
        logits_difference: the largest; None where logits were not compared.
        largest_logit: of transformers' model.
        longest_prompt: tokens of the longest text whose logits were compared.
        warnings: what the comparison could not see.
        seconds: wall time.
    """

    nemo: str
    hf: str
    tensors: int
    cast: str | None
    differences: tuple[Difference, ...]
    constants: tuple[str, ...]
    chat_template: str | None
    chat: tuple[str, ...]
    logits_difference: float | None
    largest_logit: float | None
    longest_prompt: int | None
    warnings: tuple[str, ...]
    seconds: float

    @property
    def identical(self) -> bool:
        """Whether bits, constants and chat template agree, and the logits where they were compared."""
        if self.differences or self.constants or self.chat:
            return False
        if self.logits_difference is None or self.largest_logit is None:
            return True
        return self.logits_difference <= _LOGITS_TOLERANCE * max(1.0, self.largest_logit)

    def as_dict(self) -> dict[str, Any]:
        """The report as a JSON-serialisable dict."""
        return {"identical": self.identical, **asdict(self)}


@checked
def verify(
    nemo: str | Path,
    hf: str | Path,
    base: str | Path | None = None,
    *,
    logits: bool | None = None,
    prompts: Sequence[str] | None = None,
    ignore_fields: Collection[str] = (),
) -> VerifyReport:
    """Compare a NeMo checkpoint with a Hugging Face folder.

    Every tensor bit by bit, one at a time, in the folder's dtype where the checkpoint has another; the constants of the
    forward pass (rotary base and scaling, window, norm epsilon and so on) that the checkpoint's context and config.json
    state; then the logits of NeMo's and transformers' models in fp32 on the CPU. A LoRA run's checkpoint stands for its
    adapters merged into the base, as `export_hf` writes them; without logits. After instruction tuning the folder also
    has to carry the chat template that the run was trained on, and end replies where its answers ended; its tokenizer
    and generation settings are then not the base's. Those of other runs' exports are, byte for byte, and are not
    compared.

    Args:
        nemo: a NeMo checkpoint.
        hf: a Hugging Face folder with weights and tokenizer.
        base: the base of a LoRA run, imported or Hugging Face's; by default the one that the run recorded.
        logits: whether to compare logits; None does so up to 2 billion parameters (both models are held in fp32), where
            tensors and constants agree: where they do not, the answer is known before.
        prompts: texts whose logits are compared; by default three short ones and tokens drawn at random, so many that
            they reach past the window and the length that the rotary scaling starts from, where that is affordable.
        ignore_fields: config fields to accept although they are unknown here.

    Raises:
        CptError: either side is damaged, or they are different models altogether (other shapes or names).
    """
    from nemo_cpt.checkpoint.lora import holds_adapters

    start = time.monotonic()
    folder, hf = nemo_folder(nemo), Path(hf)
    arch = read_architecture(hf, ignore_fields)
    lora, theirs = holds_adapters(folder), HFWeights(hf)
    if lora and logits:
        raise CptError(f"{folder} holds adapters only; their logits are not compared. Leave --logits away.")
    slots = layout.slots(arch)
    check_tensors(theirs, slots, arch)
    # Around all that is read of the checkpoint: a run may replace it, and the comparison would be of two.
    with unchanged(folder):
        read, warnings = _merged(folder, arch, theirs, base) if lora else (NemoWeights(folder, arch).read, ())
        casts: dict[tuple[str, str], None] = {}
        recorded, template = read_model_config(folder), instruction_template(folder)
        differing = context_differences(recorded, arch)
        differences = tuple(found for slot in slots if (found := _compare(slot, read, theirs, casts)))
        parameters = sum(prod(slot.shape) for slot in slots)
        gap, largest, longest = None, None, None
        if logits is None and not lora and (differences or differing):
            warnings = (*warnings, "logits were not compared, since what they are reckoned from differs: --logits does")
        elif logits or (logits is None and not lora and parameters <= _LOGITS_UP_TO):
            ids = _ids(hf, prompts) if prompts else [*_ids(hf, PROMPTS), _long_prompt(arch, parameters)]
            gap, largest = _compare_logits(folder, hf, ids, ignore_fields, theirs.dtype if casts else None)
            longest = max(map(len, ids))
    return VerifyReport(
        nemo=str(nemo),
        hf=str(hf),
        tensors=len(slots),
        cast=", ".join(f"{mine} -> {other}" for mine, other in casts) or None,
        differences=differences,
        chat_template=template.name if template else None,
        chat=tuple(template_differences(hf, template)) if template else (),
        constants=tuple(each.described("the checkpoint's context", "config.json") for each in differing),
        logits_difference=gap,
        largest_logit=largest,
        longest_prompt=longest,
        warnings=(
            *warnings,
            *theirs.warnings,
            *_cast_away(folder, hf, casts),
            *_unseen(folder, hf, arch, recorded, template, longest),
        ),
        seconds=round(time.monotonic() - start, 3),
    )


def _cast_away(nemo: Path, hf: Path, casts: Collection[tuple[str, str]]) -> Iterator[str]:
    """What of the checkpoint's precision the folder has not, in a sentence."""
    for mine, other in casts:
        if DTYPES[mine].itemsize > DTYPES[other].itemsize:
            yield (
                f"{nemo} holds {mine} and {hf} {other}: they were compared after that cast; `nemo-cpt export --dtype "
                f"{mine}` writes every bit"
            )


def _unseen(
    nemo: Path,
    hf: Path,
    arch: Architecture,
    recorded: Mapping[str, Any],
    template: InstructionTemplate | None,
    longest: int | None,
) -> Iterator[str]:
    """What the comparison could not see, in sentences."""
    if not template and own_template(hf) != _carried_template(nemo):
        yield (
            f"{hf} has another chat template than the base of {nemo}, which has no record of a tuning: it was chosen "
            "with --chat-template, or put there since"
        )
    for place in carried_places(nemo):
        if other := differing_vocabulary(place, hf):
            yield f"{hf}/{other} is not the one that {nemo} carries, {place}/{other}: texts become other tokens"
            break
    if not recorded:
        yield f"{nemo} has no context: constants such as the rotary base were not compared"
    if longest and arch.sliding_window and longest <= arch.sliding_window:
        yield f"the window of {arch.sliding_window} was compared as a number; no prompt was that long"


def _carried_template(nemo: Path) -> str | None:
    """The chat template of the files that a checkpoint carries; None where they have none."""
    return next((found for place in carried_places(nemo) if (found := own_template(place))), None)


def _merged(nemo: Path, arch: Architecture, theirs: HFWeights, base: str | Path | None) -> tuple[Read, tuple[str, ...]]:
    """Reads what `export_hf` would write of a LoRA run, in the dtype of `theirs`; and its warnings."""
    merged = open_adapted(nemo, arch, base)
    return lambda name: cast(merged.read(name), name, theirs.infos[name].dtype), merged.warnings


def _compare(slot: layout.Slot, read: Read, theirs: HFWeights, casts: dict[tuple[str, str], None]) -> Difference | None:
    """How a tensor differs, if it does; a cast that it took is noted in `casts`."""
    mine, other = read(slot.name), theirs.read(slot.name)
    if mine.dtype != other.dtype:
        casts[mine.dtype.name, other.dtype.name] = None
        with np.errstate(over="ignore"):  # beyond float16: infinite, and so different
            mine = mine.astype(other.dtype)
    if np.array_equal(bits(mine), bits(other)):
        return None
    rows = max(1, _COMPARED_AT_ONCE * mine.shape[0] // mine.size)
    starts = range(0, mine.shape[0], rows)
    counts, gaps = zip(*(_differ(mine[at : at + rows], other[at : at + rows]) for at in starts), strict=True)
    return Difference(slot.name, sum(counts), mine.size, max(gaps))


def _differ(mine: np.ndarray, other: np.ndarray) -> tuple[int, float]:
    """How many values differ in their bits, and by how much at most."""
    gap = np.abs(mine.astype(np.float32) - other.astype(np.float32))
    return int((bits(mine) != bits(other)).sum()), float(gap.max())


def _ids(hf: Path, prompts: Sequence[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    ids = [tokens for prompt in prompts if (tokens := tokenizer(prompt)["input_ids"])]
    if not ids:
        raise CptError("The prompts have no tokens; give others.")
    return ids


def _long_prompt(arch: Architecture, parameters: int) -> list[int]:
    """Random tokens, as many as it takes to see every constant of the model, or as time and memory allow."""
    wanted = [_USUAL_TOKENS]
    if arch.sliding_window:
        wanted.append(arch.sliding_window + _BEYOND)
    if arch.rope_scaling and arch.rope_scaling.kind == "llama3":
        wanted.append(int(arch.rope_scaling.original_max_position_embeddings) + _BEYOND)
    affordable = (
        _PRODUCTS // parameters,
        isqrt(_SCORES // arch.num_attention_heads),
        _SCORES // arch.vocab_size,
        arch.max_position_embeddings,
    )
    length = max(1, min(max(wanted), *affordable))
    # Random tokens suffice: both models must agree on any input, and no text is at hand that is so long.
    drawn: list[int] = np.random.default_rng(0).integers(0, arch.vocab_size, length).tolist()
    return drawn


def _compare_logits(
    nemo: Path, hf: Path, ids: list[list[int]], ignore_fields: Collection[str], rounded_to: str | None
) -> tuple[float, float]:
    import torch
    from transformers import AutoModelForCausalLM

    from nemo_cpt.checkpoint.nemo_model import nemo_logits
    from nemo_cpt.checkpoint.transformers_config import transformers_config

    # One model after the other: both at once in fp32 would need twice the memory.
    ours = nemo_logits(nemo, ids, rounded_to)
    config = transformers_config(hf, ignore_fields)
    with bars_of_transformers(sys.stderr.isatty()):
        model = AutoModelForCausalLM.from_pretrained(
            hf, config=config, dtype=torch.float32, attn_implementation="eager", use_safetensors=True
        ).eval()
    gap = largest = 0.0
    with torch.no_grad():
        for prompt, mine in zip(ids, ours, strict=True):
            other = model(torch.tensor([prompt])).logits[0]
            # Megatron's vocabulary is padded: its further columns belong to no token.
            gap = max(gap, float((mine[:, : other.shape[1]] - other).abs().max()))
            largest = max(largest, float(other.abs().max()))
    return gap, largest
