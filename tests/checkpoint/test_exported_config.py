"""What a training changed reaches config.json, or the export is refused; otherwise config.json is the base's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from nemo_cpt.checkpoint import export_hf, import_hf, verify
from nemo_cpt.checkpoint.architecture import read_architecture
from nemo_cpt.checkpoint.rope import Rope, RopeScaling, older_spelling_differs
from nemo_cpt.errors import CptError
from tests.support import small_models as models


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def _imported(shape: str, folder: Path, **changes: Any) -> Path:
    import_hf(models.make(shape, folder / "hf", **changes), folder / "nemo")
    return folder / "nemo"


def _record(nemo: Path, **fields: Any) -> None:
    """Let the context say that the training had other values, as NeMo records an edited recipe."""
    path = nemo / "context" / "io.json"
    content = json.loads(path.read_text())
    (config,) = (each for each in content["objects"].values() if "<root>.model.config" in each.get("paths", ()))
    values = dict(config["items"]) | {
        f"Attr(name='{name}')": {"type": "leaf", "value": value} for name, value in fields.items()
    }
    config["items"] = [list(item) for item in values.items()]
    path.write_text(json.dumps(content))


def test_an_edited_training_exports_as_the_model_that_was_trained(nemo_jobs: Path, tmp_path: Path) -> None:
    """That its logits are those of NeMo's model in memory is tested with the other runs'."""
    (checkpoint,) = (nemo_jobs / "runs" / "edited" / "checkpoints").glob("*-last")
    report = export_hf(checkpoint, tmp_path / "out", dtype="float32")
    base, written = _config(nemo_jobs / "tied_hf"), _config(tmp_path / "out")
    changed = {name for name in base | written if base.get(name) != written.get(name)}
    assert changed == {"rope_theta", "rope_scaling", "rms_norm_eps", "dtype"}
    assert (written["rope_theta"], written["rope_scaling"]["factor"], written["rms_norm_eps"]) == (5e6, 16.0, 1e-4)
    assert [change.split()[0] for change in report.config_changes] == [
        "rms_norm_eps", "rope_theta", "rope_scaling", "dtype:",
    ]  # fmt: skip
    assert verify(checkpoint, tmp_path / "out").identical
    assert len(verify(checkpoint, nemo_jobs / "tied_hf", logits=False).constants) == 3


@pytest.mark.parametrize(
    ("shape", "recorded", "written"),
    [
        ("llama31", {"rotary_base": 5e6}, {"rope_theta": 5e6}),
        ("llama3", {"seq_len_interpolation_factor": 4.0}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("linear_rope", {"seq_len_interpolation_factor": None}, {"rope_scaling": None}),
        ("qwen2", {"layernorm_epsilon": 1e-4}, {"rms_norm_eps": 1e-4}),
        ("mistral_window", {"window_size": None}, {"sliding_window": None}),
        ("llama31", {"seq_length": 4096}, {"max_position_embeddings": 4096}),
        ("llama31", {"seq_length": 64}, {}),
        ("mistral_all", {"seq_length": 4096}, {"max_position_embeddings": 4096, "sliding_window": None}),
    ],
)
def test_what_reaches_config_json(
    shape: str, recorded: dict[str, Any], written: dict[str, Any], tmp_path: Path
) -> None:
    if shape == "mistral_all":  # a window that its 512 positions never fill
        nemo = _imported("mistral_window", tmp_path, sliding_window=512)
    else:
        nemo = _imported(shape, tmp_path)
    _record(nemo, **recorded)
    report = export_hf(nemo, tmp_path / "out")
    assert verify(nemo, tmp_path / "out", logits=False).identical
    expected = _config(tmp_path / "hf") | written
    assert {name: value for name, value in _config(tmp_path / "out").items() if value is not None} == {
        name: value for name, value in expected.items() if value is not None
    }
    assert bool(report.config_changes) is bool(written)
    if not written:
        assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("shape", "recorded", "name"),
    [
        ("llama31", {"share_embeddings_and_output_weights": True}, "tie_word_embeddings"),
        ("llama31", {"window_size": [127, 0]}, "sliding_window"),
        ("llama31", {"seq_len_interpolation_factor": 2.0}, "rope_scaling"),  # beside llama3's
        ("llama31", {"kv_channels": 24}, "head_dim"),
        ("llama31", {"num_layers": 2}, "num_hidden_layers"),
        ("llama31", {"rotary_percent": 0.5}, "rotary_percent"),
        ("llama31", {"qk_layernorm": True}, "qk_layernorm"),
        ("qwen2", {"add_qkv_bias": False}, "attention_bias"),
    ],
)
def test_what_config_json_cannot_say_is_refused(
    shape: str, recorded: dict[str, Any], name: str, tmp_path: Path
) -> None:
    nemo = _imported(shape, tmp_path)
    _record(nemo, **recorded)
    with pytest.raises(CptError, match=rf"trained as another model than .*{name} .* in its context"):
        export_hf(nemo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_cannot_say_what_changed(nemo_jobs: Path, tmp_path: Path) -> None:
    (checkpoint,) = (nemo_jobs / "runs" / "lora" / "checkpoints").glob("*-last")
    other = models.make("llama31", tmp_path / "hf", rope_theta=10000.0, vocab_size=models.MORE_ROWS)
    with pytest.raises(CptError, match=r"rope_theta .* is 500000.0 in .* and 10000.0 .*An adapter cannot say so"):
        export_hf(checkpoint, tmp_path / "adapter", base=other, adapter=True)
    export_hf(checkpoint, tmp_path / "merged", base=other)
    assert _config(tmp_path / "merged")["rope_theta"] == 500000.0

    _edit = _config(nemo_jobs / "hf") | {
        "max_position_embeddings": 16
    }  # the sequences were longer; angles are the same
    shorter = shutil.copytree(nemo_jobs / "hf", tmp_path / "shorter")
    (shorter / "config.json").write_text(json.dumps(_edit))
    export_hf(checkpoint, tmp_path / "adapter", base=shorter, adapter=True)


def test_a_checkpoint_without_context_is_exported_with_a_warning(tmp_path: Path) -> None:
    nemo = _imported("llama31", tmp_path)
    for name in ("io.json", "model.yaml"):
        (nemo / "context" / name).unlink()
    (warning,) = export_hf(nemo, tmp_path / "out").warnings
    assert "has no context" in warning
    (warning,) = verify(nemo, tmp_path / "out", logits=False).warnings
    assert "were not compared" in warning


def test_another_tokenizer_than_the_runs_is_said(tmp_path: Path) -> None:
    nemo = _imported("llama31", tmp_path)
    assert export_hf(nemo, tmp_path / "same", base=tmp_path / "hf").warnings == ()
    path = tmp_path / "hf" / "tokenizer.json"
    path.write_text(path.read_text().replace('"t7"', '"seven"'))
    (warning,) = export_hf(nemo, tmp_path / "other", base=tmp_path / "hf").warnings
    assert "tokenizer.json is exported, and is not the one that the run trained with" in warning


@pytest.mark.parametrize("name", ["io.json", "model.yaml"])
def test_a_damaged_context_is_refused(name: str, tmp_path: Path) -> None:
    nemo = _imported("llama31", tmp_path)
    (nemo / "context" / name).write_text("{")
    with pytest.raises(CptError, match=rf"{name} cannot be read"):
        export_hf(nemo, tmp_path / "out")


def test_rope_parameters_alone_leave_in_both_spellings(tmp_path: Path) -> None:
    hf = models.make("llama31", tmp_path / "hf")
    config = _config(hf)
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling")}
    (hf / "config.json").write_text(json.dumps(config))
    import_hf(hf, tmp_path / "nemo")
    report = export_hf(tmp_path / "nemo", tmp_path / "out")
    assert len(report.config_changes) == 1
    assert "transformers 4 passes over rope_parameters" in report.config_changes[0]
    loaded = AutoConfig.from_pretrained(tmp_path / "out")
    assert (loaded.rope_theta, loaded.rope_scaling["factor"]) == (500000.0, 8.0)
    assert read_architecture(tmp_path / "out") == read_architecture(hf)
    rope = Rope(500000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
    assert older_spelling_differs(_config(hf), rope)
    assert not older_spelling_differs(_config(tmp_path / "out"), rope)

    import_hf(tmp_path / "out", tmp_path / "again")
    assert export_hf(tmp_path / "again", tmp_path / "twice").config_changes == ()
