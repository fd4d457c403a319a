"""Numbers with which no job could run are refused by name, with what to give instead."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.transformer.enums import AttnBackend

from nemo_cpt import catalog
from nemo_cpt.catalog.build import build_recipe
from nemo_cpt.cli.launch import show
from nemo_cpt.errors import CptError
from nemo_cpt.training.settings import Settings, check

SMOLLM2 = {"num_layers": 30, "num_attention_heads": 9, "num_query_groups": 3, "ffn_hidden_size": 1536}


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"max_steps": 0}, "max_steps=0: give max_steps=1 or more"),
        ({"seq_length": -8}, "seq_length=-8: give seq_length=1 or more"),
        ({"lr": -1, "min_lr": -0.1}, "lr=-1: a peak learning rate is above 0"),
        ({"lr": math.nan}, "lr=nan: "),
        ({"max_steps": 2.5}, "max_steps=2.5: give a whole number"),
        ({"seed": "x"}, "seed=x: give a whole number"),
        ({"limit_val_batches": -1}, "limit_val_batches=-1: give limit_val_batches=0 or more"),
        ({"epochs": 2, "max_steps": 5}, "epochs is 2 and max_steps 5: give one of them"),
        ({"embeddings_lr": 1e-6, "min_lr": 1e-5}, "at which both rates end: give a larger one"),
        ({"embeddings_lr": 0.0}, "embeddings_lr=0: a peak learning rate"),
        ({"lr": 1e-5, "min_lr": -1e-6}, "min_lr=-1e-06: a learning rate is not negative"),
        ({"lr": 1e-5, "min_lr": 1e-5}, "min_lr 1e-05 is not below lr 1e-05: give min_lr=1e-06"),
        ({"warmup_steps": -1}, "warmup_steps=-1: give warmup_steps=0"),
        ({"warmup_steps": 9, "max_steps": 9}, "warmup_steps 9 is not below max_steps 9: .* Give warmup_steps=0"),
        ({"global_batch_size": 10, "micro_batch_size": 4, "gpus_per_node": 1}, "global_batch_size 10 .* 8 would be"),
        ({"gpus_per_node": 3, "tensor_model_parallel_size": 2}, "3 processes cannot be cut into groups"),
        (SMOLLM2 | {"gpus_per_node": 2, "tensor_model_parallel_size": 2}, "num_attention_heads 9 .*size=1 or 3"),
        (SMOLLM2 | {"gpus_per_node": 4, "pipeline_model_parallel_size": 4}, "30 layers .*parallel_size=3 or 5"),
        ({"seq_length": 60, "gpus_per_node": 4, "context_parallel_size": 4}, "60 cannot be cut into .* 56 could be"),
        (
            {"seq_length": 63, "gpus_per_node": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
            r"63 cannot be cut over tensor_model_parallel_size 2.* 60 could be",
        ),
    ],
)
def test_what_no_job_could_run_with(numbers: dict[str, Any], says: str) -> None:
    with pytest.raises(CptError, match=says):
        check(Settings(**numbers))


def test_what_is_sound_or_not_known_passes() -> None:
    check(Settings())
    check(Settings(tensor_model_parallel_size=2, global_batch_size=10, micro_batch_size=4))  # on devices="auto"
    check(Settings(epochs=0.5, val_check_interval=0.25, warmup_steps=0, min_lr=0.0, lr=1e-5))
    layout = {"gpus_per_node": 3, "num_nodes": 5, "tensor_model_parallel_size": 3, "pipeline_model_parallel_size": 5}
    check(Settings(**SMOLLM2, **layout, seq_length=63, sequence_parallel=True, global_batch_size=4, micro_batch_size=2))


@pytest.mark.parametrize(
    ("recipe", "arguments", "fields", "says"),
    [
        ("llama31_8b.continual_pretrain", {"gpus_per_node": 3}, [], "3 processes cannot be cut"),
        ("llama31_8b.continual_pretrain", {}, ["optim.config.lr=0"], "lr=0: "),
        ("llama31_8b.continual_pretrain", {}, ["data.micro_batch_size=3"], "not a multiple of micro_batch_size 3"),
        ("llama31_8b.continual_pretrain_single_gpu", {"rank": 0}, [], "rank=0: give rank=1 or more"),
        ("llama31_8b.continual_pretrain_single_gpu", {"seq_length": 0}, [], "seq_length=0: "),
        ("llama31_8b.instruction_tune_single_gpu", {"rank": 0}, [], "rank=0: "),
        ("llama31_8b.instruction_tune", {"epochs": 0}, [], "epochs=0: "),
        ("llama31_8b.instruction_tune", {"val_check_interval": 0}, [], "val_check_interval=0: "),
    ],
)
def test_every_recipe_refuses_them(recipe: str, arguments: dict[str, Any], fields: list[str], says: str) -> None:
    with pytest.raises(CptError, match=says):
        build_recipe(recipe, arguments, fields)


def test_a_field_that_takes_text_too_gets_the_number_that_a_command_line_says() -> None:
    assert build_recipe("llama31_8b.continual_pretrain", {}, ["trainer.devices=4"]).trainer.devices == 4
    assert build_recipe("llama31_8b.continual_pretrain", {}, ["trainer.devices=auto"]).trainer.devices == "auto"


def test_a_field_takes_what_its_annotation_says_also_where_nemo_run_does_not_know_it() -> None:
    """An enum's member, a dtype, and annotations that are text, as those of NeMo's adapters are."""
    fields = ["model.config.attention_backend=fused", "optim.config.exp_avg_dtype=bfloat16"]
    adapters = ["peft.alpha=64", "peft.dropout=0.1", "peft.dropout_position=post", "peft.target_modules=[linear_qkv]"]
    recipe = build_recipe("llama31_8b.continual_pretrain_single_gpu", {}, [*fields, *adapters])
    assert recipe.model.config.attention_backend is AttnBackend.fused
    assert recipe.optim.config.exp_avg_dtype is torch.bfloat16
    assert (recipe.peft.alpha, recipe.peft.dropout, recipe.peft.dropout_position) == (64, 0.1, "post")
    assert recipe.peft.target_modules == ["linear_qkv"]
    recipe = build_recipe("llama31_8b.continual_pretrain", {"precision": "fp8"}, ["trainer.plugins.fp8=None"])
    assert recipe.trainer.plugins.fp8 is None  # annotated as `str`
    for field, says in (("model.config.attention_backend=fusd", "one of flash, fused"), ("peft.alpha=x", "int")):
        with pytest.raises(CptError, match=says):
            build_recipe("llama31_8b.continual_pretrain_single_gpu", {}, [field])


def test_a_config_with_an_enums_member_is_shown_as_it_would_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    show("llama31_8b.continual_pretrain", ["model.config.attention_backend=fused"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["config"]["attention_backend"] == "fused"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("model.micro_batch_size=1", "has no field micro_batch_size.* The recipe has a parameter micro_batch_size="),
        ("model.optim.lr=1e-5", "lr is a field of a plain value.* The recipe has a parameter lr="),
        ("model.optim.weight_decay=0.1", "There is optim.config.weight_decay"),
        ("exp_manager.name=ja", "The recipe has a parameter name="),
    ],
)
def test_a_setting_of_nemo_1_is_told_where_it_is_here(setting: str, says: str) -> None:
    with pytest.raises(CptError, match=says):
        build_recipe("llama31_8b.continual_pretrain", {}, [setting])


def test_the_settings_of_nemo_1_are_here_what_the_page_says() -> None:
    """What docs/coming-from-nemo.md gives in their place, all at once; fp8 apart, which is another value of one."""
    page = Path(__file__).parents[2].joinpath("docs/coming-from-nemo.md").read_text("utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.count(" | ") == 2]
    pairs = [text.replace("'", "") for _, here, _ in rows for text in re.findall(r"`(\w[\w.]*=[^`]+)`", here)]
    function, arguments, fields, _ = catalog.split(
        "llama31_8b.continual_pretrain", [each for each in pairs if each != "precision=fp8"]
    )
    assert (len(arguments), len(fields)) > (18, 15)
    recipe = build_recipe(function.name, arguments, fields)
    assert recipe.optim.config.clip_grad == 1.0
