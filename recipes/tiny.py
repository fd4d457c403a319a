"""A model of the Llama-3.1 shape small enough for a CPU: the demo's, the tests', and the first thing to try."""

import nemo_run as run
from nemo.collections import llm
from nemo.collections.llm.gpt.model.llama import Llama31Config

from nemo_cpt.arguments import checked
from nemo_cpt.conversations import Conversations
from nemo_cpt.corpus import Blend
from nemo_cpt.recipes import continual, instruction
from nemo_cpt.training.cpu import on_cpu


def model(seq_length: int = 128) -> run.Config[llm.LlamaModel]:
    """About a million parameters beside the embeddings: 4 layers of width 128, 4 heads in 2 query groups."""
    config = run.Config(
        Llama31Config,
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=384,
        num_attention_heads=4,
        num_query_groups=2,  # fewer than heads, as in the 8B, and enough for tensor parallelism over two processes
        kv_channels=32,
        rotary_base=500_000,
        seq_length=seq_length,
    )
    return run.Config(llm.LlamaModel, config=config)


@checked
def continual_pretrain(
    base: str,
    data: Blend,
    *,
    processes: int = 1,
    name: str = "tiny_cpt",
    seq_length: int = 128,
    global_batch_size: int = 16,
    micro_batch_size: int = 4,
    max_steps: int = 60,
    val_check_interval: int = 10,
    lr: float = 1e-3,
    **kwargs,
) -> run.Partial:
    """Every parameter of the tiny model, on the CPU.

    Args:
        base: see `continual.continual_pretrain`.
        data: what to train and validate on.
        processes: processes of the run, over gloo.
        name: see `continual.continual_pretrain`.
        seq_length: see `continual.continual_pretrain`.
        global_batch_size: see `continual.continual_pretrain`.
        micro_batch_size: see `continual.continual_pretrain`.
        max_steps: see `continual.continual_pretrain`.
        val_check_interval: see `continual.continual_pretrain`.
        lr: peak learning rate; a model this small wants a larger one.
        **kwargs: see `continual.continual_pretrain`.

    Returns:
        A run.Partial of `llm.pretrain` that runs on the CPU.
    """
    recipe = continual.continual_pretrain(
        base=base,
        data=data,
        name=name,
        gpus_per_node=processes,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        max_steps=max_steps,
        val_check_interval=val_check_interval,
        lr=lr,
        **{"model": "tiny"} | kwargs,
    )
    return on_cpu(recipe, processes)


@checked
def instruction_tune(
    base: str,
    data: Conversations,
    *,
    processes: int = 1,
    name: str = "tiny_sft",
    seq_length: int = 128,
    global_batch_size: int = 8,
    micro_batch_size: int = 4,
    lr: float = 1e-3,
    **kwargs,
) -> run.Partial:
    """Instruction tuning of the tiny model, on the CPU.

    Args:
        base: see `instruction.instruction_tune`.
        data: see `instruction.instruction_tune`.
        processes: processes of the run, over gloo.
        name: see `instruction.instruction_tune`.
        seq_length: see `instruction.instruction_tune`.
        global_batch_size: see `instruction.instruction_tune`.
        micro_batch_size: see `instruction.instruction_tune`.
        lr: peak learning rate; a model this small wants a larger one.
        **kwargs: see `instruction.instruction_tune`.

    Returns:
        A run.Partial of `llm.finetune` that runs on the CPU.
    """
    recipe = instruction.instruction_tune(
        base=base,
        data=data,
        name=name,
        gpus_per_node=processes,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        lr=lr,
        **{"model": "tiny"} | kwargs,
    )
    return on_cpu(recipe, processes)
