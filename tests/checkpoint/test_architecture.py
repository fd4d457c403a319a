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
