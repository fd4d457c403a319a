"""Rotary embeddings: config.json in any spelling gives the angles that transformers computes, or is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_cpt.checkpoint.architecture import Architecture, parse_config
from nemo_cpt.checkpoint.context import config_arguments
from nemo_cpt.checkpoint.rope import Rope, older_spelling_differs, set_rope
from nemo_cpt.checkpoint.transformers_config import transformers_config
from nemo_cpt.errors import CptError
from tests.support import small_models as models

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 8192,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
THETA_AND_LLAMA3 = {**LLAMA3, "rope_theta": 500000.0}


def _parse(**fields: Any) -> Architecture:
    return parse_config({"model_type": "llama", **SHAPE, **fields}, "config.json")


# --- the property: parsed or refused, and if parsed, transformers' own angles ---

_thetas = st.sampled_from([10000, 10000.0, 500000.0, 1e6, 0.5])
_numbers = st.one_of(
    st.sampled_from([0.5, 1, 1.0, 2.0, 4, 8.0, 64, 8192, 10000, 10000.0, 500000.0]),
    st.sampled_from([0, -1.0, float("nan"), float("inf"), None, True, "8", 10**400]),
)
_keys = st.sampled_from(
    ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "rope_theta", "mscale",
     "attention_factor", "partial_rotary_factor", "beta_fast"]
)  # fmt: skip
_kinds = st.sampled_from(["default", "linear", "llama3", "yarn", "dynamic", None, 3])
_types = st.one_of(
    st.fixed_dictionaries({"rope_type": _kinds}),
    st.fixed_dictionaries({"type": _kinds}),
    st.fixed_dictionaries({"rope_type": _kinds, "type": _kinds}),
    st.just({}),
)
_whole = st.sampled_from(
    [
        {"rope_type": "linear", "factor": 2.0},
        LLAMA3,
        {"rope_type": "default"},
        THETA_AND_LLAMA3,
        {**LLAMA3, "factor": 1},
    ]
)
_dictionaries = st.one_of(
    _whole,
    st.builds(lambda whole, theta: {**whole, "rope_theta": theta}, _whole, _thetas),
    st.builds(lambda whole, extra: {**whole, **extra}, _whole, st.dictionaries(_keys, _numbers, max_size=2)),
    st.builds(lambda kinds, extra: {**kinds, **extra}, _types, st.dictionaries(_keys, _numbers, max_size=5)),
    st.sampled_from(
        [None, {}, "linear", [], {"full_attention": LLAMA3}, {"full_attention": {}, "sliding_attention": {}}]
    ),
)
_models = {"model_type": st.sampled_from(["llama", "llama", "llama", "mistral", "qwen2"])}
_any_config = st.fixed_dictionaries(
    _models,
    optional={"rope_theta": _thetas | _numbers, "rope_scaling": _dictionaries, "rope_parameters": _dictionaries},
)


@st.composite
def _one_rope_spelled_several_ways(draw: st.DrawFn) -> dict[str, Any]:
    theta, scaling = draw(_thetas), draw(_whole)
    spellings = {
        "rope_theta": theta,
        "rope_scaling": {"rope_theta": theta, **scaling} if draw(st.booleans()) else scaling,
        "rope_parameters": {"rope_theta": theta, **scaling} if draw(st.booleans()) else scaling,
    }
    chosen = draw(st.sets(st.sampled_from(sorted(spellings)), min_size=1))
    return {**draw(st.fixed_dictionaries(_models)), **{name: spellings[name] for name in chosen}}


_configs = _any_config | _one_rope_spelled_several_ways()


@settings(max_examples=600, deadline=None)
@given(_configs)
@example({"model_type": "llama", "rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": THETA_AND_LLAMA3})
@example({"model_type": "llama", "rope_parameters": {"full_attention": THETA_AND_LLAMA3}})
@example({"model_type": "llama", "rope_parameters": THETA_AND_LLAMA3})
@example({"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3, "rope_parameters": THETA_AND_LLAMA3})
@example({"model_type": "llama", "rope_scaling": LLAMA3, "rope_parameters": THETA_AND_LLAMA3})
@example({"model_type": "mistral", "rope_scaling": LLAMA3})
@example({"model_type": "qwen2", "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 1e6})
def test_refused_or_the_angles_of_transformers(fields: dict[str, Any]) -> None:
    try:
        arch = parse_config({**SHAPE, **fields}, "config.json")
    except CptError:
        return
    ours = _megatron_angles(arch)
    for theirs in (
        _transformers5_angles(fields),
        None if "rope_parameters" in fields else _transformers_angles(fields),
    ):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def _megatron_angles(arch: Architecture) -> torch.Tensor:
    """What NeMo's model turns by at position 1, from the arguments that the import's context gives its config."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from nemo.collections.llm.gpt.model.llama import apply_rope_scaling

    said = config_arguments(arch)
    rotary = RotaryEmbedding(
        said["kv_channels"],
        rotary_percent=1.0,
        rotary_base=said["rotary_base"],
        seq_len_interpolation_factor=said.get("seq_len_interpolation_factor"),
        use_cpu_initialization=True,
    )
    if "scale_factor" in said:
        names = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
        rotary.inv_freq = apply_rope_scaling(rotary.inv_freq, *(said[name] for name in names))
    return rotary.get_freqs_non_repeated(2)[1]


def _transformers_angles(fields: Mapping[str, Any]) -> torch.Tensor:
    """What the installed transformers, a 4, computes; with its scaling of the attention, which has to be 1."""
    config = AutoConfig.for_model(**{**SHAPE, **json.loads(json.dumps(fields))})
    scaling = getattr(config, "rope_scaling", None)
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else "default"
    inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    assert attention_scaling == 1
    return inv_freq


def _transformers5_angles(fields: Mapping[str, Any]) -> torch.Tensor:
    """The same, after what transformers 5 does with the older fields (RotaryEmbeddingConfigMixin)."""
    parameters = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    theta = parameters.pop("rope_theta", fields.get("rope_theta", 10000.0))
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    return _transformers_angles({"model_type": fields["model_type"], "rope_theta": theta, "rope_scaling": parameters})


# --- the same by name ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 10000.0, "rope_parameters": THETA_AND_LLAMA3}, "rope_theta says 10000.0 and rope_parameters"),
        ({"rope_scaling": None, "rope_theta": 500000.0, "rope_parameters": THETA_AND_LLAMA3}, "rope_scaling says None"),
        ({"rope_scaling": {**LLAMA3, "factor": 32.0}, "rope_parameters": LLAMA3}, "rope_scaling says .*32"),
        (
            {"rope_scaling": {**LLAMA3, "rope_theta": 500000.0}},
            "rope_theta, left out, says 10000.0 and rope_scaling.rope_theta says",
        ),
        ({"rope_parameters": {"full_attention": THETA_AND_LLAMA3}}, r"differs by kind of layer \(full_attention\)"),
        ({"rope_scaling": {"factor": 8.0}}, "has no rope_type"),
        ({"rope_parameters": {"factor": 8.0}}, "rope_parameters's key 'factor' with value 8.0 is refused"),
        ({"rope_scaling": {**LLAMA3, "type": "linear"}}, "rope_type says llama3 and rope_scaling.type says linear"),
        ({"rope_scaling": {**LLAMA3, "mscale": 1.0}}, r"--ignore-field rope_scaling\.mscale"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "rope_scaling.factor cannot be inf"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "rope_scaling.factor cannot be -2.0"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of type 'linear' lacks factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor 4 is not below"),
        ({"rope_theta": 0}, "rope_theta cannot be 0"),
        ({"rope_theta": None}, "rope_theta cannot be None"),
        ({"model_type": "mistral", "rope_scaling": LLAMA3}, "'llama3' is supported for model_type 'llama'"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CptError, match=message):
        _parse(**fields)


def test_a_key_can_be_allowed_by_name() -> None:
    config = {"model_type": "llama", **SHAPE, "rope_scaling": {**LLAMA3, "mscale": 1.0}}
    assert parse_config(config, "config.json", ["rope_scaling.mscale"]) == _parse(rope_scaling=LLAMA3)


@settings(deadline=None)
@given(_configs)
def test_what_is_written_is_read_alike_by_both(fields: dict[str, Any]) -> None:
    try:
        arch = parse_config({**SHAPE, **fields}, "config.json")
    except CptError:
        return
    written = {**SHAPE, **fields}
    set_rope(written, Rope(arch.rope_theta, arch.rope_scaling))
    assert parse_config(written, "config.json") == arch
    assert not older_spelling_differs(written, Rope(arch.rope_theta, arch.rope_scaling))
    torch.testing.assert_close(_transformers_angles(written), _transformers5_angles(written), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "differs"),
    [
        ({"rope_parameters": THETA_AND_LLAMA3}, True),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, False),
        ({"rope_theta": 500000.0, "rope_scaling": LLAMA3, "rope_parameters": THETA_AND_LLAMA3}, False),
        ({"rope_theta": 500000.0, "rope_scaling": LLAMA3}, False),
    ],
)
def test_what_transformers_4_would_misread(fields: dict[str, Any], differs: bool, tmp_path: Path) -> None:
    arch = _parse(**fields)
    assert older_spelling_differs(fields, Rope(arch.rope_theta, arch.rope_scaling)) is differs


def test_transformers_is_handed_what_it_understands(tmp_path: Path) -> None:
    llama = {"model_type": "llama", **SHAPE}
    (tmp_path / "config.json").write_text(json.dumps({**llama, "rope_parameters": THETA_AND_LLAMA3}))
    assert AutoConfig.from_pretrained(tmp_path).rope_theta == 10000.0  # what it makes of it by itself
    config = transformers_config(tmp_path)
    assert (config.rope_theta, config.rope_scaling) == (500000.0, LLAMA3)
    (tmp_path / "config.json").write_text(json.dumps({**llama, "rope_parameters": {"full_attention": LLAMA3}}))
    with pytest.raises(CptError, match="differs by kind of layer"):
        transformers_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))  # what is not ours is left to it
    assert transformers_config(tmp_path).model_type == "gpt2"


def test_whoever_loads_a_model_reads_its_rope_parameters(tmp_path: Path) -> None:
    from nemo_cpt.inference.transformers_engine import TransformersEngine

    hf = models.make("llama31", tmp_path / "hf")
    before = TransformersEngine(hf, device="cpu").network
    config = json.loads((hf / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling")}
    (hf / "config.json").write_text(json.dumps(config))
    after = TransformersEngine(hf, device="cpu").network
    tokens = torch.arange(5, 45)[None]
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits)
