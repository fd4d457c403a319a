"""Pretraining from scratch: Llama- or GPT-2-shaped models of GPT-3's smaller sizes, on one's own tokenizer and data.

`nemo-cpt init` writes the random weights that a run starts from.
"""

import sys

import nemo_run as run
from nemo.collections import llm

from nemo_cpt.arguments import checked
from nemo_cpt.corpus import Blend
from nemo_cpt.output import say
from nemo_cpt.planning.from_scratch import schedule_of, size_warning
from nemo_cpt.recipe_models import LIKE_BASE
from nemo_cpt.recipes import continual
from nemo_cpt.training.settings import Settings, check


def default_data() -> Blend:
    """The sets that the walk through docs/from-scratch.md makes."""
    return Blend(train={"ds/train": 1.0}, validation={"validation": "ds/validation"})


@run.cli.factory(target=llm.pretrain, name="gpt_124m")
@checked
def pretrain(
    base: str = "checkpoints/gpt_124m",
    data: Blend | None = None,
    *,
    params: str = "124M",
    name: str = "gpt_124m",
    gpus_per_node: int = 1,
    seq_length: int = 1024,
    global_batch_size: int | None = None,
    micro_batch_size: int = 16,
    max_steps: int | None = None,
    warmup_steps: int | None = None,
    val_check_interval: int = 250,
    lr: float | None = None,
    **kwargs,
) -> run.Partial:
    """A model from scratch, with as many tokens as its size deserves.

    Args:
        base: folder of the random weights to start from, made by `nemo-cpt init`; they say the model's shape.
        data: what to train and validate on; `default_data()` when None.
        params: "124M", "350M" or "1.3B": which learning rate, batch and number of tokens; the base is of that size.
        name: see `continual.continual_pretrain`.
        gpus_per_node: see `continual.continual_pretrain`.
        seq_length: see `continual.continual_pretrain`.
        global_batch_size: sequences of a step; half a million tokens when None, a million for 1.3B.
        micro_batch_size: see `continual.continual_pretrain`.
        max_steps: steps; as many as 20 tokens for each parameter take when None (arXiv 2203.15556).
        warmup_steps: 375 million tokens when None, as GPT-3's, but a tenth of the run at most.
        val_check_interval: see `continual.continual_pretrain`.
        lr: peak learning rate; GPT-3's for the size when None.
        **kwargs: see `continual.continual_pretrain`.

    Returns:
        A run.Partial of `llm.pretrain`; every field stays editable.

    Raises:
        CptError: there is no such size; see `continual.continual_pretrain`.
    """
    # What the steps are counted by.
    check(Settings(seq_length=seq_length, global_batch_size=global_batch_size, max_steps=max_steps))
    given = {"global_batch_size": global_batch_size, "max_steps": max_steps, "warmup_steps": warmup_steps, "lr": lr}
    if warning := size_warning(params, base):
        say(f"nemo_cpt: warning: {warning}", sys.stderr)
    return continual.continual_pretrain(
        model=LIKE_BASE,
        base=base,
        data=default_data() if data is None else data,
        name=name,
        gpus_per_node=gpus_per_node,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        val_check_interval=val_check_interval,
        # Else a first loss like that of random weights, which is right here, would end the run.
        untrained_base=True,
        **schedule_of(params).settings(seq_length, given) | kwargs,
    )


@run.cli.factory(target=llm.pretrain, name="gpt_350m")
@checked
def pretrain_350m(base: str = "checkpoints/gpt_350m", data: Blend | None = None, **kwargs) -> run.Partial:
    """The same at 350 M parameters: 13,351 steps of half a million tokens.

    Args:
        base: see `pretrain`.
        data: see `pretrain`.
        **kwargs: see `gpt.pretrain`.
    """
    return pretrain(base, data, **{"params": "350M", "name": "gpt_350m", "micro_batch_size": 8} | kwargs)


@run.cli.factory(target=llm.pretrain, name="gpt_1_3b")
@checked
def pretrain_1_3b(base: str = "checkpoints/gpt_1_3b", data: Blend | None = None, **kwargs) -> run.Partial:
    """The same at 1.3 B parameters: 24,796 steps of a million tokens, on a node of eight GPUs.

    Args:
        base: see `pretrain`.
        data: see `pretrain`.
        **kwargs: see `gpt.pretrain`.
    """
    return pretrain(
        base,
        data,
        **{"params": "1.3B", "name": "gpt_1_3b", "gpus_per_node": 8, "seq_length": 2048, "micro_batch_size": 4}
        | kwargs,
    )
