"""Bytes on disk, from a model's shape alone."""

from nemo_cpt.checkpoint.architecture import Architecture
from nemo_cpt.planning import Workload

WEIGHTS = 2  # bf16
OPTIMIZER = 12  # Adam in fp32: master copy, first and second moment
ON_CPU = 12  # fp32 throughout: weights and two moments, no master copy


def parameters(arch: Architecture) -> int:
    """A decoder's parameters, embeddings counted once where they are tied."""
    return _workload(arch).parameters


def _workload(arch: Architecture) -> Workload:
    return Workload(
        num_layers=arch.num_hidden_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.intermediate_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_key_value_heads,
        kv_channels=arch.head_dim,
        vocab_size=arch.vocab_size,
        tied=arch.tie_word_embeddings,
        qkv_bias=arch.qkv_bias,
        qk_norm=arch.qk_norm,
        gated=not arch.like_gpt2,
    )


def checkpoint_bytes(
    arch: Architecture, lora_rank: int | None, trained_embeddings: bool = False, on_cpu: bool = False
) -> int:
    """A training checkpoint's bytes: what is trained, with Adam's fp32 states; LoRA writes what it trains alone.

    Args:
        arch: the base model.
        lora_rank: rank of the adapters; None where every parameter is trained.
        trained_embeddings: whether the embedding and the output layer are trained beside the adapters.
        on_cpu: whether the run is one in fp32 on the CPU.
    """
    # Through the planner's own counting, so that doctor and plan cannot disagree.
    work = _workload(arch).replace(lora_rank=lora_rank, trained_embeddings=trained_embeddings)
    return work.trained_parameters * (ON_CPU if on_cpu else WEIGHTS + OPTIMIZER)


def export_bytes(arch: Architecture) -> int:
    """An exported model's bytes."""
    return _workload(arch).parameters * WEIGHTS
