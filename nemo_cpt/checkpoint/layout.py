"""Which Hugging Face tensor is which part of which Megatron tensor.

Megatron stacks the layers' tensors along a leading layer axis, joins gate and up projection in `linear_fc1`, and joins
query, key and value in `linear_qkv`, group by group: the query heads of the first key-value head, its key, its value,
then the next group's. Same as NeMo's own importer (nemo/collections/llm/gpt/model/llama.py) and
TransformerBlock.sharded_state_dict of megatron-core 0.15, with the names of the Transformer Engine layer spec, to which
the local spec maps its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from nemo_cpt.checkpoint.architecture import Architecture

PREFIX = "module."  # NeMo saves the module that Megatron's DDP wraps
LAYERS = "decoder.layers."
EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm"
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")  # Hugging Face's names: Llama's kin, GPT-2
HEAD = "lm_head.weight"
# Of `Slot.part`: GPT-2's linear layers, which transformers keeps as [in, out]; `qkv` has query, key and value side by
# side, which Megatron orders by heads, their bias alike.
TURNED = ("turned", "qkv")


@dataclass(frozen=True)
class Slot:
    """One Hugging Face tensor's place in the Megatron checkpoint.

    Attributes:
        name: the tensor's name in the Hugging Face files.
        shape: its shape there.
        key: the Megatron tensor's name, without NeMo's `module.` and without a layer's number.
        layer: the index along Megatron's leading layer axis; None where there is none.
        part: `whole`; `gate` or `up` of linear_fc1; `q`, `k` or `v` of linear_qkv; `vocab`, which may be padded; one of
            `TURNED`.
    """

    name: str
    shape: tuple[int, ...]
    key: str
    layer: int | None
    part: str = "whole"

    @property
    def rows(self) -> tuple[int, int]:
        """Start and stop of its rows in a Megatron tensor that it shares with another, or with padding; not for q, k,
        v and `TURNED`."""
        start = self.shape[0] if self.part == "up" else 0
        return start, start + self.shape[0]


# The one list from which import, export, merge and verify work: what is missing here is missing everywhere.
def slots(arch: Architecture) -> list[Slot]:
    """All tensors of a model, in the order in which transformers writes them."""
    if arch.like_gpt2:
        return [*_gpt2_slots(arch), *_head(arch)]
    found = [Slot(EMBEDDINGS[0], (arch.vocab_size, arch.hidden_size), EMBEDDING, None, "vocab")]
    for layer in range(arch.num_hidden_layers):
        found += _layer_slots(arch, layer)
    found.append(Slot("model.norm.weight", (arch.hidden_size,), f"{FINAL_NORM}.weight", None))
    return [*found, *_head(arch)]


def _head(arch: Architecture) -> Iterator[Slot]:
    if not arch.tie_word_embeddings:
        yield Slot(HEAD, (arch.vocab_size, arch.hidden_size), OUTPUT, None, "vocab")


def _layer_slots(arch: Architecture, layer: int) -> Iterator[Slot]:
    hidden, ffn = arch.hidden_size, arch.intermediate_size
    rows = {"q": arch.num_attention_heads * arch.head_dim, "k": arch.num_key_value_heads * arch.head_dim}
    rows["v"] = rows["k"]
    name, key = f"model.layers.{layer}.", LAYERS

    for part, size in rows.items():
        yield Slot(f"{name}self_attn.{part}_proj.weight", (size, hidden), f"{key}{QKV}.weight", layer, part)
        if arch.qkv_bias:
            yield Slot(f"{name}self_attn.{part}_proj.bias", (size,), f"{key}{QKV}.bias", layer, part)
    yield Slot(f"{name}self_attn.o_proj.weight", (hidden, rows["q"]), f"{key}{PROJ}.weight", layer)
    if arch.qk_norm:
        for part, norm in QK_NORMS.items():
            yield Slot(f"{name}self_attn.{part}_norm.weight", (arch.head_dim,), f"{key}{norm}.weight", layer)
    for part in ("gate", "up"):
        yield Slot(f"{name}mlp.{part}_proj.weight", (ffn, hidden), f"{key}{FC1}.weight", layer, part)
    yield Slot(f"{name}mlp.down_proj.weight", (hidden, ffn), f"{key}{FC2}.weight", layer)
    # Transformer Engine norms within the linear layer that follows: both norms are that layer's there.
    yield Slot(f"{name}input_layernorm.weight", (hidden,), f"{key}{QKV}.layer_norm_weight", layer)
    yield Slot(f"{name}post_attention_layernorm.weight", (hidden,), f"{key}{FC1}.layer_norm_weight", layer)


def _gpt2_slots(arch: Architecture) -> Iterator[Slot]:
    hidden, ffn = arch.hidden_size, arch.intermediate_size
    yield Slot(EMBEDDINGS[1], (arch.vocab_size, hidden), EMBEDDING, None, "vocab")
    yield Slot("transformer.wpe.weight", (arch.max_position_embeddings, hidden), POSITIONS, None)
    for layer in range(arch.num_hidden_layers):
        name = f"transformer.h.{layer}."
        for norm, behind in (("ln_1", QKV), ("ln_2", FC1)):
            for part in ("weight", "bias"):
                yield Slot(f"{name}{norm}.{part}", (hidden,), f"{LAYERS}{behind}.layer_norm_{part}", layer)
        # Shapes as OpenAI's Conv1D keeps its weights, [in, out]; see `TURNED`.
        for linear, key, shape, part in (
            ("attn.c_attn", QKV, (hidden, 3 * hidden), "qkv"),
            ("attn.c_proj", PROJ, (hidden, hidden), "turned"),
            ("mlp.c_fc", FC1, (hidden, ffn), "turned"),
            ("mlp.c_proj", FC2, (ffn, hidden), "turned"),
        ):
            yield Slot(f"{name}{linear}.weight", shape, f"{LAYERS}{key}.weight", layer, part)
            yield Slot(f"{name}{linear}.bias", shape[1:], f"{LAYERS}{key}.bias", layer, part)
    for part in ("weight", "bias"):
        yield Slot(f"transformer.ln_f.{part}", (hidden,), f"{FINAL_NORM}.{part}", None)


QKV = "self_attention.linear_qkv"
PROJ = "self_attention.linear_proj"
QK_NORMS = {"q": "self_attention.q_layernorm", "k": "self_attention.k_layernorm"}
FC1 = "mlp.linear_fc1"
FC2 = "mlp.linear_fc2"


def extra_state_modules(arch: Architecture) -> tuple[str, ...]:
    """A layer's modules whose `_extra_state` (fp8 scales, else empty) Transformer Engine or the local spec asks for."""
    norms = tuple(QK_NORMS.values()) if arch.qk_norm else ()
    return (QKV, PROJ, "self_attention.core_attention", *norms, FC1, FC2)


def merge_qkv(parts: Mapping[str, np.ndarray], arch: Architecture) -> np.ndarray:
    """Join `q` [heads * d, *], `k` and `v` [groups * d, *] into Megatron's [groups * (heads / group + 2) * d, *]."""
    groups, rest = arch.num_key_value_heads, parts["q"].shape[1:]
    # Per group, not per part: tensor parallelism cuts the rows, and each rank must have whole groups.
    by_group = [parts[part].reshape(groups, -1, *rest) for part in ("q", "k", "v")]
    return np.concatenate(by_group, axis=1).reshape(-1, *rest)


def split_qkv(merged: np.ndarray, arch: Architecture) -> dict[str, np.ndarray]:
    """The inverse of `merge_qkv`, for every tensor whose first axis is linear_qkv's output."""
    groups, dim, queries = arch.num_key_value_heads, arch.head_dim, arch.heads_per_group * arch.head_dim
    rest = merged.shape[1:]
    by_group = merged.reshape(groups, queries + 2 * dim, *rest)
    bounds = {"q": (0, queries), "k": (queries, queries + dim), "v": (queries + dim, queries + 2 * dim)}
    return {part: by_group[:, start:stop].reshape(-1, *rest) for part, (start, stop) in bounds.items()}


def to_megatron(slot: Slot, tensor: np.ndarray, arch: Architecture) -> np.ndarray:
    """What Megatron has of a tensor of one of the parts `TURNED`."""
    rows = tensor.T
    if slot.part == "qkv":
        rows = merge_qkv(dict(zip(("q", "k", "v"), np.split(rows, 3), strict=True)), arch)
    return np.ascontiguousarray(rows)


def from_megatron(slot: Slot, tensor: np.ndarray, arch: Architecture) -> np.ndarray:
    """The inverse of `to_megatron`."""
    if slot.part == "qkv":
        tensor = np.concatenate(list(split_qkv(tensor, arch).values()))
    return np.ascontiguousarray(tensor.T)
