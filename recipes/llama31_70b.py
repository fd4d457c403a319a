"""Continual pretraining and instruction tuning of Llama-3.1-70B.

Its numbers are config.json's of meta-llama/Llama-3.1-70B. Its layout on several nodes is planned, and was not measured:
NeMo's own llama31_70b recipe has as many nodes and stages, tensor parallel size 4 and interleaved stages. One node
trains LoRA.
"""

from typing import Any

import nemo_run as run
from nemo.collections import llm

from nemo_cpt.arguments import checked
from nemo_cpt.conversations import Conversations
from nemo_cpt.corpus import Blend
from nemo_cpt.recipes import continual, instruction

DEFAULT_BASE = "checkpoints/Llama-3.1-70B"
# Before kwargs in the calls below, so that a user may still say otherwise.
NODES: dict[str, Any] = {
    "num_nodes": 4, "gpus_per_node": 8, "tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4,
}  # fmt: skip
NODE: dict[str, Any] = {"gpus_per_node": 8}


def model(seq_length: int = 8192) -> run.Config[llm.LlamaModel]:
    """Llama-3.1-70B: 70.6 B parameters, rope base 500,000 with Llama 3.1's scaling, vocabulary 128,256."""
    return run.Config(llm.LlamaModel, config=run.Config(llm.Llama31Config70B, seq_length=seq_length))


@run.cli.factory(target=llm.pretrain, name="llama31_70b_cpt")
@checked
def continual_pretrain(
    base: str = DEFAULT_BASE, data: Blend | None = None, *, lr: float = 1.5e-5, **kwargs
) -> run.Partial:
    """Every parameter, on four nodes of 8 GPUs of 80 GB by default.

    Args:
        base: see `continual.continual_pretrain`.
        data: see `continual.continual_pretrain`.
        lr: peak learning rate, that of e-Llama's 70B (arXiv 2501.09706).
        **kwargs: see `continual.continual_pretrain`.

    Returns:
        A run.Partial of `llm.pretrain`; every field stays editable.

    Raises:
        CptError: as `continual.continual_pretrain`.
    """
    return continual.continual_pretrain(
        base=base, data=data, lr=lr, **NODES | {"model": "llama31_70b", "name": "llama31_70b_cpt"} | kwargs
    )


@run.cli.factory(target=llm.finetune, name="llama31_70b_cpt_lora")
@checked
def continual_pretrain_lora(
    base: str = DEFAULT_BASE, data: Blend | None = None, *, gpu_memory_gib: float = 80, **kwargs
) -> run.Partial:
    """LoRA on every linear layer, on one node of 8 GPUs of 80 GB by default.

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
        **NODE | {"model": "llama31_70b", "name": "llama31_70b_cpt_lora"} | kwargs,
    )


@run.cli.factory(target=llm.finetune, name="llama31_70b_sft")
@checked
def instruction_tune(base: str = DEFAULT_BASE, data: Conversations | None = None, **kwargs) -> run.Partial:
    """Instruction tuning of every parameter, on four nodes of 8 GPUs of 80 GB by default.

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
        base=base, data=data, **NODES | {"model": "llama31_70b", "name": "llama31_70b_sft"} | kwargs
    )


@run.cli.factory(target=llm.finetune, name="llama31_70b_sft_lora")
@checked
def instruction_tune_lora(
    base: str = DEFAULT_BASE, data: Conversations | None = None, *, gpu_memory_gib: float = 80, **kwargs
) -> run.Partial:
    """Instruction tuning with LoRA on every linear layer, on one node of 8 GPUs of 80 GB by default.

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
        **NODE | {"model": "llama31_70b", "name": "llama31_70b_sft_lora"} | kwargs,
    )
