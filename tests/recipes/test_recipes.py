"""Every recipe builds, says what the recorded run says, and survives YAML."""

import subprocess
import sys
from pathlib import Path

import nemo_run as run
import pytest
from nemo.collections import llm
from nemo_run.core.serialization.yaml import YamlSerializer

from nemo_cpt.cli import yaml_file
from nemo_cpt.corpus import Blend
from nemo_cpt.errors import CptError
from nemo_cpt.recipes import llama31_8b, parts, tiny

RECIPES = [
    llama31_8b.continual_pretrain,
    llama31_8b.continual_pretrain_single_gpu,
    llama31_8b.continual_pretrain_full_single_gpu,
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_every_recipe_carries_the_guards_and_a_base(recipe) -> None:
    made = recipe()
    carried = {callback.__fn_or_cls__.__name__ for callback in made.trainer.callbacks}
    assert {"Guards", "EveryTrainableParameterHasGradient", "ValidationLossBySet"} <= carried
    assert made.resume.base == llama31_8b.DEFAULT_BASE
    assert made.data.seq_length == made.model.config.seq_length


def test_the_defaults_are_the_recorded_runs() -> None:
    recipe = llama31_8b.continual_pretrain()
    assert recipe.__fn_or_cls__ is llm.pretrain
    assert (recipe.data.seq_length, recipe.data.global_batch_size, recipe.data.micro_batch_size) == (8192, 1024, 1)
    assert (recipe.trainer.max_steps, recipe.trainer.val_check_interval) == (150, 15)
    assert recipe.trainer.strategy.tensor_model_parallel_size == 2
    assert (recipe.optim.config.lr, recipe.optim.lr_scheduler.min_lr) == (2.5e-5, 2.5e-6)
    assert recipe.optim.lr_scheduler.warmup_steps == 15
    assert (recipe.optim.config.weight_decay, recipe.optim.config.clip_grad) == (0.1, 1.0)
    assert (recipe.optim.config.adam_beta1, recipe.optim.config.adam_beta2) == (0.9, 0.95)
    assert recipe.log.ckpt.save_top_k == 3
    config = run.Config(llm.Llama31Config8B) if recipe.model.config is None else recipe.model.config
    assert config.rotary_base == 500_000
    assert config.scale_factor == 8.0


@pytest.mark.parametrize(("steps", "warmup"), [(150, 15), (999, 99), (2_000, 100), (25_000, 1_000), (100_000, 1_000)])
def test_warmup_follows_the_runs_length(steps: int, warmup: int) -> None:
    assert parts.default_warmup(steps) == warmup


@pytest.mark.parametrize("gpu_memory_gib", [24, 48, 80])
def test_lora_trains_all_linear_layers_at_twice_the_rank(gpu_memory_gib: int) -> None:
    recipe = llama31_8b.continual_pretrain_single_gpu(gpu_memory_gib=gpu_memory_gib)
    assert recipe.__fn_or_cls__ is llm.finetune
    assert recipe.peft.alpha == 2 * recipe.peft.dim
    assert set(recipe.peft.target_modules) == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert recipe.trainer.devices == recipe.trainer.strategy.tensor_model_parallel_size == 1


def test_a_card_too_small_is_refused_with_the_smallest_that_fits() -> None:
    with pytest.raises(CptError, match="at least 24 GB"):
        llama31_8b.continual_pretrain_single_gpu(gpu_memory_gib=12)
    with pytest.raises(CptError, match="at least 48 GB"):
        llama31_8b.continual_pretrain_full_single_gpu(gpu_memory_gib=24)


def test_data_must_be_a_blend() -> None:
    with pytest.raises(CptError, match="give a Blend"):
        llama31_8b.continual_pretrain(data="{train:[1.0,ds/ja]}")


def test_the_tiny_recipe_is_the_8b_recipe_on_a_cpu() -> None:
    recipe = tiny.continual_pretrain("base", Blend(train={"ds/ja": 1.0}))
    assert recipe.__fn_or_cls__ is llm.pretrain
    assert recipe.trainer.accelerator == "cpu"
    assert recipe.optim.config.clip_grad == 1.0
    assert recipe.model.config.rotary_base == 500_000


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_yaml_gives_the_same_recipe_back(recipe, tmp_path: Path) -> None:
    made = recipe()
    (tmp_path / "recipe.yaml").write_text(YamlSerializer().serialize(made))
    assert yaml_file.load(tmp_path / "recipe.yaml") == made


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "cannot be read"), ("a: 1", "no _target_"), ("_target_: nemo_cpt.nothing", "cannot be imported")],
)
def test_a_bad_yaml_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(CptError, match=message):
        yaml_file.load(tmp_path / "recipe.yaml")


def test_nemo_llm_finds_the_factory_and_round_trips_yaml(tmp_path: Path) -> None:
    nemo = [str(Path(sys.executable).with_name("nemo")), "llm", "pretrain"]
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    _run([*nemo, "--factory", "llama31_8b_cpt", "--to-yaml", str(first), "trainer.max_steps=77"])
    assert "max_steps: 77" in first.read_text()
    _run([*nemo, "--yaml", str(first), "--to-yaml", str(second)])
    assert second.read_text() == first.read_text()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr
