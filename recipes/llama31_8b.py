"""Continual pretraining and instruction tuning of Llama-3.1-8B.

The defaults of continual pretraining are those of the recorded run that taught Llama-3.1-8B Japanese on one node of 8
H100 (NVIDIA's Japanese blog on continual pretraining with NeMo): 150 steps of 1024 x 8192 tokens = 1.26 B tokens in
about 6 hours. Its learning rates are Swallow's for the same model too. Those of instruction tuning are in
`instruction.instruction_tune`.
"""

from typing import Any

import nemo_run as run
from nemo.collections import llm

from nemo_cpt.arguments import checked
from nemo_cpt.conversations import Conversations
from nemo_cpt.corpus import Blend
from nemo_cpt.planning import ALLOWED, fit
from nemo_cpt.recipes import continual, instruction
from nemo_cpt.recipes.continual import with_lora as with_lora

DEFAULT_BASE = "checkpoints/Llama-3.1-8B"
# Before kwargs in the calls below, so that a user may still say otherwise.
ONE_GPU: dict[str, Any] = {"gpus_per_node": 1, "tensor_model_parallel_size": 1}


def model(seq_length: int = 8192) -> run.Config[llm.LlamaModel]:
    """Llama-3.1-8B: 8.03 B parameters, rope base 500,000 with Llama 3.1's scaling, vocabulary 128,256."""
    return run.Config(llm.LlamaModel, config=run.Config(llm.Llama31Config8B, seq_length=seq_length))


@run.cli.factory(target=llm.pretrain, name="llama31_8b_cpt")
@checked
def continual_pretrain(
    base: str = DEFAULT_BASE,
    data: Blend | None = None,
    *,
    name: str = "llama31_8b_cpt",
    gpus_per_node: int = 8,
    tensor_model_parallel_size: int = 2,
    **kwargs,
) -> run.Partial:
    """Every parameter, on one node of 8 GPUs of 80 GB by default.

    Args:
        base: see `continual.continual_pretrain`.
        data: see `continual.continual_pretrain`.
        name: see `continual.continual_pretrain`.
        gpus_per_node: see `continual.continual_pretrain`.
        tensor_model_parallel_size: see `continual.continual_pretrain`.
        **kwargs: see `continual.continual_pretrain`.

    Returns:
        A run.Partial of `llm.pretrain`; every field stays editable.

    Raises:
        CptError: `data` is no Blend, the global batch does not divide among the GPUs; or, where the base is on this
            machine, model, tokenizer or data do not belong to it.

    Example:
        >>> recipe = continual_pretrain(data=Blend.replay("ds/ja", "ds/en", share=0.25))
        >>> run.run(recipe, executor=local(processes=8))
    """
    return continual.continual_pretrain(
        base=base,
        data=data,
        name=name,
        gpus_per_node=gpus_per_node,
        # Layers that are not cut in two are planned at 98 GiB of an 80 GB card; where they fit, 1 is faster.
        tensor_model_parallel_size=tensor_model_parallel_size,
        **{"model": "llama31_8b"} | kwargs,
    )


@run.cli.factory(target=llm.finetune, name="llama31_8b_cpt_single_gpu")
@checked
def continual_pretrain_single_gpu(
    base: str = DEFAULT_BASE,
    data: Blend | None = None,
    *,
    gpu_memory_gib: float = 48,
    name: str = "llama31_8b_cpt_single_gpu",
    embeddings_lr: float | None = None,
    **kwargs,
) -> run.Partial:
    """LoRA on every linear layer, on one GPU of 48 GB by default; of 24 GB with a lower rank.

    See `continual.continual_pretrain_lora` for what is trained; docs/performance.md has measurements.

    Args:
        base: see `continual.continual_pretrain`.
        data: see `continual.continual_pretrain`.
        gpu_memory_gib: the card's memory as sold.
        name: see `continual.continual_pretrain`.
        embeddings_lr: peak learning rate of the embedding and the output layer, trained whole beside the adapters
            (16 GiB more); frozen when None. See `with_lora`.
        **kwargs: see `continual.continual_pretrain_lora`.

    Returns:
        A run.Partial of `llm.finetune`; every field stays editable.

    Raises:
        CptError: nothing fits the card; `data` is no Blend; there is no such `peft_scheme`.
    """
    return continual.continual_pretrain_lora(
        base=base,
        data=data,
        gpu_memory_gib=gpu_memory_gib,
        name=name,
        embeddings_lr=embeddings_lr,
        **ONE_GPU | {"model": "llama31_8b"} | kwargs,
    )


@run.cli.factory(target=llm.pretrain, name="llama31_8b_cpt_full_single_gpu")
@checked
def continual_pretrain_full_single_gpu(
    base: str = DEFAULT_BASE,
    data: Blend | None = None,
    *,
    gpu_memory_gib: float = 80,
    name: str = "llama31_8b_cpt_full_single_gpu",
    seq_length: int | None = None,
    global_batch_size: int = 128,
    **kwargs,
) -> run.Partial:
    """Every parameter on one GPU, of 80 GB by default; of 48 GB with Megatron's gradient buffer in bf16.

    Adam's fp32 states stay in 75 GiB of pinned host memory, where the GPU updates them across the bus in 2.1 s a step:
    the global batch is large to make up for it. Micro batch and recomputation are what `planning.fit` finds fastest
    for the card with 5 % to spare. docs/performance.md has measurements.

    Args:
        base: see `continual_pretrain`.
        data: see `continual_pretrain`.
        gpu_memory_gib: the card's memory as sold.
        name: see `continual_pretrain`.
        seq_length: see `continual_pretrain`; 8192, or the largest half of it that fits, when None.
        global_batch_size: see `continual_pretrain`.
        **kwargs: see `continual_pretrain`.

    Returns:
        A run.Partial of `llm.pretrain`; every field stays editable.

    Raises:
        CptError: nothing fits the card; `data` is no Blend.
    """
    sizes = {"seq_length": 8192 if seq_length is None else seq_length, "global_batch_size": global_batch_size}
    recipe = continual_pretrain(base, data, name=name, **ONE_GPU | sizes | kwargs)
    # In this order, and only where nothing else fits: Megatron's buffer of gradients in bf16, then a shorter sequence.
    given_up = ["gradients"] + ["seq_length"] * (seq_length is None)
    return fit(recipe, gpu_memory_gib, allow=[*ALLOWED, *given_up]).recipe


@run.cli.factory(target=llm.finetune, name="llama31_8b_sft")
@checked
def instruction_tune(
    base: str = DEFAULT_BASE,
    data: Conversations | None = None,
    *,
    name: str = "llama31_8b_sft",
    gpus_per_node: int = 8,
    tensor_model_parallel_size: int = 2,
    seq_length: int = 4096,
    lr: float = 5e-6,
    **kwargs,
) -> run.Partial:
    """Instruction tuning of every parameter, on one node of 8 GPUs of 80 GB by default.

    Args:
        base: see `instruction.instruction_tune`.
        data: see `instruction.instruction_tune`.
        name: see `instruction.instruction_tune`.
        gpus_per_node: see `instruction.instruction_tune`.
        tensor_model_parallel_size: see `instruction.instruction_tune`.
        seq_length: see `instruction.instruction_tune`.
        lr: peak learning rate, Tülu 3's (arXiv 2411.15124) and that of NeMo's own llama31_8b.finetune_recipe.
        **kwargs: see `instruction.instruction_tune`.

    Returns:
        A run.Partial of `llm.finetune`; every field stays editable.

    Raises:
        CptError: as `instruction.instruction_tune`.
    """
    return instruction.instruction_tune(
        base=base,
        data=data,
        name=name,
        gpus_per_node=gpus_per_node,
        tensor_model_parallel_size=tensor_model_parallel_size,
        seq_length=seq_length,
        lr=lr,
        **{"model": "llama31_8b"} | kwargs,
    )


@run.cli.factory(target=llm.finetune, name="llama31_8b_sft_single_gpu")
@checked
def instruction_tune_single_gpu(
    base: str = DEFAULT_BASE,
    data: Conversations | None = None,
    *,
    gpu_memory_gib: float = 48,
    name: str = "llama31_8b_sft_single_gpu",
    **kwargs,
) -> run.Partial:
    """Instruction tuning with LoRA on every linear layer, on one GPU of 48 GB by default; of 24 GB as well.

    See `instruction.instruction_tune_lora` for what is trained.

    Args:
        base: see `instruction.instruction_tune`.
        data: see `instruction.instruction_tune_lora`.
        gpu_memory_gib: the card's memory as sold.
        name: see `instruction.instruction_tune`.
        **kwargs: see `instruction.instruction_tune_lora`.

    Returns:
        A run.Partial of `llm.finetune`; every field stays editable.

    Raises:
        CptError: nothing fits the card; or as `instruction.instruction_tune`.
    """
    return instruction.instruction_tune_lora(
        base=base,
        data=data,
        gpu_memory_gib=gpu_memory_gib,
        name=name,
        **ONE_GPU | {"model": "llama31_8b"} | kwargs,
    )
