"""Every recipe builds, says what the recorded run says, and survives YAML."""

import subprocess
import sys
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import fiddle
import nemo_run as run
import numpy as np
import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo_run.core.serialization.yaml import YamlSerializer
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from nemo_cpt import catalog
from nemo_cpt.constants import ADAM_STATES
from nemo_cpt.conversations import Conversations
from nemo_cpt.corpus import Blend
from nemo_cpt.doctor import Place
from nemo_cpt.errors import CptError
from nemo_cpt.executors import window
from nemo_cpt.executors.examination import examine_task
from nemo_cpt.launching import yaml_file
from nemo_cpt.launching.description import describe
from nemo_cpt.launching.scripts import write_script
from nemo_cpt.planning import memory, plan
from nemo_cpt.planning.recipe_reader import read
from nemo_cpt.recipes import gpt, instruction, llama31_8b, mistral_7b, parts, smollm2, tiny
from nemo_cpt.training import fields, guards
from nemo_cpt.training.early_stop import StopEarly
from nemo_cpt.training.optimizer import HostStateOptimizer
from nemo_cpt.training.recompute import RecomputeOutputs
from nemo_cpt.training.settings import settings_in
from tests.support.commands import nemo

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


def test_the_planner_counts_devices_and_workers_as_the_trainer_takes_them() -> None:
    recipe = smollm2.continual_pretrain()
    before = plan(recipe).host.total
    recipe.data.num_workers = 4
    assert plan(recipe).host.total - before == 2 * memory.WORKER_HOST
    recipe.trainer.num_nodes, recipe.data.global_batch_size = 2, 64
    for devices in (4, "4", [0, 2, 4, 6], "0,1,2,3", "0,1,2,3,"):
        recipe.trainer.devices = devices
        assert (read(recipe).gpus, read(recipe).gpus_per_node) == (8, 4)
    for devices in ("auto", -1):  # whatever the job's machine has
        recipe.trainer.devices = devices
        with pytest.raises(CptError, match=r"say how many GPUs they take, and trainer\.devices is"):
            read(recipe)
        assert window.seconds_to_save(recipe) is None


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


def outputs_again(recipe: run.Partial) -> bool:
    return any(each.__fn_or_cls__ is RecomputeOutputs for each in recipe.trainer.callbacks)


class TestStatePrecision:
    SIZES: ClassVar = {"gpus_per_node": 4, "gpu_memory_gib": 80}

    def test_states_in_bf16_let_four_gpus_of_80_gb_hold_whole_layers(self, tmp_path: Path) -> None:
        fp32 = llama31_8b.continual_pretrain(**self.SIZES)
        bf16 = llama31_8b.continual_pretrain(**self.SIZES, state_precision="bf16")
        assert fp32.trainer.strategy.tensor_model_parallel_size == 2
        assert bf16.trainer.strategy.tensor_model_parallel_size == 1
        assert outputs_again(bf16)
        work = read(bf16)
        assert (work.grad_bytes, work.exp_avg_bytes, work.exp_avg_sq_bytes, work.master_bytes) == (2, 2, 2, 2)
        (tmp_path / "recipe.yaml").write_text(YamlSerializer().serialize(bf16))
        assert yaml_file.load(tmp_path / "recipe.yaml") == bf16

    def test_what_it_cannot_be_is_refused(self) -> None:
        with pytest.raises(CptError, match="state_precision=fp16: give fp32 or bf16"):
            llama31_8b.continual_pretrain(state_precision="fp16")
        with pytest.raises(CptError, match="a CPU trains with states in fp32"):
            tiny.continual_pretrain("base", Blend({"ds/ja": 1.0}), state_precision="bf16")
        for make in (llama31_8b.continual_pretrain_single_gpu, llama31_8b.instruction_tune_single_gpu):
            with pytest.raises(CptError, match="adapters' states are small"):
                make(state_precision="bf16")

    def test_so_of_a_tuning(self) -> None:
        work = read(llama31_8b.instruction_tune(max_steps=10, state_precision="bf16"))
        assert (work.grad_bytes, work.exp_avg_bytes, work.exp_avg_sq_bytes, work.master_bytes) == (2, 2, 2, 2)


class TestOneGpu:
    @pytest.mark.parametrize("gpu_memory_gib", [24, 48, 80])
    def test_lora_trains_all_linear_layers_at_twice_the_rank(self, gpu_memory_gib: int) -> None:
        recipe = llama31_8b.continual_pretrain_single_gpu(gpu_memory_gib=gpu_memory_gib)
        assert recipe.__fn_or_cls__ is llm.finetune
        assert recipe.peft.alpha == 2 * recipe.peft.dim
        assert set(recipe.peft.target_modules) == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
        assert recipe.trainer.devices == recipe.trainer.strategy.tensor_model_parallel_size == 1
        planned = plan(recipe, gpu_memory_gib)
        assert planned.peak_gib <= 0.95 * planned.memory_gib

    def test_the_planner_finds_recompute_and_rank_for_the_card(self) -> None:
        cards = {gib: llama31_8b.continual_pretrain_single_gpu(gpu_memory_gib=gib) for gib in (24, 48, 80)}
        assert [cards[gib].peft.dim for gib in (48, 80)] == [128, 128]
        assert cards[24].peft.dim < 128
        assert 0 < cards[48].model.config.recompute_num_layers < cards[24].model.config.recompute_num_layers
        assert cards[80].model.config.recompute_granularity is None
        assert [outputs_again(cards[gib]) for gib in (24, 48, 80)] == [False, True, False]
        assert {recipe.model.config.seq_length for recipe in cards.values()} == {8192}

    def test_a_given_rank_is_kept_and_the_sequence_shortened(self) -> None:
        recipe = llama31_8b.continual_pretrain_single_gpu(gpu_memory_gib=24, rank=64)
        assert recipe.peft.dim == 64
        assert recipe.data.seq_length == recipe.model.config.seq_length < 8192

    def test_embeddings_trained_beside_the_adapters_are_planned_and_survive_yaml(self, tmp_path: Path) -> None:
        recipe = llama31_8b.continual_pretrain_single_gpu(gpu_memory_gib=80, embeddings_lr=2e-5)
        assert recipe.optim.embeddings_lr == 2e-5
        frozen = llama31_8b.continual_pretrain_single_gpu(gpu_memory_gib=80)
        more = plan(recipe, 80).worst.parts["adapters"] - plan(frozen, 80).worst.parts["adapters"]
        assert more == 2 * 128_256 * 4096 * (4 + 12)  # fp32 gradients; master weights and two moments
        (tmp_path / "recipe.yaml").write_text(YamlSerializer().serialize(recipe))
        assert yaml_file.load(tmp_path / "recipe.yaml") == recipe

    @pytest.mark.parametrize(("embeddings_lr", "kind"), [(None, "DoRA"), (2e-5, "DoRAWithEmbeddings")])
    def test_dora_is_planned_as_what_it_is(self, embeddings_lr: float | None, kind: str, tmp_path: Path) -> None:
        sizes = {"gpu_memory_gib": 80, "rank": 32, "embeddings_lr": embeddings_lr}
        recipe = llama31_8b.continual_pretrain_single_gpu(peft_scheme="dora", **sizes)
        lora = llama31_8b.continual_pretrain_single_gpu(**sizes)
        assert recipe.peft.__fn_or_cls__.__name__ == kind
        more = plan(recipe, 80).worst.parts["adapters"] - plan(lora, 80).worst.parts["adapters"]
        assert more == 32 * (6144 + 4096 + 28_672 + 4096) * (2 + 4 + 12)  # a magnitude a row, and its training
        (tmp_path / "recipe.yaml").write_text(YamlSerializer().serialize(recipe))
        assert yaml_file.load(tmp_path / "recipe.yaml") == recipe

    def test_instruction_tuning_takes_dora_too(self) -> None:
        recipe = llama31_8b.instruction_tune_single_gpu(gpu_memory_gib=80, peft_scheme="dora", max_steps=10)
        assert recipe.peft.__fn_or_cls__.__name__ == "DoRA"

    def test_every_parameter_on_one_gpu_keeps_the_states_on_the_host(self) -> None:
        for gpu_memory_gib, gradients in ((48, torch.bfloat16), (80, torch.float32)):
            recipe = llama31_8b.continual_pretrain_full_single_gpu(gpu_memory_gib=gpu_memory_gib)
            assert recipe.optim.__fn_or_cls__ is HostStateOptimizer
            assert recipe.optim.config.main_grads_dtype == gradients
            assert recipe.trainer.strategy.ddp.grad_reduce_in_fp32 is (gradients == torch.float32)
            assert plan(recipe, gpu_memory_gib).fits

    def test_it_builds_the_optimizer_module_that_keeps_the_states_on_the_host(self, monkeypatch) -> None:
        monkeypatch.setattr(OptimizerConfig, "__post_init__", lambda self: None)  # it asks for Transformer Engine
        module = fiddle.build(llama31_8b.continual_pretrain_full_single_gpu().optim)
        assert isinstance(module, HostStateOptimizer)
        assert module.host_states == ADAM_STATES
        assert module.config.exp_avg_dtype == module.config.main_grads_dtype == torch.float32

    def test_a_card_too_small_is_refused_with_the_smallest_that_fits(self) -> None:
        with pytest.raises(CptError, match=r"nothing fits in 11\.8 GiB: LoRA takes at least 1\d\.\d GiB"):
            llama31_8b.continual_pretrain_single_gpu(gpu_memory_gib=12)
        with pytest.raises(CptError, match=r"every parameter takes at least 3\d\.\d GiB .* or LoRA"):
            llama31_8b.continual_pretrain_full_single_gpu(gpu_memory_gib=24)


class TestInstructionTuning:
    TUNING = (llama31_8b.instruction_tune, llama31_8b.instruction_tune_single_gpu, smollm2.instruction_tune)

    @pytest.mark.parametrize("recipe", TUNING, ids=["llama31_8b", "llama31_8b_single_gpu", "smollm2"])
    def test_the_loss_is_per_token_and_yaml_gives_the_recipe_back(self, recipe, tmp_path: Path) -> None:
        made = recipe()
        assert made.__fn_or_cls__ is llm.finetune
        assert made.data.__fn_or_cls__.__name__ == "ConversationDataModule"
        assert made.model.config.calculate_per_token_loss
        assert not made.trainer.strategy.ddp.average_in_collective
        assert made.data.seq_length == made.model.config.seq_length
        assert made.data.epochs == 2  # which could not be counted: there are no conversations here
        (tmp_path / "recipe.yaml").write_text(YamlSerializer().serialize(made))
        assert yaml_file.load(tmp_path / "recipe.yaml") == made

    def test_the_defaults_are_those_of_tulu_3(self) -> None:
        recipe = llama31_8b.instruction_tune(max_steps=1000)
        assert (recipe.data.seq_length, recipe.data.global_batch_size) == (4096, 32)
        assert (recipe.optim.config.lr, recipe.optim.config.weight_decay) == (5e-6, 0.0)
        assert (recipe.optim.lr_scheduler.warmup_steps, recipe.optim.lr_scheduler.min_lr) == (30, 0.0)
        assert (recipe.trainer.max_steps, recipe.trainer.val_check_interval) == (1000, 100)
        assert recipe.data.epochs is None

    @pytest.mark.parametrize("gpu_memory_gib", [24, 48, 80])
    def test_one_gpu_trains_lora_by_the_card(self, gpu_memory_gib: int) -> None:
        recipe = llama31_8b.instruction_tune_single_gpu(gpu_memory_gib=gpu_memory_gib)
        assert (recipe.peft.dim, recipe.peft.alpha) == (32, 64)
        assert recipe.data.seq_length == recipe.model.config.seq_length == 4096
        planned = plan(recipe, gpu_memory_gib)
        assert planned.peak_gib <= 0.95 * planned.memory_gib
        assert not planned.lower_bound

    def test_a_shorter_sequence_that_fits_has_its_own_epochs(self, monkeypatch) -> None:
        counted = []
        monkeypatch.setattr(instruction, "_steps", lambda *sizes: counted.append(sizes[4]) or (300, None))
        monkeypatch.setattr(instruction, "SEQ_LENGTH", 8192)
        recipe = llama31_8b.instruction_tune_single_gpu(gpu_memory_gib=24, rank=64)
        assert counted[-1] == recipe.data.seq_length < 8192
        assert recipe.peft.dim == 64

    def test_a_replay_has_a_share(self) -> None:
        recipe = smollm2.instruction_tune(replay=Blend({"ds/en": 1.0}, {"en": "ds/en_validation"}), max_steps=9)
        assert recipe.data.replay_paths == [1.0, "ds/en"]
        assert recipe.data.replay_share == 0.05
        assert recipe.data.replay_validation == {"en": "ds/en_validation"}
        for wrong in ({"replay_share": 0.1}, {"replay": Blend({"ds/en": 1.0}), "replay_share": 0.0}):
            with pytest.raises(CptError, match="give both"):
                smollm2.instruction_tune(**wrong)


class TestFp8:
    @pytest.mark.parametrize("recipe", [llama31_8b.continual_pretrain, llama31_8b.instruction_tune])
    @pytest.mark.parametrize(("precision", "scaling"), [("fp8", "tensorwise"), ("fp8_blockwise", "blockwise")])
    def test_it_is_a_word_of_every_recipe(self, recipe, precision: str, scaling: str, tmp_path: Path) -> None:
        made = recipe(precision=precision, bf16_layers=2)
        plugin = made.trainer.plugins
        assert (plugin.fp8_recipe, plugin.fp8_param_gather, plugin.num_layers_at_end_in_bf16) == (scaling, False, 2)
        assert plan(made, 80).workload.fp8
        (tmp_path / "recipe.yaml").write_text(YamlSerializer().serialize(made))
        assert yaml_file.load(tmp_path / "recipe.yaml") == made
        built = fiddle.build(plugin).dtype_config
        assert (built.fp8_recipe, built.first_last_layers_bf16, built.fp8_param_gather) == (scaling, True, False)
        assert plan(recipe(), 80).workload.fp8 is False

    def test_lora_on_one_gpu_takes_it(self) -> None:
        recipe = llama31_8b.continual_pretrain_single_gpu(gpu_memory_gib=80, precision="fp8")
        assert plan(recipe, 80).workload.fp8

    def test_what_it_cannot_be_is_refused(self) -> None:
        for wrong, words in (
            ({"precision": "int8"}, "give bf16, fp8, fp8_blockwise"),
            ({"bf16_layers": 1}, "give bf16_layers with fp8 only"),
            ({"precision": "fp8", "seq_length": 8200}, "tiles of 16"),
        ):
            with pytest.raises(CptError, match=words):
                llama31_8b.continual_pretrain(**wrong)
        with pytest.raises(CptError, match="a CPU has no fp8 products"):
            tiny.continual_pretrain("base", Blend({"ds/ja": 1.0}), precision="fp8")


def test_a_layout_that_the_model_cannot_be_cut_into_is_refused() -> None:
    for sizes, words in (
        (
            {"gpus_per_node": 3, "tensor_model_parallel_size": 3, "global_batch_size": 3},
            "num_attention_heads 32 cannot",
        ),
        ({"gpus_per_node": 10, "pipeline_model_parallel_size": 5, "global_batch_size": 10}, "32 layers cannot be cut"),
        (
            {"gpus_per_node": 16, "tensor_model_parallel_size": 16},
            "num_query_groups 8 cannot be cut over tensor_model_parallel_size 16",
        ),
    ):
        for recipe in (llama31_8b.continual_pretrain, llama31_8b.instruction_tune):
            with pytest.raises(CptError, match=words):
                recipe(**sizes)


def test_the_planner_lays_out_a_recipe_for_a_card() -> None:
    recorded = llama31_8b.continual_pretrain(gpus_per_node=4)
    planned = llama31_8b.continual_pretrain(gpus_per_node=4, gpu_memory_gib=141)
    strategies = [each.trainer.strategy.tensor_model_parallel_size for each in (recorded, planned)]
    assert strategies == [2, 1]
    assert plan(planned, 141).fits
    with pytest.raises(CptError, match="nothing fits"):
        llama31_8b.continual_pretrain(gpus_per_node=1, gpu_memory_gib=24)


WRONG = {"int": ("100x", True, 1.5), "float": ("1e-5x", True), "Sequence": ("ja",), "bool": ("true",)}


@pytest.mark.parametrize("name", catalog.recipes())
def test_every_argument_of_a_wrong_type_is_told_by_its_name(name: str) -> None:
    module, _, function = name.partition(".")
    recipe = getattr(import_module(f"nemo_cpt.recipes.{module}"), function)
    kind = catalog.mixture_of(catalog.recipes()[name].parameters["data"].annotation)
    needed = {"base": "base", "data": kind({"ds/ja": 1.0})}
    for parameter in catalog.recipes()[name].parameters.values():
        kinds = {kind.strip().partition("[")[0] for kind in parameter.annotation.split("|")}
        for wrong in (object(), *(each for kind in kinds - {"str"} for each in WRONG.get(kind, ()))):
            if isinstance(wrong, float) and "float" in kinds:
                continue
            with pytest.raises(CptError, match=rf"^{parameter.name}=.*: give "):
                recipe(**needed | {parameter.name: wrong})
    with pytest.raises(CptError, match=rf"{name} has no parameter max_step; near: .*max_steps"):
        recipe(**needed, max_step=3)


def test_a_parameter_of_any_function_on_the_way_is_the_nearest() -> None:
    with pytest.raises(CptError, match="continual_pretrain_single_gpu has no parameter rnak; near: rank"):
        llama31_8b.continual_pretrain_single_gpu(rnak=3)
    with pytest.raises(CptError, match=r"gpt\.pretrain sets untrained_base itself"):
        gpt.pretrain(untrained_base=False)


def test_plain_values_reach_the_config(tmp_path: Path) -> None:
    made = smollm2.continual_pretrain(tmp_path, max_steps=np.int64(50), lr=np.float32(0.5), directory=tmp_path / "runs")
    assert [type(made.trainer.max_steps), type(made.optim.config.lr)] == [int, float]
    assert (made.resume.base, made.log.log_dir) == (str(tmp_path), str(tmp_path / "runs"))
    (tmp_path / "recipe.yaml").write_text(YamlSerializer().serialize(made))
    assert yaml_file.load(tmp_path / "recipe.yaml") == made


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("trainer.max_steps", "300", "trainer.max_steps='300': give a whole number: trainer.max_steps=300"),
        ("trainer.devices", "8", "trainer.devices='8': give a whole number"),
        ("optim.config.lr", "1e-4", "optim.config.lr='1e-4': give a number"),
        ("trainer.strategy.tensor_parallel_size", 2, "has no field tensor_parallel_size; near: tensor_model_parallel"),
        ("data.batch_size", 2, "data.batch_size: BlendDataModule has no field batch_size; near: micro_batch_size"),
        ("log.ckpt.every", 2, "log.ckpt.every: RunCheckpoint has no field every; near: save_every"),
        ("data", Blend({"ds/ja": 1.0}), "data is a Blend, and no data module"),
        ("data.validation", "ds/ja", "The blend's validation is a string, 'ds/ja'"),
        ("trainer.callbacks", [], "the recipe's own callbacks were replaced"),
        ("trainer.gradient_clip_val", 0.5, "would be passed over: Megatron's optimizer clips, at optim.config.clip"),
        ("trainer.accumulate_grad_batches", 4, "until they are data.global_batch_size sequences"),
        ("trainer.max_epochs", 2, "a run has max_steps steps"),
        ("trainer.max_time", "00:04:00:00", "as if it were finished: Slurm's limit is executor.time"),
        ("trainer.precision", "bf16", "trainer.plugins has it"),
        ("trainer.limit_train_batches", 0.5, "would train on the first batches over and over"),
        ("trainer.limit_train_batches", 1, "a shorter run is max_steps="),  # one batch, where 1.0 is all of them
        ("trainer.overfit_batches", 2, "prepare a small dataset, and train and validate on that"),
        ("trainer.check_val_every_n_epoch", 2, "Those between validations are trainer.val_check_interval"),
        ("trainer.val_check_interval", 0.5, "give a number of steps"),
        ("trainer.num_sanity_val_steps", 5, "Give 1, or 0 for none"),
        ("trainer.min_steps", 10**6, "trainer.min_steps=1000000 would be passed over: the run ends at max_steps 300"),
        ("trainer.min_epochs", 2, "a run has max_steps steps"),
        ("trainer.reload_dataloaders_every_n_epochs", 1, "a run is one epoch"),
        ("trainer.use_distributed_sampler", True, "which Megatron's sampler does: set it to False"),
        ("trainer.enable_checkpointing", False, "set log.ckpt to None as well"),
        ("data.rampup_batch_size", [4, 4, 100], "would end the run where the batch grows, as if it were finished"),
        ("data.dataloader_type", "cyclic", "would mix the validation sets, whose losses are told by their order"),
        ("data.init_consumed_samples", 64, "a run goes on by itself where it stopped"),
        ("data.split", "98,1,1", "data.validation names what is held out"),
        ("data.num_val_samples", 64, "trainer.limit_val_batches global batches are validated on"),
    ],
)
def test_a_field_changed_into_what_no_job_runs_with_is_refused_before_the_launch(path, value, says) -> None:
    recipe = smollm2.continual_pretrain(data=Blend({"ds/ja": 1.0}))
    *parents, name = path.split(".")
    setattr(reduce(getattr, parents, recipe), name, value)
    with pytest.raises(CptError) as refused:
        examine_task(recipe, Place())
    assert says in refused.value.message
    if path != "data.validation":  # the base, which is not there, comes first
        with pytest.raises(CptError) as refused:
            guards.check(recipe)
        assert says in refused.value.message


def test_what_lightning_does_as_it_says_is_left_alone() -> None:
    recipe = smollm2.continual_pretrain(data=Blend({"ds/ja": 1.0}))
    for name, value in {
        "fast_dev_run": 3, "detect_anomaly": True, "profiler": "simple", "min_steps": 2, "min_epochs": 1,
        "limit_train_batches": 1.0, "overfit_batches": 0, "check_val_every_n_epoch": None, "num_sanity_val_steps": -1,
        "reload_dataloaders_every_n_epochs": 0,
    }.items():  # fmt: skip
        setattr(recipe.trainer, name, value)
    recipe.trainer.enable_checkpointing, recipe.log.ckpt = False, None
    recipe.data.dataloader_type, recipe.data.split, recipe.data.num_train_samples = "single", "900,50,50", 10**6
    fields.check_fields(recipe)
    of_nemo = smollm2.continual_pretrain(data=Blend({"ds/ja": 1.0}))
    of_nemo.data = run.Config(llm.PreTrainingDataModule, paths=["ds/ja"], split="98,1,1", num_val_samples=8)
    fields.check_fields(of_nemo)
    tuning = smollm2.instruction_tune(data=Conversations({"sft/ja": 1.0}), max_steps=10)
    fields.check_fields(tuning)
    tuning.data.num_train_samples = 64
    with pytest.raises(CptError, match="would be passed over: give the recipe epochs= or max_steps="):
        fields.check_fields(tuning)


def test_a_trainer_that_is_built_already_is_read_as_its_config() -> None:
    recipe = tiny.continual_pretrain("base", Blend({"ds/ja": 1.0}))
    recipe.trainer = fiddle.build(recipe.trainer)
    fields.check_fields(recipe)
    recipe = tiny.continual_pretrain("base", Blend({"ds/ja": 1.0}))
    recipe.trainer.limit_train_batches = 5
    recipe.trainer = fiddle.build(recipe.trainer)
    with pytest.raises(CptError, match=r"trainer\.limit_train_batches=5 would train on the first batches"):
        fields.check_fields(recipe)


class Collected:
    """What a user's class or function may do with **kwargs: it alone knows their names."""

    def __init__(self, **kwargs) -> None:
        self.train_dataloader = kwargs


class OwnGuards(guards.Guards):
    pass


class OwnTrainer(nl.Trainer):
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)


class OwnStrategy(nl.MegatronStrategy):
    def __init__(self, **kwargs) -> None:
        self.own = kwargs.pop("own")
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data", run.Config(Collected, anything=1)),
        ("data", run.Config(lambda **kwargs: Collected(**kwargs), anything=1)),
        ("trainer.strategy", run.Config(OwnStrategy, own=1, tensor_model_parallel_size=1)),
        ("trainer.callbacks", [run.Config(OwnGuards)]),
        ("trainer", run.Config(OwnTrainer, max_steps=3, callbacks=[run.Config(guards.Guards)])),
        ("trainer.devices", (0,)),
        ("trainer.accumulate_grad_batches", 1),
        ("trainer.max_epochs", -1),
        ("trainer.devices", "0,1"),
    ],
)
def test_what_users_set_in_a_config_is_let_pass(path, value) -> None:
    recipe = smollm2.continual_pretrain(data=Blend({"ds/ja": 1.0}))
    *parents, name = path.split(".")
    setattr(reduce(getattr, parents, recipe), name, value)
    fields.check_fields(recipe)
    settings_in(recipe)


def test_a_bases_rows_count_and_not_those_that_a_recipes_model_states(tmp_path: Path) -> None:
    assert plan(smollm2.continual_pretrain(), 24).workload.parameters == pytest.approx(134.5e6, rel=1e-3)
    for made in (mistral_7b.continual_pretrain(), mistral_7b.continual_pretrain(tmp_path)):
        # Else a base of more rows, which was grown, would be refused by a size that nobody gave.
        assert ("vocab_size" in made.model.config.__arguments__) is (made.resume.base != str(tmp_path))
    assert "vocab_size" not in describe(catalog.recipe("qwen25_7b"), {}, [], "local", []).model


def test_a_copied_script_trains_the_model_that_stands_in_it(tmp_path: Path, monkeypatch) -> None:
    write_script(catalog.recipe("llama31_8b"), tmp_path / "my_own_copy.py")
    text = (tmp_path / "my_own_copy.py").read_text()
    (tmp_path / "my_own_copy.py").write_text(text.replace("8B, seq_length", "8B, rotary_base=123, seq_length"))
    monkeypatch.syspath_prepend(tmp_path)
    mine = import_module("my_own_copy")
    for function in (mine.continual_pretrain, mine.instruction_tune, mine.continual_pretrain_single_gpu):
        recipe = function()
        assert recipe.model.config.rotary_base == 123
        assert recipe.model.config.seq_length == recipe.data.seq_length


def test_a_recipe_that_was_not_called_is_none() -> None:
    with pytest.raises(CptError, match="is no recipe: give what a recipe's function returns"):
        guards.check(smollm2.continual_pretrain)
    with pytest.raises(CptError, match=r"a run\.Config of LlamaConfig without a config"):
        smollm2.continual_pretrain(model=smollm2.model().config)


def test_numpys_numbers_and_paths_in_fields_can_be_sent(tmp_path: Path) -> None:
    recipe = smollm2.continual_pretrain()
    recipe.trainer.max_steps, recipe.log.log_dir = np.int64(50), tmp_path
    fields.make_plain(recipe)
    assert ZlibJSONSerializer().deserialize(ZlibJSONSerializer().serialize(recipe)) == recipe
    recipe.trainer.callbacks.append(run.Config(StopEarly, validation_set=tmp_path))
    fields.make_plain(recipe)
    assert recipe.trainer.callbacks[-1].validation_set == tmp_path  # a callback may want its Path
    assert (recipe.trainer.max_steps, recipe.log.log_dir) == (50, str(tmp_path))


@pytest.mark.parametrize(
    ("blend", "says"),
    [
        (Blend({}), "has no training data"),
        (Blend({"ds/ja": "0.75"}), "The weight of 'ds/ja' in the blend is '0.75'"),
        (Blend({"ds/ja": 1.0}, weighting="token"), "weighting is 'token'"),
    ],
)
def test_the_form_of_a_blend_is_looked_at_where_it_is_given(blend: Blend, says: str) -> None:
    with pytest.raises(CptError, match=says):
        smollm2.continual_pretrain(data=blend)
    with pytest.raises(CptError, match=says):
        smollm2.instruction_tune(replay=blend, replay_share=0.1)


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
    """The first in a process of its own, where nobody has imported the recipes."""
    own = [str(Path(sys.executable).with_name("nemo")), "llm", "pretrain"]
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    given = ["--factory", "llama31_8b_cpt", "--to-yaml", str(first), "trainer.max_steps=77"]
    _check(subprocess.run([*own, *given], capture_output=True, text=True, timeout=240))
    assert "max_steps: 77" in first.read_text()
    _check(nemo("llm", "pretrain", "--yaml", str(first), "--to-yaml", str(second)))
    assert second.read_text() == first.read_text()


def test_nemo_llm_finds_the_factory_of_instruction_tuning(tmp_path: Path) -> None:
    given = ["--factory", "llama31_8b_sft", "--to-yaml", str(tmp_path / "sft.yaml"), "trainer.max_steps=77"]
    _check(nemo("llm", "finetune", *given))
    assert "max_steps: 77" in (tmp_path / "sft.yaml").read_text()


@pytest.mark.parametrize("launch", [["--dryrun"], ["--yes"]], ids=lambda words: words[0])
def test_nemo_llm_ends_with_two_where_a_launch_is_refused(launch: list[str]) -> None:
    done = nemo("llm", "pretrain", "--factory", "smollm2_cpt", *launch, "resume.base=nowhere")
    assert done.returncode == 2
    assert "nemo_cpt: smollm2_cpt is not launched (NEMO_CPT_FORCE=1 launches it all the same)" in done.stderr
    assert "base: the base nowhere is not there" in done.stderr


def _check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
