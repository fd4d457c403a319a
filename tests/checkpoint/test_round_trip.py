"""Hugging Face → NeMo → Hugging Face keeps every bit and every small file, for every shape."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_cpt.checkpoint import export_hf, import_hf, verify
from tests.support import small_models as models


@pytest.mark.parametrize("shape", models.SHAPES)
def test_every_shape_comes_back_bit_for_bit(shape: str, tmp_path: Path) -> None:
    hf = models.make(shape, tmp_path / "hf")
    imported = import_hf(hf, tmp_path / "nemo")
    exported = export_hf(tmp_path / "nemo", tmp_path / "back")

    models.assert_same_weights(hf, tmp_path / "back")
    assert imported.tensors == exported.tensors == len(models.tensors(hf))
    assert exported.cast_from is None
    for path in hf.glob("*.json"):
        if "index" not in path.name:
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    assert verify(tmp_path / "nemo", hf, logits=False).identical


def test_the_export_loads_and_generates_like_the_original(tmp_path: Path) -> None:
    hf = models.make("llama31", tmp_path / "hf")
    import_hf(hf, tmp_path / "nemo")
    export_hf(tmp_path / "nemo", tmp_path / "back", shard_bytes=50_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2

    tokens = AutoTokenizer.from_pretrained(tmp_path / "back")("t5 t6 t7", return_tensors="pt")["input_ids"]
    outputs = [
        AutoModelForCausalLM.from_pretrained(folder).generate(tokens, max_new_tokens=12, do_sample=False)
        for folder in (hf, tmp_path / "back")
    ]
    assert torch.equal(*outputs)


def test_old_llama_2_rotary_buffers_are_dropped_and_reported(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    hf = models.make("llama2", tmp_path / "hf")
    every = models.tensors(hf) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    for path in hf.glob("model*"):
        path.unlink()
    save_file(every, hf / "model.safetensors")
    report = import_hf(hf, tmp_path / "nemo")
    assert report.dropped == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def test_another_dtype_is_written_into_config_json(tmp_path: Path) -> None:
    hf = models.make("llama3", tmp_path / "hf")
    import_hf(hf, tmp_path / "nemo")
    report = export_hf(tmp_path / "nemo", tmp_path / "wide", dtype="float32")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert report.cast_from == "bfloat16"
    assert "float32" in (config.get("dtype"), config.get("torch_dtype"))
    for name, tensor in models.tensors(tmp_path / "wide").items():
        assert torch.equal(tensor, models.tensors(hf)[name].float())


def test_verify_names_the_tensor_that_differs(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    hf = models.make("qwen2", tmp_path / "hf")
    import_hf(hf, tmp_path / "nemo")
    path = next(p for p in sorted(hf.glob("*.safetensors")) if "model.layers.2.self_attn.k_proj.bias" in load_file(p))
    changed = load_file(path)
    changed["model.layers.2.self_attn.k_proj.bias"][3] += 1.0
    save_file(changed, path, metadata={"format": "pt"})

    report = verify(tmp_path / "nemo", hf, logits=False)
    assert not report.identical
    assert [(d.name, d.values) for d in report.differences] == [("model.layers.2.self_attn.k_proj.bias", 1)]
