"""Bytes on disk, from a model's shape alone."""

from nemo_cpt.checkpoint.architecture import Architecture

WEIGHTS = 2  # bf16
OPTIMIZER = 12  # Adam in fp32: master copy, first and second moment
ON_CPU = 12  # fp32 throughout: weights and two moments, no master copy


def parameters(arch: Architecture) -> int:
    """A decoder's parameters, embeddings counted once where they are tied."""
    attention = arch.num_attention_heads * arch.head_dim
    groups = arch.num_key_value_heads * arch.head_dim
    qkv = attention + 2 * groups
    layer = arch.hidden_size * (qkv + attention + 3 * arch.intermediate_size + 2) + arch.qkv_bias * qkv
    embeddings = arch.vocab_size * arch.hidden_size * (1 if arch.tie_word_embeddings else 2)
    return embeddings + arch.num_hidden_layers * layer + arch.hidden_size


def adapter_parameters(arch: Architecture, rank: int) -> int:
    """LoRA's parameters on the four linear layers of each decoder layer, as Megatron fuses them.

    Args:
        arch: the model.
        rank: columns of A and rows of B; a layer of shape [out, in] gets rank * (in + out) parameters.
    """
    attention = arch.num_attention_heads * arch.head_dim
    qkv = attention + 2 * arch.num_key_value_heads * arch.head_dim
    ends = (arch.hidden_size + qkv) + (attention + arch.hidden_size)
    ends += (arch.hidden_size + 2 * arch.intermediate_size) + (arch.intermediate_size + arch.hidden_size)
    return arch.num_hidden_layers * rank * ends


def checkpoint_bytes(arch: Architecture, lora_rank: int | None, on_cpu: bool = False) -> int:
    """A training checkpoint's bytes: what is trained, with Adam's fp32 states; LoRA writes the adapters alone.

    Args:
        arch: the base model.
        lora_rank: rank of the adapters; None where every parameter is trained.
        on_cpu: whether the run is one in fp32 on the CPU.
    """
    trained = parameters(arch) if lora_rank is None else adapter_parameters(arch, lora_rank)
    return trained * (ON_CPU if on_cpu else WEIGHTS + OPTIMIZER)
