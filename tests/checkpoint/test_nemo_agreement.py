"""What import_hf writes is what NeMo reads: its context, its loader, its model's logits, at any parallel size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_cpt.checkpoint import export_hf, import_hf, verify
from nemo_cpt.checkpoint.layout import PREFIX
from nemo_cpt.checkpoint.nemo_model import nemo_logits, one_process
from tests.support import small_models as models


def _transformers_logits(hf: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("shape", models.SHAPES)
def test_logits_of_nemo_and_transformers_agree(shape: str, tmp_path: Path) -> None:
    hf = models.make(shape, tmp_path / "hf")
    import_hf(hf, tmp_path / "nemo")
    torch.manual_seed(1)
    ids = torch.randint(0, models.VOCAB, (200,)).tolist()
    theirs = _transformers_logits(hf, ids)
    for ours in (nemo_logits(tmp_path / "nemo", [ids])[0], _logits_by_nemos_own_loaders(tmp_path / "nemo", ids)):
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def _logits_by_nemos_own_loaders(nemo: Path, ids: list[int]) -> torch.Tensor:
    """The context through NeMo's reader and the weights through Megatron's, as a training takes them."""
    from megatron.core import dist_checkpointing

    from nemo_cpt.cpu_stack import cpu_stack

    with cpu_stack(), one_process(), torch.no_grad():
        model = _described_by_the_context(nemo)
        content = dist_checkpointing.load_content_metadata(str(nemo / "weights"))
        sharded = model.sharded_state_dict(prefix=PREFIX, metadata=content)
        loaded = dist_checkpointing.load({"model": sharded}, str(nemo / "weights"))["model"]
        problems = model.load_state_dict({name.removeprefix(PREFIX): value for name, value in loaded.items()}, False)
        assert not [name for name in problems.missing_keys if not name.endswith("_extra_state")]
        masked = torch.ones(len(ids), len(ids)).tril().logical_not()[None, None]
        return model(torch.tensor([ids]), torch.arange(len(ids))[None], masked)[0].float()


def _described_by_the_context(nemo: Path) -> Any:
    import fiddle as fdl
    from nemo.collections.llm.gpt.model.base import local_layer_spec
    from nemo.lightning import io

    from nemo_cpt.cpu_stack import UNFUSED

    description = io.load_context(nemo / "context", subpath="model.config", build=False)
    fields = {**UNFUSED, "params_dtype": torch.float32, "bf16": False, "fp16": False}
    for name, value in {**fields, "transformer_layer_spec": local_layer_spec}.items():
        setattr(description, name, value)
    return fdl.build(description).configure_model(tokenizer=None, pre_process=True, post_process=True).float().eval()


def test_a_changed_weight_moves_the_logits(tmp_path: Path) -> None:
    """The comparison above can fail."""
    hf = models.make("llama31", tmp_path / "hf")
    import_hf(hf, tmp_path / "nemo")
    other = models.make("llama31", tmp_path / "other", rope_theta=400000.0)
    ids = list(range(5, 205))
    gap = (nemo_logits(tmp_path / "nemo", [ids])[0] - _transformers_logits(other, ids)).abs().max()
    assert float(gap) > 1e-4


def test_nemo_reads_the_context_and_what_it_says_is_config_json(tmp_path: Path) -> None:
    from nemo.collections.llm import LlamaModel
    from nemo.lightning import io

    hf = models.make("llama31", tmp_path / "hf")
    import_hf(hf, tmp_path / "nemo")
    model = io.load_context(tmp_path / "nemo").model
    assert isinstance(model, LlamaModel)
    assert model.config.old_context_len == 64  # NeMo's own importer leaves Llama-3.1's 8192 in place
    assert model.config.scale_factor == 8.0
    assert model.config.params_dtype == torch.bfloat16
    assert model.config.vocab_size == model.tokenizer.vocab_size == models.VOCAB
    assert model.config.generation_config.eos_token_id == [2, 3, 4]


def test_tensor_and_pipeline_parallel_two_by_two(nemo_jobs: Path, tmp_path: Path) -> None:
    """Four processes loaded the import at TP 2 x PP 2, its vocabulary padded, and saved; the export is the original."""
    parallel, hf = nemo_jobs / "runs" / "parallel", nemo_jobs / "hf"
    assert len(list((parallel / "weights").glob("__[0-3]_*.distcp"))) >= 4
    report = export_hf(parallel, tmp_path / "back", base=hf)
    assert report.padding_removed == 384 - models.MORE_ROWS
    models.assert_same_weights(hf, tmp_path / "back")
    assert verify(parallel, hf, logits=False).identical
