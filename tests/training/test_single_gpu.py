import copy
import dataclasses
import types

import fiddle
import pytest
import torch

from nemo_cpt.errors import CptError
from nemo_cpt.training import memory, single_gpu


@pytest.mark.parametrize(
    ("memory_gib", "expected"), [(24, 24), (40, 24), (47.9, 24), (48, 48), (79.6, 48), (80, 80), (141, 80)]
)
def test_lora_takes_the_largest_budget_that_the_gpu_holds(memory_gib, expected):
    assert single_gpu.lora_setting(memory_gib).gpu_memory_gib == expected


@pytest.mark.parametrize(("memory_gib", "expected"), [(48, 48), (80, 80), (96, 80), (141, 141), (192, 141)])
def test_full_parameter_takes_the_largest_budget_that_the_gpu_holds(memory_gib, expected):
    assert single_gpu.full_parameter_setting(memory_gib).gpu_memory_gib == expected


def test_a_budget_without_setting_names_the_smallest_that_has_one():
    with pytest.raises(CptError, match="at least 24 GB of GPU memory, not 16"):
        single_gpu.lora_setting(16)
    with pytest.raises(CptError, match="at least 48 GB of GPU memory, not 24"):
        single_gpu.full_parameter_setting(24)


def test_fp8_needs_ada_or_later():
    single_gpu.check_fp8((8, 9))
    single_gpu.check_fp8((9, 0))
    with pytest.raises(CptError, match=r"this one has 8\.0.*bf16"):
        single_gpu.check_fp8((8, 0))


class TestConfigure:
    @pytest.fixture(scope="class")
    def recipe(self):
        from nemo_cpt.recipes import llama31_8b

        return llama31_8b.continual_pretrain(gpus_per_node=1, tensor_model_parallel_size=1)

    @pytest.mark.parametrize("setting", single_gpu.LORA + single_gpu.FULL_PARAMETER, ids=str)
    def test_every_field_arrives_in_the_recipe(self, recipe, setting):
        changed = copy.deepcopy(recipe)
        single_gpu.configure(changed, setting)
        model = changed.model.config
        assert model.seq_length == changed.data.seq_length == setting.seq_length
        assert changed.data.micro_batch_size == setting.micro_batch_size
        assert getattr(model, "recompute_num_layers", None) == (setting.recompute_num_layers or None)
        fp32_gradients = setting.grad_dtype == "fp32"
        assert changed.trainer.plugins.grad_reduce_in_fp32 is fp32_gradients
        assert changed.trainer.strategy.ddp.grad_reduce_in_fp32 is fp32_gradients
        assert tuple(getattr(changed.optim, "host_states", ())) == setting.host_states
        assert changed.optim.config.lr == recipe.optim.config.lr
        assert changed.optim.lr_scheduler == recipe.optim.lr_scheduler

    def test_it_builds_the_optimizer_module_that_keeps_the_states_on_the_host(self, recipe, monkeypatch):
        from megatron.core.optimizer import OptimizerConfig

        from nemo_cpt.training.optimizer import HostStateOptimizer

        monkeypatch.setattr(OptimizerConfig, "__post_init__", lambda self: None)  # it asks for Transformer Engine
        changed = copy.deepcopy(recipe)
        single_gpu.configure(changed, single_gpu.full_parameter_setting(80))
        module = fiddle.build(changed.optim)
        assert isinstance(module, HostStateOptimizer)
        assert module.host_states == single_gpu.ADAM_STATES
        assert module.config.exp_avg_dtype == module.config.main_grads_dtype == torch.float32

    def test_fp8_weights_are_the_precision_plugins(self, recipe):
        changed = copy.deepcopy(recipe)
        setting = dataclasses.replace(single_gpu.lora_setting(80), fp8_recipe="tensorwise")
        single_gpu.configure(changed, setting)
        assert (changed.trainer.plugins.fp8, changed.trainer.plugins.fp8_recipe) == ("hybrid", "tensorwise")


class TestOutOfMemoryAdvice:
    config = types.SimpleNamespace(num_layers=32, recompute_num_layers=12, cross_entropy_fusion_impl="native")

    def test_it_says_what_to_change_and_keeps_the_allocators_message(self):
        module = types.SimpleNamespace(config=self.config)
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.96 GiB.")
        with pytest.raises(CptError) as caught:
            memory.OutOfMemoryAdvice().on_exception(None, module, error)
        assert "recompute_num_layers=12 of 32" in str(caught.value)
        assert 'cross_entropy_fusion_impl="te"' in str(caught.value)
        assert "Tried to allocate 1.96 GiB" in str(caught.value)
        assert caught.value.__cause__ is error

    def test_it_does_not_offer_what_is_in_use(self):
        self_in_use = types.SimpleNamespace(num_layers=32, recompute_num_layers=32, cross_entropy_fusion_impl="te")
        text = memory.advice(self_in_use, "out of memory")
        assert "recomputed" not in text
        assert "cross_entropy" not in text

    def test_other_errors_pass(self):
        memory.OutOfMemoryAdvice().on_exception(None, types.SimpleNamespace(), ValueError("something else"))
