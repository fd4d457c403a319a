"""The recipes of every model: its shape is that of its config.json, its defaults fit their cards, and it trains."""

import json
import math
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_cpt import catalog
from nemo_cpt.catalog.build import build_recipe
from nemo_cpt.checkpoint import import_hf
from nemo_cpt.checkpoint.architecture import parse_config
from nemo_cpt.checkpoint.model_config import constants_of, constants_of_nemo, differences
from nemo_cpt.corpus import Blend, prepare
from nemo_cpt.planning import plan
from nemo_cpt.training.metrics import read_metrics
from tests.support import small_models
from tests.training import jobs

LLAMA31_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                "original_max_position_embeddings": 8192}  # fmt: skip
LLAMA31 = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128_256, "rope_theta": 500_000.0,
           "rope_scaling": LLAMA31_ROPE, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072}  # fmt: skip
LLAMA32 = LLAMA31 | {"rope_scaling": LLAMA31_ROPE | {"factor": 32.0}, "tie_word_embeddings": True}
QWEN = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
CONFIGS = {  # config.json of the models, what describes them
    "llama32_1b": LLAMA32 | dict(zip(SIZES, (2048, 8192, 16, 32), strict=True)) | {"head_dim": 64},
    "llama32_3b": LLAMA32 | dict(zip(SIZES, (3072, 8192, 28, 24), strict=True)) | {"head_dim": 128},
    "llama31_8b": LLAMA31 | dict(zip(SIZES, (4096, 14_336, 32, 32), strict=True)),
    "llama31_70b": LLAMA31 | dict(zip(SIZES, (8192, 28_672, 80, 64), strict=True)),
    "qwen25_7b": QWEN
    | dict(zip(SIZES, (3584, 18_944, 28, 28), strict=True))
    | {"model_type": "qwen2", "num_key_value_heads": 4, "vocab_size": 152_064, "max_position_embeddings": 131_072},
    "qwen3_8b": QWEN
    | dict(zip(SIZES, (4096, 12_288, 36, 32), strict=True))
    | {"model_type": "qwen3", "num_key_value_heads": 8, "vocab_size": 151_936, "head_dim": 128},
    "mistral_7b": {"model_type": "mistral", "num_key_value_heads": 8, "vocab_size": 32_768, "rope_theta": 1e6}
    | dict(zip(SIZES, (4096, 14_336, 32, 32), strict=True))
    | {"sliding_window": None, "rms_norm_eps": 1e-5, "max_position_embeddings": 32_768},
}
SMALL = dict(zip(SIZES, (64, 96, 2, 4), strict=True)) | {
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": small_models.VOCAB, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,  # else the guard takes the base for random weights: it is one
}  # fmt: skip
SMALL_NEMO = {"hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2, "num_attention_heads": 4,
              "num_query_groups": 2, "kv_channels": 16, "vocab_size": small_models.VOCAB}  # fmt: skip
RECIPES = sorted(name for name in catalog.recipes() if name.partition(".")[0] in CONFIGS)


def _model(name: str, seq_length: int) -> Any:
    return import_module(f"nemo_cpt.recipes.{name}").model(seq_length)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipes_model_is_that_of_its_config_json(name: str) -> None:
    stated = constants_of_nemo(_model(name, 64).config)
    assert not differences(stated, constants_of(parse_config(CONFIGS[name], name)))


def test_every_model_has_its_recipes() -> None:
    for name in CONFIGS:
        smaller = "lora" if name == "llama31_70b" else "single_gpu"
        functions = ("continual_pretrain", f"continual_pretrain_{smaller}", "instruction_tune")
        assert {f"{name}.{each}" for each in (*functions, f"instruction_tune_{smaller}")} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_the_cards_that_it_is_made_for(name: str) -> None:
    recipe = build_recipe(name, {})
    function = catalog.recipe(name)
    card = function.number("gpu_memory_gib", {}) or 80
    planned = plan(recipe, card)
    assert planned.fits, planned.verdict
    assert not planned.lower_bound
    assert recipe.log.name == name.replace(".continual_pretrain", "_cpt").replace(".instruction_tune", "_sft")
    assert recipe.trainer.devices == function.processes({})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of every model's recipe on the CPU, each from a base of the model's own config.json at small sizes."""
    folder = tmp_path_factory.mktemp("kin")
    words = [f"t{number}" for number in range(5, 245)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(words)}) + "\n" for _ in range(20)))
    small_models.tokenizer().save_pretrained(folder / "tokenizer")
    prepare(folder / "text.jsonl", folder / "text", folder / "tokenizer", workers=1, quiet=True)
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | SMALL), dtype=torch.bfloat16)
        model.save_pretrained(folder / name / "hf")
        small_models.tokenizer().save_pretrained(folder / name / "hf")
        import_hf(folder / name / "hf", folder / name / "base")
        log = folder / f"{name}.log"
        assert jobs.run(partial(_train, name, folder), log=log) == 0, log.read_text()[-3000:]
    return folder


def _train(name: str, folder: Path) -> None:
    import nemo_run

    from nemo_cpt.training.cpu import on_cpu

    model = _model(name, 32)
    for field, value in SMALL_NEMO.items():
        setattr(model.config, field, value)
    recipe = import_module(f"nemo_cpt.recipes.{name}").continual_pretrain(
        str(folder / name / "base"), Blend(train={str(folder / "text"): 1.0}), model=model, directory=str(folder),
        num_nodes=1, gpus_per_node=1, tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
        seq_length=32, global_batch_size=4, micro_batch_size=2, max_steps=2, val_check_interval=2, warmup_steps=0,
    )  # fmt: skip
    nemo_run.run(on_cpu(recipe), direct=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_recipe_trains(name: str, trained: Path) -> None:
    losses = [
        each["reduced_train_loss"] for each in read_metrics(trained / f"{name}_cpt") if "reduced_train_loss" in each
    ]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
