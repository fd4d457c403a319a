"""Checkpoints of NeMo's own training, with optimizer state and with LoRA, leave as the model that was trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_cpt.checkpoint import export_hf, import_hf, verify
from nemo_cpt.errors import CptError
from nemo_cpt.inference import Sampling
from nemo_cpt.inference.transformers_engine import TransformersEngine
from nemo_cpt.made import RECORD
from tests.support import small_models as models

TOKENS = torch.arange(5, 45)[None]


def _checkpoint(folder: Path, run: str) -> Path:
    (path,) = (folder / "runs" / run / "checkpoints").glob("*-last")
    return path


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits[0]


def _load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def _agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_a_full_training_exports_as_trained_without_being_told_the_base(nemo_jobs: Path, tmp_path: Path) -> None:
    report = export_hf(_checkpoint(nemo_jobs, "full"), tmp_path / "out", dtype="float32")
    assert report.cast_from is None
    assert _agree(_logits(_load(tmp_path / "out")), torch.load(nemo_jobs / "runs" / "full_logits.pt"))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (nemo_jobs / "hf" / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 512  # not the training's sequence length of 32
    assert config["eos_token_id"] == [2, 3, 4]


def test_the_training_moved_the_weights(nemo_jobs: Path) -> None:
    report = verify(_checkpoint(nemo_jobs, "full"), nemo_jobs / "hf", logits=False)
    assert len(report.differences) == report.tensors


def test_lora_merged_is_what_nemo_trained(nemo_jobs: Path, tmp_path: Path) -> None:
    export_hf(_checkpoint(nemo_jobs, "lora"), tmp_path / "merged", dtype="float32")
    assert _agree(_logits(_load(tmp_path / "merged")), torch.load(nemo_jobs / "runs" / "lora_logits.pt"))
    export_hf(_checkpoint(nemo_jobs, "lora"), tmp_path / "from_hf", base=nemo_jobs / "hf", dtype="float32")
    models.assert_same_weights(tmp_path / "merged", tmp_path / "from_hf")


def test_a_lora_run_is_talked_to_and_served_as_the_merged_model(
    nemo_jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run, prompt = str(nemo_jobs / "runs" / "lora"), "t5 t6 t7"
    export_hf(_checkpoint(nemo_jobs, "lora"), tmp_path / "merged")
    merged, base = (
        next(TransformersEngine(folder, device="cpu").generate([prompt], Sampling(max_tokens=6)))[1].text
        for folder in (tmp_path / "merged", nemo_jobs / "hf")
    )
    assert merged != base
    command = [sys.executable, "-m", "nemo_cpt.cli"]
    words = [*command, "chat", run, "--plain", "--temperature", "0", "--max-tokens", "6", "--device", "cpu"]
    talked = subprocess.run(words, input=f"{prompt}\n", capture_output=True, text=True)
    assert talked.stdout.strip() == merged.strip(), talked.stderr
    assert "exporting" in talked.stderr
    server = subprocess.Popen(
        [*command, "serve", run, "--port", "0", "--device", "cpu"], stderr=subprocess.PIPE, text=True
    )
    with server:
        assert server.stderr is not None
        said = list[str]()
        while not said or "http://" not in said[-1]:
            said.append(next(server.stderr))
        asked = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
        answer = httpx.post(f"{said[-1].split()[-1]}/completions", json=asked, timeout=60).json()
        assert answer["choices"][0]["text"] == merged
        assert any("its export is in the cache" in line for line in said), said
        server.terminate()
        assert server.wait() == 0


@pytest.mark.parametrize(("run", "base"), [("full", "hf"), ("edited", "tied_hf"), ("lora", "hf")])
def test_rows_without_tokens_come_back(run: str, base: str, nemo_jobs: Path, tmp_path: Path) -> None:
    """The model has 300 rows for 250 tokens, as its base; the softmax over all of them trains every one."""
    report = export_hf(_checkpoint(nemo_jobs, run), tmp_path / "out", dtype="float32")
    assert (report.padding_removed, report.warnings) == (0, ())
    assert len(report.config_changes) == (4 if run == "edited" else 1)  # the dtype
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == models.MORE_ROWS
    before, after = models.tensors(nemo_jobs / base), models.tensors(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in before:
            assert before[name].shape == after[name].shape == (models.MORE_ROWS, 48)
    head = "model.embed_tokens.weight" if run == "edited" else "lm_head.weight"
    moved = (after[head] != before[head].float()).any(dim=1)
    assert bool(moved.all()) is (run != "lora")
    logits = torch.load(nemo_jobs / "runs" / f"{run}_logits.pt")
    assert logits.shape[1] == models.MORE_ROWS
    assert _agree(_logits(_load(tmp_path / "out")), logits)


def test_lora_is_not_merged_into_another_model_of_its_shape(nemo_jobs: Path, tmp_path: Path) -> None:
    """One value of one matrix differs, as after another step of training; a matrix that has no adapter, then one that
    has."""
    for name in ("model.layers.3.input_layernorm.weight", "model.layers.2.mlp.down_proj.weight"):
        other = shutil.copytree(nemo_jobs / "hf", tmp_path / name)
        path = next(path for path in other.glob("*.safetensors") if name in load_file(path))
        every = load_file(path)
        every[name].view(-1)[7] += 0.5
        save_file(every, path, metadata={"format": "pt"})
        import_hf(other, tmp_path / f"{name}_nemo")
        for base in (other, tmp_path / f"{name}_nemo"):
            with pytest.raises(CptError, match=rf"{name} of .*{name}.* is not what the adapters were trained on"):
                export_hf(_checkpoint(nemo_jobs, "lora"), tmp_path / "out", base=base)
            assert not (tmp_path / "out").exists()
        with pytest.raises(CptError, match="is not what the adapters were trained on"):
            verify(_checkpoint(nemo_jobs, "lora"), nemo_jobs / "hf", base=other)


def test_a_lora_run_that_does_not_know_its_base(nemo_jobs: Path, tmp_path: Path) -> None:
    """As those of a base that was imported before imports wrote checksums."""
    old = shutil.copytree(_checkpoint(nemo_jobs, "lora"), tmp_path / "old")
    (old / "context" / "hf" / ".weights.json").unlink()
    (warning,) = export_hf(old, tmp_path / "out").warnings
    assert "does not know its base's weights" in warning
    assert verify(old, tmp_path / "out").warnings == (warning,)
    assert export_hf(_checkpoint(nemo_jobs, "lora"), tmp_path / "known").warnings == ()
    assert [path.name for path in (tmp_path / "known").glob(".*")] == [RECORD]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_run_is_verified_as_merged(nemo_jobs: Path, tmp_path: Path, dtype: str) -> None:
    export_hf(_checkpoint(nemo_jobs, "lora"), tmp_path / "merged", dtype=dtype)
    report = verify(_checkpoint(nemo_jobs, "lora"), tmp_path / "merged")
    assert report.identical
    assert report.logits_difference is None
    with_base = verify(_checkpoint(nemo_jobs, "lora"), nemo_jobs / "hf", base=nemo_jobs / "hf")
    adapted = [each.name for each in with_base.differences]
    assert adapted
    assert all("_proj" in name for name in adapted)
    with pytest.raises(CptError, match="holds adapters only"):
        verify(_checkpoint(nemo_jobs, "lora"), tmp_path / "merged", logits=True)


def test_the_peft_adapter_on_the_original_base_gives_the_same_logits(nemo_jobs: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    export_hf(_checkpoint(nemo_jobs, "lora"), tmp_path / "adapter", adapter=True)
    base = _load(nemo_jobs / "hf")
    before = _logits(base)
    adapted = _logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert _agree(adapted, torch.load(nemo_jobs / "runs" / "lora_logits.pt"))
    assert not _agree(adapted, before)


def test_an_adapter_asked_of_a_full_training_is_refused(nemo_jobs: Path, tmp_path: Path) -> None:
    with pytest.raises(CptError, match="no LoRA checkpoint"):
        export_hf(_checkpoint(nemo_jobs, "full"), tmp_path / "adapter", adapter=True)


def test_another_base_is_refused(nemo_jobs: Path, tmp_path: Path) -> None:
    other = models.make("smollm2", tmp_path / "other")
    with pytest.raises(CptError, match=r"num_attention_heads is 4 in its context and 6 in config\.json"):
        export_hf(_checkpoint(nemo_jobs, "full"), tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()
