"""On a GPU: NeMo's model with Transformer Engine's layers loads an import strictly and computes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_cpt.checkpoint import import_hf
from nemo_cpt.checkpoint.nemo_model import one_process
from tests.support import small_models as models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with Transformer Engine"),
]


def _build(nemo: Path) -> Any:
    import fiddle as fdl
    from nemo.lightning import io

    description = io.load_context(nemo / "context", subpath="model.config", build=False)
    description.use_cpu_initialization = True
    return fdl.build(description).configure_model(tokenizer=None, pre_process=True, post_process=True)


@pytest.mark.parametrize("shape", ["llama31", "llama32", "qwen2", "qwen3", "gpt2"])
def test_transformer_engine_layers_read_the_import(shape: str, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    hf = models.make(shape, tmp_path / "hf", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    import_hf(hf, tmp_path / "nemo")
    weights = str(tmp_path / "nemo" / "weights")
    ids = torch.randint(0, models.VOCAB, (1, 128), device="cuda")
    with one_process("nccl"), torch.no_grad():
        model = _build(tmp_path / "nemo").cuda().bfloat16().eval()
        assert type(model.decoder.layers[0].self_attention.linear_qkv).__module__.endswith("transformer_engine")
        metadata = dist_checkpointing.load_content_metadata(weights)
        sharded = model.sharded_state_dict(prefix="module.", metadata=metadata)
        loaded = dist_checkpointing.load({"model": sharded}, weights)["model"]
        model.load_state_dict({name.removeprefix("module."): value for name, value in loaded.items()})
        ours = model(ids, torch.arange(128, device="cuda")[None], None)[0].float()
    theirs = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16).cuda().eval()(ids).logits[0].float()
    assert float((ours - theirs).abs().max()) < 0.03 * float(theirs.abs().max())  # bf16 on both sides
