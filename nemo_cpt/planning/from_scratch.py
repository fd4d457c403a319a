"""How a model is trained from scratch: GPT-3's rates and batches by size, and the tokens that its size deserves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cpt.compatibility import read_base
from nemo_cpt.errors import CptError
from nemo_cpt.planning import checkpoint_size

TOKENS_PER_PARAMETER = 20  # Hoffmann et al., arXiv 2203.15556: what a model should see for the compute to be well spent
WARMUP_TOKENS = 375_000_000  # GPT-3's (arXiv 2005.14165, appendix B)
OF_A_SIZE = 2.0  # times as many parameters, or as few, that are still of it


@dataclass(frozen=True)
class Schedule:
    """How a size is trained: GPT-3's table 2.1 (arXiv 2005.14165).

    Attributes:
        parameters: of the model, about.
        lr: peak learning rate.
        batch_tokens: of a step.
    """

    parameters: float
    lr: float
    batch_tokens: int

    def settings(self, seq_length: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's `global_batch_size`, `max_steps`, `warmup_steps` and `lr`: as given, else the size's own.

        Args:
            seq_length: tokens of a sequence, 1 or more.
            given: by name; None, or a name that is missing, leaves it to the size.
        """

        def chosen(name: str, own: Any) -> Any:
            return own if given.get(name) is None else given[name]

        batch = chosen("global_batch_size", max(self.batch_tokens // seq_length, 1))
        # A batch of 0 is for the check of the settings to refuse, and not for the division.
        batch_tokens = max(batch, 1) * seq_length
        steps = chosen("max_steps", round(TOKENS_PER_PARAMETER * self.parameters / batch_tokens))
        return {
            "global_batch_size": batch,
            "max_steps": steps,
            "warmup_steps": chosen("warmup_steps", min(WARMUP_TOKENS // batch_tokens, steps // 10)),
            "lr": chosen("lr", self.lr),
        }


SCHEDULES = {
    "124M": Schedule(124e6, 6e-4, 524_288),
    "350M": Schedule(350e6, 3e-4, 524_288),
    "1.3B": Schedule(1.3e9, 2e-4, 1_048_576),
}


def schedule_of(params: str) -> Schedule:
    """The schedule of a size.

    Raises:
        CptError: there is none.
    """
    if params not in SCHEDULES:
        raise CptError(f"params is {params!r}; it can be {', '.join(SCHEDULES)}")
    return SCHEDULES[params]


def of_another_size(params: str, base: str | Path) -> str:
    """How a base is not of the size that a schedule is for, in words; empty for one that is, or is not here."""
    architecture = read_base(base).architecture if Path(base).is_dir() else None
    wanted = schedule_of(params).parameters
    # A base on another machine cannot be looked at, and is taken for what was asked.
    there = checkpoint_size.parameters(architecture) if architecture else wanted
    if 1 / OF_A_SIZE <= there / wanted <= OF_A_SIZE:
        return ""
    return f"its schedule is for {params} parameters (the base has {there / 1e6:,.1f} M)"


def size_warning(params: str, base: str | Path) -> str:
    """What to say before such a training; empty where there is nothing to say."""
    if not (differing := of_another_size(params, base)):
        return ""
    return f"{differing}. Give params= the nearest of {', '.join(SCHEDULES)}, or max_steps=, lr= and global_batch_size="
