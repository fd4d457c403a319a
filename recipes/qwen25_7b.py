"""Continual pretraining and instruction tuning of Qwen2.5-7B.

Its numbers are config.json's of Qwen/Qwen2.5-7B; the layout is that of NeMo's own qwen25_7b recipe. Lengths and
learning rates are those of Llama-3.1-8B, a model of its size.
"""

from typing import Any

import nemo_run as run
from nemo.collections import llm

from nemo_cpt.arguments import checked
from nemo_cpt.conversations import Conversations
from nemo_cpt.corpus import Blend
from nemo_cpt.recipes import continual, instruction

DEFAULT_BASE = "checkpoints/Qwen2.5-7B"
# Before kwargs in the calls below, so that a user may still say otherwise.
NODE: dict[str, Any] = {"gpus_per_node": 8, "tensor_model_parallel_size": 2}
ONE_GPU: dict[str, Any] = {"gpus_per_node": 1}


def model(seq_length: int = 8192) -> run.Config[llm.Qwen2Model]:
    """Qwen2.5-7B: 7.62 B parameters, biases of query, key and value, rope base 1,000,000, vocabulary 152,064."""
    return run.Config(llm.Qwen2Model, config=run.Config(llm.Qwen25Config7B, seq_length=seq_length))


@run.cli.factory(target=llm.pretrain, name="qwen25_7b_cpt")
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
        base=base, data=data, **NODE | {"model": "qwen25_7b", "name": "qwen25_7b_cpt"} | kwargs
    )


@run.cli.factory(target=llm.finetune, name="qwen25_7b_cpt_single_gpu")
@checked
def continual_pretrain_single_gpu(
    base: str = DEFAULT_BASE, data: Blend | None = None, *, gpu_memory_gib: float = 48, **kwargs
) -> run.Partial:
    """LoRA on every linear layer, on one GPU of 48 GB by default.

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
        **ONE_GPU | {"model": "qwen25_7b", "name": "qwen25_7b_cpt_single_gpu"} | kwargs,
    )


@run.cli.factory(target=llm.finetune, name="qwen25_7b_sft")
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
        base=base, data=data, **NODE | {"model": "qwen25_7b", "name": "qwen25_7b_sft"} | kwargs
    )


@run.cli.factory(target=llm.finetune, name="qwen25_7b_sft_single_gpu")
@checked
def instruction_tune_single_gpu(
    base: str = DEFAULT_BASE, data: Conversations | None = None, *, gpu_memory_gib: float = 48, **kwargs
) -> run.Partial:
    """Instruction tuning with LoRA on every linear layer, on one GPU of 48 GB by default.

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
        **ONE_GPU | {"model": "qwen25_7b", "name": "qwen25_7b_sft_single_gpu"} | kwargs,
    )
