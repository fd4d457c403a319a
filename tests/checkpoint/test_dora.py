"""DoRA: what leaves of a run is NeMo's own forward pass, at TP 1 and TP 2, on layers with and without biases."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_cpt.checkpoint import export_hf, verify
from nemo_cpt.errors import CptError
from tests.support import dora_parallel
from tests.support import small_models as models

TOKENS = torch.arange(5, 45)[None]


def _logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(TOKENS).logits[0]


def _agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def _forward(folder: Path) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """NeMo's logits, put together from the ranks', and of each rank the gradients of the magnitudes that all have."""
    ranks = [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]
    return torch.cat([rank["logits"] for rank in ranks], -1), [rank["gradients"] for rank in ranks]


@pytest.mark.parametrize(("shape", "base"), [("plain", "hf"), ("biased", "biased_hf")])
def test_merged_is_what_nemo_computes_at_either_size(shape: str, base: str, nemo_jobs: Path, tmp_path: Path) -> None:
    work = nemo_jobs / "runs" / f"dora_{shape}"
    for size in ("tp1", "tp2", "tp2_in_parts"):
        export_hf(work / size, tmp_path / size, base=nemo_jobs / base, dtype="float32")
        logits, _ = _forward(work / size)
        assert _agree(_logits(tmp_path / size), logits)
        assert not _agree(_logits(nemo_jobs / base), logits)
    models.assert_same_weights(tmp_path / "tp1", tmp_path / "tp2")
    report = verify(work / "tp2", tmp_path / "tp2", base=nemo_jobs / base)
    assert report.identical
    assert not verify(work / "tp2", nemo_jobs / base, base=nemo_jobs / base).identical


@pytest.mark.parametrize("size", ["tp2", "tp2_in_parts"])
def test_the_ranks_agree_on_the_magnitudes_that_all_of_them_have(size: str, nemo_jobs: Path) -> None:
    """Under sequence parallelism ("in parts") each has the gradient of its part of the sequence, and all are added."""
    (alone,), ranks = (_forward(nemo_jobs / "runs" / "dora_plain" / each)[1] for each in ("tp1", size))
    assert len(alone) == 8  # linear_proj and linear_fc2 of four layers
    for rank in ranks:
        for name, gradient in alone.items():
            torch.testing.assert_close(rank[name], gradient, rtol=1e-4, atol=1e-5)


def test_without_the_patches_nemo_computes_another_model_at_tp_2(nemo_jobs: Path, tmp_path: Path) -> None:
    work = nemo_jobs / "runs" / "dora_plain"
    assert not _agree(_forward(work / "unpatched")[0], _forward(work / "tp1")[0])
    with pytest.raises(CptError, match="trained with DoRA on 2 tensor-parallel ranks"):
        export_hf(work / "unpatched", tmp_path / "out", base=nemo_jobs / "hf")


def test_rows_that_were_not_trained_keep_their_bits(nemo_jobs: Path, tmp_path: Path) -> None:
    """In bf16 a norm has 8 bits: a row's scale is taken in the magnitudes' dtype, as NeMo takes it, and is 1."""
    from nemo_cpt.checkpoint.arrays import DTYPES
    from nemo_cpt.checkpoint.lora import Update

    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    norms = torch.linalg.norm(weight, dim=1)  # as NeMo initialises the magnitudes
    assert norms.dtype == torch.bfloat16
    ours, magnitude = (each.float().numpy().astype(DTYPES["bfloat16"]) for each in (weight, norms))
    update = Update(a=ours[:4], b=0 * ours[:, :4], scale=2.0, magnitude=magnitude)
    assert (update.applied_to(ours) == ours.astype("float32")).all()


def test_a_run_is_exported_verified_and_written_for_peft(nemo_jobs: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    (checkpoint,) = (nemo_jobs / "runs" / "dora" / "checkpoints").glob("*-last")
    trained = torch.load(nemo_jobs / "runs" / "dora_logits.pt")
    export_hf(checkpoint, tmp_path / "merged", dtype="float32")
    assert _agree(_logits(tmp_path / "merged"), trained)
    assert verify(checkpoint, tmp_path / "merged").identical

    report = export_hf(checkpoint, tmp_path / "adapter", adapter=True)
    assert report.tensors == 4 * 7 * 3  # layers, modules, matrices and magnitudes
    base = AutoModelForCausalLM.from_pretrained(nemo_jobs / "hf", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(TOKENS).logits[0]
    assert _agree(adapted, trained)


def test_peft_does_not_scale_biases_so_such_an_adapter_is_refused(nemo_jobs: Path, tmp_path: Path) -> None:
    work = nemo_jobs / "runs" / "dora_biased" / "tp1"
    with pytest.raises(CptError, match="scales the biases of query, key and value, peft's does not"):
        export_hf(work, tmp_path / "out", base=nemo_jobs / "biased_hf", adapter=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "alpha"), [("DoRA", 64), ("DoRAWithEmbeddings", 64), ("LoRA", 32)])
def test_the_default_alpha_is_the_class_s_own(kind: str, alpha: float, tmp_path: Path) -> None:
    from nemo_cpt.checkpoint.lora import _alpha

    (tmp_path / "context").mkdir()
    context = tmp_path / "context" / "io.json"
    context.write_text(json.dumps(dora_parallel.transform_context(kind, {"dim": 4})))
    assert _alpha(tmp_path) == alpha
    context.write_text(json.dumps(dora_parallel.transform_context(kind, {"alpha": 7})))
    assert _alpha(tmp_path) == 7
    context.write_text(json.dumps(dora_parallel.transform_context("Other", {})))
    with pytest.raises(CptError, match="whose default is not known"):
        _alpha(tmp_path)
