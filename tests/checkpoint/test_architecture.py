"""config.json's fields, given, null and left out, mean what they mean to transformers, or are refused."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from nemo_cpt.checkpoint.architecture import parse_config
from nemo_cpt.errors import CptError

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "vocab_size": 256,
}
GIVEN = {
    "num_key_value_heads": [2, 64],
    "head_dim": [16, 32],
    "max_position_embeddings": [512, 131072],
    "sliding_window": [8, 4096],
    "rms_norm_eps": [1e-5],
    "rope_theta": [500000.0],
    "tie_word_embeddings": [True, False],
    "use_sliding_window": [False],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2],
    "attention_bias": [False],
    "hidden_act": ["silu"],
}
_fields = {name: st.sampled_from([*values, None]) for name, values in GIVEN.items()}


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]), st.fixed_dictionaries({}, optional=_fields))
def test_refused_or_what_transformers_takes(model_type: str, fields: dict[str, Any]) -> None:
    config = {"model_type": model_type, **SIZES, **fields}
    try:
        arch = parse_config(config, "config.json")
    except CptError:
        return
    theirs = AutoConfig.for_model(**config)
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta"):
        assert getattr(arch, name) == getattr(theirs, name), name
    assert arch.tie_word_embeddings == bool(theirs.tie_word_embeddings)
    assert arch.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    window = getattr(theirs, "sliding_window", None)
    longest = arch.max_position_embeddings
    assert min(arch.sliding_window or longest, longest) == min(window or longest, longest)
    assert theirs.hidden_act == "silu"


GPT2_GIVEN = {
    "n_inner": [200],
    "n_positions": [512],
    "layer_norm_epsilon": [1e-6],
    "tie_word_embeddings": [True, False],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu", "relu"],
    "resid_pdrop": [0.0, 0.1],
    "scale_attn_by_inverse_layer_idx": [False, True],
    "reorder_and_upcast_attn": [False, True],
    "rope_theta": [500000.0],
    "num_key_value_heads": [2],
    "n_ctx": [7],
}


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in GPT2_GIVEN.items()}))
def test_gpt2_is_refused_or_what_transformers_takes(fields: dict[str, Any]) -> None:
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, **fields}
    try:
        arch = parse_config(config, "config.json")
    except CptError:
        other = fields.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh")
        assert other or fields.keys() & {"resid_pdrop", *(name for name in fields if fields[name] is True)}
        return
    theirs = AutoConfig.for_model(**config)
    assert (arch.hidden_size, arch.num_hidden_layers, arch.num_attention_heads) == (64, 2, 4)
    assert (arch.num_key_value_heads, arch.head_dim, arch.rope_theta) == (4, 16, 10000.0)
    assert arch.intermediate_size == (theirs.n_inner or 256)
    assert (arch.max_position_embeddings, arch.rms_norm_eps) == (theirs.n_positions, theirs.layer_norm_epsilon)
    assert arch.tie_word_embeddings == theirs.tie_word_embeddings
    assert theirs.resid_pdrop == (0.1 if "resid_pdrop" not in fields else 0)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_null_is_not_left_out(model_type: str) -> None:
    config = {"model_type": model_type, **SIZES}
    silent = parse_config(config, "config.json")
    null = parse_config({**config, "num_key_value_heads": None, "sliding_window": None}, "config.json")
    assert null.sliding_window is None
    assert null.num_key_value_heads == 64
    assert silent.sliding_window == (4096 if model_type == "mistral" else None)
    assert silent.num_key_value_heads == {"llama": 64, "mistral": 8, "qwen2": 32, "qwen3": 32}[model_type]
    for name in ("rms_norm_eps", "max_position_embeddings", "rope_theta", "hidden_act", "partial_rotary_factor"):
        with pytest.raises(CptError, match=name):
            parse_config({**config, name: None}, "config.json")
