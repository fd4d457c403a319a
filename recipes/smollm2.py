"""Continual pretraining and instruction tuning of SmolLM2-135M.

A real pretrained model that one GPU teaches a language in minutes.
"""

import nemo_run as run
from nemo.collections import llm

from nemo_cpt.arguments import checked
from nemo_cpt.conversations import Conversations
from nemo_cpt.corpus import Blend
from nemo_cpt.recipes import continual, instruction
from nemo_cpt.training.settings import Settings, check

DEFAULT_BASE = "checkpoints/SmolLM2-135M"


def model(seq_length: int = 1024) -> run.Config[llm.LlamaModel]:
    """SmolLM2-135M: 134.5 M parameters, the embedding also the head, rope base 100,000, vocabulary 49,152."""
    config = run.Config(
        llm.LlamaConfig,
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        kv_channels=64,
        rotary_base=100_000,
        layernorm_epsilon=1e-5,
        share_embeddings_and_output_weights=True,
        vocab_size=49_152,  # Llama's config class has none, and the planner would take Llama 3's
        seq_length=seq_length,
    )
    return run.Config(llm.LlamaModel, config=config)


@run.cli.factory(target=llm.pretrain, name="smollm2_cpt")
@checked
def continual_pretrain(
    base: str = DEFAULT_BASE,
    data: Blend | None = None,
    *,
    name: str = "smollm2_cpt",
    gpus_per_node: int = 1,
    seq_length: int = 1024,
    global_batch_size: int = 16,
    micro_batch_size: int = 8,
    max_steps: int = 300,  # of 16 x 1024 tokens: 4.9 M in all
    val_check_interval: int = 50,
    limit_val_batches: int = 4,
    lr: float = 3e-4,
    **kwargs,
) -> run.Partial:
    """Every parameter of SmolLM2-135M, on one GPU.

    Args:
        base: see `continual.continual_pretrain`.
        data: see `continual.continual_pretrain`.
        name: see `continual.continual_pretrain`.
        gpus_per_node: see `continual.continual_pretrain`.
        seq_length: see `continual.continual_pretrain`.
        global_batch_size: see `continual.continual_pretrain`.
        micro_batch_size: see `continual.continual_pretrain`.
        max_steps: see `continual.continual_pretrain`.
        val_check_interval: see `continual.continual_pretrain`.
        limit_val_batches: global batches to validate on from each validation set.
        lr: peak learning rate: a tenth of the 3e-3 at which SmolLM's model of this shape was pretrained
            (config_smollm1_135M.yaml in huggingface/smollm), for batches of a sixtieth of its tokens.
        **kwargs: see `continual.continual_pretrain`.

    Returns:
        A run.Partial of `llm.pretrain`; every field stays editable.

    Raises:
        CptError: `data` is no Blend.
    """
    recipe = continual.continual_pretrain(
        base=base,
        data=data,
        name=name,
        gpus_per_node=gpus_per_node,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        max_steps=max_steps,
        val_check_interval=val_check_interval,
        lr=lr,
        **{"model": "smollm2"} | kwargs,
    )
    # Small batches of short sequences: one of them alone would make a noisy loss.
    check(Settings(limit_val_batches=limit_val_batches))
    recipe.trainer.limit_val_batches = limit_val_batches
    return recipe


@run.cli.factory(target=llm.finetune, name="smollm2_sft")
@checked
def instruction_tune(
    base: str = DEFAULT_BASE,
    data: Conversations | None = None,
    *,
    name: str = "smollm2_sft",
    gpus_per_node: int = 1,
    seq_length: int = 1024,
    global_batch_size: int = 16,
    micro_batch_size: int = 8,
    lr: float = 3e-4,
    **kwargs,
) -> run.Partial:
    """Instruction tuning of SmolLM2-135M, every parameter, on one GPU.

    Args:
        base: see `instruction.instruction_tune`.
        data: see `instruction.instruction_tune`.
        name: see `instruction.instruction_tune`.
        gpus_per_node: see `instruction.instruction_tune`.
        seq_length: see `instruction.instruction_tune`.
        global_batch_size: see `instruction.instruction_tune`.
        micro_batch_size: see `instruction.instruction_tune`.
        lr: peak learning rate, that of `continual_pretrain`.
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
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        lr=lr,
        **{"model": "smollm2"} | kwargs,
    )
