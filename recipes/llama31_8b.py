"""Continual pretraining and instruction tuning of Llama-3.1-8B.

The defaults of continual pretraining are those of the recorded run that taught Llama-3.1-8B Japanese on one node of 8
H100 (NVIDIA's Japanese blog on continual pretraining with NeMo): 150 steps of 1024 x 8192 tokens = 1.26 B tokens in
about 6 hours. Its learning rates are Swallow's for the same model too. Those of instruction tuning are in
`instruction.instruction_tune`.
"""

import nemo_run as run
from nemo.collections import llm

from nemo_cpt.conversations import Conversations
from nemo_cpt.corpus import Blend
from nemo_cpt.planning import ALLOWED, fit
from nemo_cpt.recipes import continual, instruction
from nemo_cpt.recipes.continual import with_lora as with_lora
from nemo_cpt.training.guards import check_belonging

DEFAULT_BASE = "checkpoints/Llama-3.1-8B"
SFT_SEQ_LENGTH, SFT_RANK = 4096, 32
# Before kwargs in the calls below, so that a user may still say otherwise.
ONE_GPU = {"gpus_per_node": 1, "tensor_model_parallel_size": 1}


def model(seq_length: int = 8192) -> run.Config[llm.LlamaModel]:
    """Llama-3.1-8B: 8.03 B parameters, rope base 500,000 with Llama 3.1's scaling, vocabulary 128,256."""
    return run.Config(llm.LlamaModel, config=run.Config(llm.Llama31Config8B, seq_length=seq_length))


@run.cli.factory(target=llm.pretrain, name="llama31_8b_cpt")
def continual_pretrain(
    base: str = DEFAULT_BASE,
    data: Blend | None = None,
    *,
    name: str = "llama31_8b_cpt",
    gpus_per_node: int = 8,
    tensor_model_parallel_size: int = 2,
    seq_length: int = 8192,
    global_batch_size: int = 1024,
    max_steps: int = 150,
    val_check_interval: int = 15,
    lr: float = 2.5e-5,
    **kwargs,
) -> run.Partial:
    """Every parameter, on one node of 8 GPUs of 80 GB by default.

    Args:
        base: see `continual.continual_pretrain`.
        data: see `continual.continual_pretrain`.
        name: see `continual.continual_pretrain`.
        gpus_per_node: see `continual.continual_pretrain`.
        tensor_model_parallel_size: see `continual.continual_pretrain`.
        seq_length: see `continual.continual_pretrain`.
        global_batch_size: see `continual.continual_pretrain`.
        max_steps: see `continual.continual_pretrain`.
        val_check_interval: see `continual.continual_pretrain`.
        lr: see `continual.continual_pretrain`.
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
        tensor_model_parallel_size=tensor_model_parallel_size,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        max_steps=max_steps,
        val_check_interval=val_check_interval,
        lr=lr,
        # In a mapping, so that `model=` among kwargs replaces it; a parameter of that name would hide the function.
        **{"model": model(seq_length)} | kwargs,
    )


@run.cli.factory(target=llm.finetune, name="llama31_8b_cpt_single_gpu")
def continual_pretrain_single_gpu(
    base: str = DEFAULT_BASE,
    data: Blend | None = None,
    *,
    gpu_memory_gib: int = 48,
    name: str = "llama31_8b_cpt_single_gpu",
    rank: int | None = None,
    seq_length: int | None = None,
    global_batch_size: int = 32,
    lr: float = 1e-4,
    embeddings_lr: float | None = None,
    peft_scheme: str = "lora",
    **kwargs,
) -> run.Partial:
    """LoRA on every linear layer, on one GPU of 48 GB by default; of 24 GB with a lower rank.

    The base is frozen; adapters of rank 128 and alpha of twice the rank are trained on all linear layers, after "LoRA
    Learns Less and Forgets Less" (arXiv 2405.09673: alpha 2 x rank, all linear layers, learning rates of 1e-5 to 5e-4).
    Micro batch and recomputation are what `planning.fit` finds fastest for the card with 5 % to spare; where rank 128
    does not fit, the rank is halved until it does, then the sequence. docs/performance.md has measurements.

    Args:
        base: see `continual_pretrain`.
        data: see `continual_pretrain`.
        gpu_memory_gib: the card's memory as sold.
        name: see `continual_pretrain`.
        rank: rank of the adapters; 128, or the largest half of it that fits, when None.
        seq_length: see `continual_pretrain`; 8192, or the largest half of it that fits, when None.
        global_batch_size: see `continual_pretrain`.
        lr: peak learning rate of the adapters.
        embeddings_lr: peak learning rate of the embedding and the output layer, trained whole beside the adapters
            (16 GiB more); frozen when None. See `with_lora`.
        peft_scheme: "lora" or "dora". See `with_lora`.
        **kwargs: see `continual_pretrain`.

    Returns:
        A run.Partial of `llm.finetune`; every field stays editable.

    Raises:
        CptError: nothing fits the card; `data` is no Blend; there is no such `peft_scheme`.
    """
    sizes = {"seq_length": seq_length or 8192, "global_batch_size": global_batch_size}
    recipe = continual_pretrain(base, data, name=name, lr=lr, **ONE_GPU | sizes | kwargs)
    # What the user gave is not the planner's to change; what was left open is.
    given_up = [knob for knob, value in (("rank", rank), ("seq_length", seq_length)) if value is None]
    adapted = with_lora(recipe, rank, embeddings_lr, peft_scheme)
    return fit(adapted, gpu_memory_gib, allow=[*ALLOWED, *given_up]).recipe


@run.cli.factory(target=llm.pretrain, name="llama31_8b_cpt_full_single_gpu")
def continual_pretrain_full_single_gpu(
    base: str = DEFAULT_BASE,
    data: Blend | None = None,
    *,
    gpu_memory_gib: int = 80,
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
    sizes = {"seq_length": seq_length or 8192, "global_batch_size": global_batch_size}
    recipe = continual_pretrain(base, data, name=name, **ONE_GPU | sizes | kwargs)
    given_up = ["gradients"] + ["seq_length"] * (seq_length is None)
    return fit(recipe, gpu_memory_gib, allow=[*ALLOWED, *given_up]).recipe


@run.cli.factory(target=llm.finetune, name="llama31_8b_sft")
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
        **{"model": model(seq_length)} | kwargs,
    )


@run.cli.factory(target=llm.finetune, name="llama31_8b_sft_single_gpu")
def instruction_tune_single_gpu(
    base: str = DEFAULT_BASE,
    data: Conversations | None = None,
    *,
    gpu_memory_gib: int = 48,
    name: str = "llama31_8b_sft_single_gpu",
    rank: int | None = None,
    seq_length: int | None = None,
    lr: float = 1e-4,
    embeddings_lr: float | None = None,
    peft_scheme: str = "lora",
    **kwargs,
) -> run.Partial:
    """Instruction tuning with LoRA on every linear layer, on one GPU of 48 GB by default; of 24 GB as well.

    Adapters of rank 32 and alpha of twice the rank: instructions take less of them than a language does (arXiv
    2405.09673 tries 16 to 256). Micro batch and recomputation are what `planning.fit` finds fastest for the card with
    5 % to spare; where that rank does not fit, it is halved until it does, then the sequence.

    Args:
        base: see `instruction.instruction_tune`.
        data: see `instruction.instruction_tune`. The special tokens of its template must have been trained in the base,
            or embeddings_lr be given.
        gpu_memory_gib: the card's memory as sold.
        name: see `instruction.instruction_tune`.
        rank: rank of the adapters; 32, or the largest half of it that fits, when None.
        seq_length: see `instruction.instruction_tune`; 4096, or the largest half of it that fits, when None.
        lr: peak learning rate of the adapters, that of NeMo's own llama31_8b.finetune_recipe for LoRA.
        embeddings_lr: see `continual_pretrain_single_gpu`.
        peft_scheme: see `continual_pretrain_single_gpu`.
        **kwargs: see `instruction_tune`.

    Returns:
        A run.Partial of `llm.finetune`; every field stays editable.

    Raises:
        CptError: nothing fits the card; or as `instruction.instruction_tune`.
    """
    wanted = seq_length or SFT_SEQ_LENGTH
    recipe = instruction_tune(base, data, name=name, seq_length=wanted, lr=lr, **ONE_GPU | kwargs)
    given_up = [knob for knob, value in (("rank", rank), ("seq_length", seq_length)) if value is None]
    recipe = with_lora(recipe, rank or SFT_RANK, embeddings_lr, peft_scheme)
    # Again, with the adapters: frozen embeddings cannot learn a template's special tokens.
    check_belonging(recipe)
    fitted = fit(recipe, gpu_memory_gib, allow=[*ALLOWED, *given_up]).recipe
    # Where the planner cut the sequence, conversations are packed anew, and an epoch has other steps.
    if fitted.data.seq_length == wanted:
        return fitted
    shorter = {"seq_length": fitted.data.seq_length}  # has other epochs
    same = {"rank": rank, "lr": lr, "embeddings_lr": embeddings_lr, "peft_scheme": peft_scheme}
    return instruction_tune_single_gpu(base, data, gpu_memory_gib=gpu_memory_gib, name=name, **same | shorter | kwargs)
