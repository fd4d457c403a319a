"""Continual pretraining and instruction tuning of Llama-3.2-3B.

Its numbers are config.json's of meta-llama/Llama-3.2-3B. The layout is that of NeMo's own llama32_3b recipe, with the
micro batch that `planning.fit` finds fastest for 80 GB. Lengths and learning rates are those of the 8B, from which Meta
pruned and distilled it.
"""

from typing import Any

import nemo_run as run
from nemo.collections import llm

from nemo_cpt.arguments import checked
from nemo_cpt.conversations import Conversations
from nemo_cpt.corpus import Blend
from nemo_cpt.recipes import continual, instruction

DEFAULT_BASE = "checkpoints/Llama-3.2-3B"
# Before kwargs in the calls below, so that a user may still say otherwise.
NODE: dict[str, Any] = {"gpus_per_node": 8, "micro_batch_size": 2}
ONE_GPU: dict[str, Any] = {"gpus_per_node": 1}


def model(seq_length: int = 8192) -> run.Config[llm.LlamaModel]:
    """Llama-3.2-3B: 3.21 B parameters, the embedding also the head, Llama 3's rope scaled by 32, vocabulary 128,256."""
    return run.Config(llm.LlamaModel, config=run.Config(llm.Llama32Config3B, seq_length=seq_length))


@run.cli.factory(target=llm.pretrain, name="llama32_3b_cpt")
@checked
def continual_pretrain(base: str = DEFAULT_BASE, data: Blend | None = None, **kwargs) -> run.Partial:
    """Every parameter, on one node of 8 GPUs of 80 GB by default.

    Args:
        base: see `continual.continual_pretrain`.
        data: see `continual.continual_pretrain`.
        **kwargs: see `continual.continual_pretrain`.

    Returns:
        A run.Partial of `llm.pretrain`; every field stays editable.

    Raises:
        CptError: as `continual.continual_pretrain`.
    """
    return continual.continual_pretrain(
        base=base, data=data, **NODE | {"model": "llama32_3b", "name": "llama32_3b_cpt"} | kwargs
    )


@run.cli.factory(target=llm.finetune, name="llama32_3b_cpt_single_gpu")
@checked
def continual_pretrain_single_gpu(
    base: str = DEFAULT_BASE, data: Blend | None = None, *, gpu_memory_gib: float = 24, **kwargs
) -> run.Partial:
    """LoRA on every linear layer, on one GPU of 24 GB by default.

    Args:
        base: see `continual.continual_pretrain`.
        data: see `continual.continual_pretrain`.
        gpu_memory_gib: see `continual.continual_pretrain_lora`.
        **kwargs: see `continual.continual_pretrain_lora`.

    Returns:
        A run.Partial of `llm.finetune`; every field stays editable.

    Raises:
        CptError: as `continual.continual_pretrain_lora`.
    """
    return continual.continual_pretrain_lora(
        base=base,
        data=data,
        gpu_memory_gib=gpu_memory_gib,
        **ONE_GPU | {"model": "llama32_3b", "name": "llama32_3b_cpt_single_gpu"} | kwargs,
    )


@run.cli.factory(target=llm.finetune, name="llama32_3b_sft")
@checked
def instruction_tune(base: str = DEFAULT_BASE, data: Conversations | None = None, **kwargs) -> run.Partial:
    """Instruction tuning of every parameter, on one node of 8 GPUs of 80 GB by default.

    Args:
        base: see `instruction.instruction_tune`.
        data: see `instruction.instruction_tune`.
        **kwargs: see `instruction.instruction_tune`.

    Returns:
        A run.Partial of `llm.finetune`; every field stays editable.

    Raises:
        CptError: as `instruction.instruction_tune`.
    """
    return instruction.instruction_tune(
        base=base, data=data, **NODE | {"model": "llama32_3b", "name": "llama32_3b_sft"} | kwargs
    )


@run.cli.factory(target=llm.finetune, name="llama32_3b_sft_single_gpu")
@checked
def instruction_tune_single_gpu(
    base: str = DEFAULT_BASE, data: Conversations | None = None, *, gpu_memory_gib: float = 24, **kwargs
) -> run.Partial:
    """Instruction tuning with LoRA on every linear layer, on one GPU of 24 GB by default.

    Args:
        base: see `instruction.instruction_tune`.
        data: see `instruction.instruction_tune_lora`.
        gpu_memory_gib: see `instruction.instruction_tune_lora`.
        **kwargs: see `instruction.instruction_tune_lora`.

    Returns:
        A run.Partial of `llm.finetune`; every field stays editable.

    Raises:
        CptError: as `instruction.instruction_tune_lora`.
    """
    return instruction.instruction_tune_lora(
        base=base,
        data=data,
        gpu_memory_gib=gpu_memory_gib,
        **ONE_GPU | {"model": "llama32_3b", "name": "llama32_3b_sft_single_gpu"} | kwargs,
    )
