"""LoRA on some modules of some layers: the merged model and the PEFT adapter are the same model."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from nemo_cpt.checkpoint import export_hf
from nemo_cpt.checkpoint.distributed_writer import DistributedWriter
from nemo_cpt.errors import CptError
from tests.support import small_models as models
from tests.support.dora_parallel import transform_context

LAYERS, RANK, ALPHA = 4, 4, 8
# Output and input sizes of small_models' Llama: 4 heads and 2 groups of 12, hidden 48, ffn 80.
SIZES = {"self_attention.linear_qkv": (96, 48), "mlp.linear_fc1": (160, 48), "mlp.linear_fc2": (48, 80)}


def _lora_checkpoint(folder: Path, adapted: list[tuple[int, str]], base: Path, method: str = "adapter") -> Path:
    """What NeMo leaves of a LoRA run: adapters of the layers and modules in `adapted`."""
    torch.manual_seed(3)
    with DistributedWriter(folder / "weights") as writer:
        for layer, module in adapted:
            out, into = SIZES[module]
            for side, shape in (("linear_in", (RANK, into)), ("linear_out", (out, RANK))):
                key = f"module.decoder.layers.{module}.{method}.{side}.weight"
                writer.add(key, torch.randn(shape).numpy() * 0.1, (LAYERS, *shape), (layer, 0, 0))
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


def test_another_method_is_refused(tmp_path: Path) -> None:
    hf = models.make("llama31", tmp_path / "hf")
    lora = _lora_checkpoint(tmp_path / "lora", [(0, "mlp.linear_fc1")], hf, method="adapter.adapter_gate")
    with pytest.raises(CptError, match="another method than LoRA and DoRA"):
        export_hf(lora, tmp_path / "out", base=hf)
    assert not (tmp_path / "out").exists()
