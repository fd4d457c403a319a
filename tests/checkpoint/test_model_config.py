"""What a recipe's, a job's and a checkpoint's model config say is compared with config.json by content."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_cpt.checkpoint import import_hf
from nemo_cpt.checkpoint.architecture import parse_config, read_architecture
from nemo_cpt.checkpoint.model_config import constants_of, constants_of_nemo, described, differences, read_model_config
from tests.support import small_models as models

LLAMA31_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def _differing(config: Any, **changes: object) -> dict[str, tuple[object, object]]:
    theirs = constants_of(parse_config({**LLAMA31_8B, **changes}, "config.json"))
    return {each.name: (each.one, each.other) for each in differences(constants_of_nemo(config), theirs)}


@pytest.mark.parametrize("shape", models.SHAPES)
def test_an_import_says_what_its_config_json_says(shape: str, tmp_path: Path) -> None:
    hf = models.make(shape, tmp_path / "hf")
    import_hf(hf, tmp_path / "nemo")
    assert not differences(constants_of_nemo(read_model_config(tmp_path / "nemo")), constants_of(read_architecture(hf)))


def test_a_recipes_config_and_a_built_one_state_their_defaults_too() -> None:
    import nemo_run as run
    from nemo.collections import llm

    for config in (run.Config(llm.Llama31Config8B, seq_length=8192), llm.Llama31Config8B(apply_rope_fusion=False)):
        assert not _differing(config)
        assert _differing(config, rope_scaling=None).keys() == {"rope_scaling"}  # Llama 3, tensor by tensor the same
    assert _differing(run.Config(llm.MistralConfig7B, rotary_base=500000.0), rope_scaling=None) == {
        "sliding_window": (4097, None)
    }
    gemma = _differing(run.Config(llm.GemmaConfig2B))
    assert {"model", "activation_func", "layernorm_zero_centered_gamma", "tie_word_embeddings"} <= gemma.keys()


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("rotary_base", 5e6, "rope_theta"),
        ("scale_factor", 32.0, "rope_scaling"),
        ("old_context_len", 4096, "rope_scaling"),
        ("seq_len_interpolation_factor", 2.0, "rope_scaling"),
        ("layernorm_epsilon", 1e-6, "rms_norm_eps"),
        ("window_size", (4095, 0), "sliding_window"),
        ("kv_channels", 64, "head_dim"),
        ("share_embeddings_and_output_weights", True, "tie_word_embeddings"),
        ("vocab_size", 128384, "vocab_size"),
        ("rotary_percent", 0.5, "rotary_percent"),
        ("qk_layernorm", True, "qk_layernorm"),
        ("num_moe_experts", 8, "num_moe_experts"),
    ],
)
def test_every_constant_is_seen(field: str, value: object, name: str) -> None:
    import nemo_run as run
    from nemo.collections import llm

    assert _differing(run.Config(llm.Llama31Config8B, **{field: value})).keys() == {name}


def test_the_context_of_a_training_states_everything(nemo_jobs: Path) -> None:
    base = constants_of(read_architecture(nemo_jobs / "hf"))
    for run in ("full", "lora"):
        (checkpoint,) = (nemo_jobs / "runs" / run / "checkpoints").glob("*-last")
        found = constants_of_nemo(read_model_config(checkpoint))
        assert found == base


def test_what_nemo_reads_goes_before_what_people_read(tmp_path: Path) -> None:
    import_hf(models.make("mistral_window", tmp_path / "hf"), tmp_path / "nemo")
    path = tmp_path / "nemo" / "context" / "io.json"
    content = json.loads(path.read_text())
    (config,) = (each for each in content["objects"].values() if "<root>.model.config" in each.get("paths", ()))
    values = dict(config["items"])
    values["Attr(name='rotary_base')"]["value"] = 5e6
    path.write_text(json.dumps(content))
    found = constants_of_nemo(read_model_config(tmp_path / "nemo"))
    assert (found["rope_theta"], found["sliding_window"]) == (5e6, 8)
    theirs = constants_of(read_architecture(tmp_path / "hf"))
    assert described(differences(found, theirs), "the context", "config.json") == (
        "rope_theta (NeMo: rotary_base) is 5000000.0 in the context and 10000.0 in config.json"
    )
