"""The CPU stack plays a GPU while it is entered, and leaves nothing behind."""

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import utils as transformer_utils
from torch._dynamo.utils import counters
from transformers.activations import NewGELUActivation

from nemo_cpt.cpu_stack import cpu_stack

WATCHED = [
    (torch.cuda, "current_device"),
    (torch.cuda, "is_available"),
    (torch.cuda, "Stream"),
    (torch.cuda, "manual_seed"),
    (torch.Tensor, "cuda"),
    (torch.nn.Module, "cuda"),
    (megatron_random, "_get_cuda_rng_state"),
]


def test_everything_is_as_before_after_it() -> None:
    before = [getattr(owner, name) for owner, name in WATCHED]
    with cpu_stack(), cpu_stack():
        assert all(getattr(owner, name) is not old for (owner, name), old in zip(WATCHED, before, strict=True))
    assert [getattr(owner, name) for owner, name in WATCHED] == before


def test_gpt2s_gelu_needs_no_compiler() -> None:
    values = torch.linspace(-4, 4, 101)
    torch._dynamo.reset()
    counters.clear()
    with cpu_stack():
        found = transformer_utils.openai_gelu(values)
    assert not counters["stats"]  # of graphs that were compiled
    torch.testing.assert_close(found, NewGELUActivation()(values), rtol=1e-6, atol=1e-6)


def test_it_is_left_after_an_error_too() -> None:
    before = torch.cuda.current_device
    with pytest.raises(ValueError, match="boom"), cpu_stack():
        raise ValueError("boom")
    assert torch.cuda.current_device is before


def test_cuda_tensors_are_cpu_tensors_inside() -> None:
    with cpu_stack():
        made = [
            torch.zeros(2, device="cuda"),
            torch.tensor([1.0], device=torch.device("cuda:0"), pin_memory=True),
            torch.ones(1).to("cuda", non_blocking=True),
            torch.ones(1).cuda(),
            torch.ones(1).pin_memory(),
        ]
        assert {tensor.device.type for tensor in made} == {"cpu"}
        assert made[0].type() == "torch.cuda.FloatTensor"
        assert made[0].bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert made[0].type() == "torch.FloatTensor"


def test_no_gpu_is_seen_through_a_cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning lets such a build take the number of devices, which is the CPU's here, for an answer."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch.cuda.device_count() > 0)
    with cpu_stack():
        assert torch.cuda.device_count() == 1
        assert not torch.cuda.is_available()
    assert torch.cuda.is_available() == (torch.cuda.device_count() > 0)


def test_megatrons_generators_fork_as_on_a_gpu() -> None:
    with cpu_stack():
        tracker = CudaRNGStatesTracker()
        tracker.add("model-parallel", 7)
        torch.manual_seed(1)
        plain = torch.rand(3)
        torch.manual_seed(1)
        with tracker.fork("model-parallel"):
            forked = torch.rand(3)
        assert torch.equal(torch.rand(3), plain)  # the fork used another generator
        assert torch.equal(forked, torch.rand(3, generator=torch.Generator().manual_seed(7)))


def test_parts_of_transformer_engine_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has Transformer Engine, for a model that is to run on its CPU."""
    from megatron.core import optimizer, utils
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.optimizer import clip_grads
    from megatron.core.transformer import TransformerConfig, transformer_block

    def refused(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDAGuardImpl initialized with non-CUDA DeviceType: cpu")

    for module, name in (
        (transformer_block, "LayerNormImpl"),
        (gpt_layer_specs, "LNImpl"),
        (optimizer, "Adam"),
        (clip_grads, "multi_tensor_applier"),
    ):
        monkeypatch.setattr(module, name, refused)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, normalization="RMSNorm")
    with cpu_stack():
        layer = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm").submodules
        norms = [make(config, 8, 1e-5) for make in (transformer_block.LayerNormImpl, layer.input_layernorm)]
        assert optimizer.Adam is torch.optim.AdamW
        assert clip_grads.multi_tensor_applier is utils.local_multi_tensor_applier
    assert [type(norm) for norm in norms] == [torch.nn.RMSNorm] * 2
