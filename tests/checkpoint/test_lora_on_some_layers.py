"""LoRA on some modules of some layers: the merged model and the PEFT adapter are the same model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from nemo_cpt.checkpoint import export_hf, import_hf, merge, verify
from nemo_cpt.checkpoint.distributed_writer import DistributedWriter
from nemo_cpt.checkpoint.download_record import DownloadRecord
from nemo_cpt.checkpoint.lora import recorded_base
from nemo_cpt.checkpoint.provenance import trainings_of
from nemo_cpt.checkpoint.weights_digest import BASE_WEIGHTS, weights_digest
from nemo_cpt.errors import CptError
from tests.support import small_models as models
from tests.support.dora_parallel import transform_context

LAYERS, RANK, ALPHA = 4, 4, 8
# Output and input sizes of small_models' Llama: 4 heads and 2 groups of 12, hidden 48, ffn 80.
SIZES = {"self_attention.linear_qkv": (96, 48), "mlp.linear_fc1": (160, 48), "mlp.linear_fc2": (48, 80)}


def _lora_checkpoint(
    folder: Path, adapted: list[tuple[int, str]], base: Path, method: str = "adapter", head_rows: int | None = None
) -> Path:
    """What NeMo leaves of a LoRA run: adapters of the layers and modules in `adapted`, and of a padded head."""
    torch.manual_seed(3)
    with DistributedWriter(folder / "weights") as writer:
        for layer, module in adapted:
            out, into = SIZES[module]
            for side, shape in (("linear_in", (RANK, into)), ("linear_out", (out, RANK))):
                key = f"module.decoder.layers.{module}.{method}.{side}.weight"
                writer.add(key, torch.randn(shape).numpy() * 0.1, (LAYERS, *shape), (layer, 0, 0))
        if head_rows:
            for side, shape in (("linear_in", (RANK, 48)), ("linear_out", (head_rows, RANK))):
                key = f"module.output_layer.{method}.{side}.weight"
                writer.add(key, torch.randn(shape).numpy() * 0.1, shape, (0, 0))
    (folder / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(base)}))
    (folder / "context").mkdir()
    (folder / "context" / "io.json").write_text(json.dumps(transform_context("LoRA", {"alpha": ALPHA})))
    return folder


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 45)[None]).logits


def _load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "adapted",
    [
        [(0, "self_attention.linear_qkv"), (2, "mlp.linear_fc1")],
        [(1, "mlp.linear_fc2"), (3, "mlp.linear_fc2")],
        [(layer, "mlp.linear_fc1") for layer in range(LAYERS)],
    ],
)
def test_merged_and_adapter_agree(adapted: list[tuple[int, str]], tmp_path: Path) -> None:
    hf = models.make("llama31", tmp_path / "hf")
    lora = _lora_checkpoint(tmp_path / "lora", adapted, tmp_path / "gone")
    export_hf(lora, tmp_path / "merged", base=hf, dtype="float32")
    export_hf(lora, tmp_path / "adapter", base=hf, adapter=True)

    before = _logits(_load(hf))
    merged = _logits(_load(tmp_path / "merged"))
    adapted_model = _logits(PeftModel.from_pretrained(_load(hf), tmp_path / "adapter"))
    assert torch.allclose(merged, adapted_model, atol=1e-5)
    assert float((merged - before).abs().max()) > 1e-3
    changed = [name for name, tensor in models.tensors(tmp_path / "merged").items()
               if not torch.equal(tensor, models.tensors(hf)[name].float())]  # fmt: skip
    assert {int(name.split(".")[2]) for name in changed} == {layer for layer, _ in adapted}


def test_a_lora_run_whose_base_is_gone(tmp_path: Path) -> None:
    hf = models.make("llama31", tmp_path / "hf")
    lora = _lora_checkpoint(tmp_path / "lora", [(0, "mlp.linear_fc1")], tmp_path / "gone")
    (lora / "hf").symlink_to(hf)
    with pytest.raises(CptError, match="its base is gone"):
        export_hf(lora, tmp_path / "out")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which `model` was imported as `base`, trained to `runs/full`, and that tuned to `runs/lora`.

    `trained` is the export of the training, `tuned` the model that was trained in the end.
    """
    project = tmp_path_factory.mktemp("project")
    for seed, name in enumerate(("model", "other")):
        import_hf(models.make("llama31", project / name, seed=seed), project / f"{name}_nemo")
    (project / "model_nemo").rename(project / "base")
    full = project / "runs/full/checkpoints/steps=4"
    # What a training leaves: other weights, and the small files of its base with the sums of that.
    shutil.copytree(project / "other_nemo", full, ignore=shutil.ignore_patterns("hf", "context"))
    shutil.copytree(project / "base/hf", full / "context/hf")
    (full / "context/io.json").write_bytes((project / "base/context/io.json").read_bytes())
    (full / "run.json").write_text(json.dumps({"step": 4, BASE_WEIGHTS: weights_digest(project / "base")}))
    lora = _lora_checkpoint(project / "runs/lora/checkpoints/steps=4", [(1, "mlp.linear_fc2")], Path("no such folder"))
    shutil.copytree(project / "base/hf", lora / "context/hf")
    record = {"step": 4, BASE_WEIGHTS: weights_digest(full), "before": trainings_of(full)}
    (lora / "run.json").write_text(json.dumps(record))
    (lora / "weights/adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(full)}))
    export_hf(full, project / "trained")
    export_hf(lora, project / "tuned")
    return project


def test_adapters_on_another_trainings_checkpoint_are_merged_into_that(tuned: Path, tmp_path: Path) -> None:
    lora, full = tuned / "runs/lora/checkpoints/steps=4", tuned / "runs/full/checkpoints/steps=4"
    assert not any("trust" in warning for warning in export_hf(lora, tmp_path / "again").warnings)
    assert verify(lora, tuned / "tuned").identical
    before, after = (models.tensors(tuned / name) for name in ("trained", "tuned"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "model.layers.1.mlp.down_proj.weight"
    ]
    warnings = export_hf(lora, tmp_path / "from_hf", base=tuned / "trained").warnings
    assert any(f"{tuned}/trained was taken on trust" in warning for warning in warnings)
    models.assert_same_weights(tmp_path / "from_hf", tuned / "tuned")
    merge(lora, tmp_path / "merged")
    export_hf(tmp_path / "merged", tmp_path / "merged_hf")
    models.assert_same_weights(tmp_path / "merged_hf", tuned / "tuned")
    # The model that the training began with has the same shape, and the sums that both checkpoints carry.
    for base in (tuned / "base", tuned / "model", tuned / "other_nemo"):
        with pytest.raises(CptError, match=f"{base} is not what the adapters of .* were trained on: it has other"):
            export_hf(lora, tmp_path / "out", base=base)
    full.rename(full.with_name("gone"))
    try:
        with pytest.raises(CptError, match=f"its base is gone from {full}"):
            export_hf(lora, tmp_path / "out")
    finally:
        full.with_name("gone").rename(full)


def test_an_adapter_for_peft_names_the_model_that_it_belongs_to(tuned: Path, tmp_path: Path) -> None:
    lora = tuned / "runs/lora/checkpoints/steps=4"
    for base in (None, tuned / "base"):
        with pytest.raises(CptError, match="belong to a model that was trained before: give base="):
            export_hf(lora, tmp_path / "out", base, adapter=True)
    export_hf(lora, tmp_path / "adapter", tuned / "trained", adapter=True)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tuned / "trained")


def test_an_adapter_names_the_repository_that_its_base_was_downloaded_from(tmp_path: Path) -> None:
    """Of the base's own files a checkpoint carries the small ones: its folder is no model."""
    hf = models.make("llama31", tmp_path / "hf")
    DownloadRecord("someone/base", "c" * 40, {}).write(hf)
    import_hf(hf, tmp_path / "base")
    lora = _lora_checkpoint(tmp_path / "lora", [(1, "mlp.linear_fc2")], tmp_path / "base")
    for name, base, named in (("of_nemo", tmp_path / "base", "someone/base"), ("of_hf", hf, str(hf))):
        export_hf(lora, tmp_path / name, base, adapter=True)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == named


@pytest.mark.parametrize(
    "recorded",
    [
        "/no/such/project/runs/full/checkpoints/steps=4",
        "/no/such/project/runs/full/checkpoints/steps=4-last",
        "runs/full/checkpoints/steps=4/weights",
    ],
)
def test_the_base_of_adapters_is_found_wherever_the_project_is(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: str
) -> None:
    moved = shutil.copytree(tuned, tmp_path / "moved to here", ignore=shutil.ignore_patterns("tuned", "trained"))
    elsewhere = moved / "elsewhere/runs/full/checkpoints/steps=4"  # the current folder has another run of this name
    shutil.copytree(moved / "other_nemo", elsewhere)
    monkeypatch.chdir(moved / "elsewhere")
    lora = moved / "runs/lora/checkpoints/steps=4"
    (lora / "weights/adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": recorded}))
    assert recorded_base(lora) == moved / "runs/full/checkpoints/steps=4"
    (moved / "runs/full").rename(moved / "runs/full.1")
    assert recorded_base(lora) == moved / "runs/full.1/checkpoints/steps=4"
    shutil.rmtree(moved / "runs/full.1")
    assert recorded_base(lora) in (None, Path("runs/full/checkpoints/steps=4"))  # which an export refuses
    with pytest.raises(CptError, match=r"its base is gone|is not what the adapters"):
        export_hf(lora, tmp_path / "out")


@pytest.mark.parametrize("everywhere", [True, False])
def test_adapters_on_the_head(everywhere: bool, tmp_path: Path) -> None:
    hf = models.make("llama31", tmp_path / "hf")
    adapted = [(layer, "mlp.linear_fc1") for layer in range(LAYERS if everywhere else 2)]
    lora = _lora_checkpoint(tmp_path / "lora", adapted, hf, head_rows=256)
    export_hf(lora, tmp_path / "merged", base=hf, dtype="float32")
    export_hf(lora, tmp_path / "adapter", base=hf, adapter=True)
    merged, before = models.tensors(tmp_path / "merged"), models.tensors(hf)
    assert not torch.equal(merged["lm_head.weight"], before["lm_head.weight"].float())
    adapted_model = PeftModel.from_pretrained(_load(hf), tmp_path / "adapter")
    assert torch.allclose(_logits(_load(tmp_path / "merged")), _logits(adapted_model), atol=1e-5)


def test_adapters_on_a_head_that_is_the_embedding_are_not_passed_over(tmp_path: Path) -> None:
    hf = models.make("llama32", tmp_path / "hf")
    lora = _lora_checkpoint(tmp_path / "lora", [(0, "mlp.linear_fc1")], hf, head_rows=256)
    with pytest.raises(CptError, match=r"module\.output_layer\.adapter\.linear_\S+ belongs to .* the head of a model"):
        export_hf(lora, tmp_path / "out", base=hf)


def test_another_method_is_refused(tmp_path: Path) -> None:
    hf = models.make("llama31", tmp_path / "hf")
    lora = _lora_checkpoint(tmp_path / "lora", [(0, "mlp.linear_fc1")], hf, method="adapter.adapter_gate")
    with pytest.raises(CptError, match="another method than LoRA and DoRA"):
        export_hf(lora, tmp_path / "out", base=hf)
    assert not (tmp_path / "out").exists()
