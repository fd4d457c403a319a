"""States in pinned host memory: the arithmetic needs Transformer Engine and a GPU, the bookkeeping does not."""

import itertools
import types
from importlib.util import find_spec

import pytest
import torch

from nemo_cpt.errors import CptError
from nemo_cpt.training import optimizer, upstream

ON_GPU = torch.cuda.is_available() and find_spec("transformer_engine") is not None


def config(**fields):
    return types.SimpleNamespace(
        **{"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.float32, "exp_avg_sq_dtype": torch.float32}
        | fields
    )


class TestConfiguration:
    def test_states_are_checked_before_anything_is_allocated(self):
        with pytest.raises(CptError, match=r"\['moment'\].*exp_avg.*master_param"):
            optimizer.HostStateOptimizer(config(), host_states=["exp_avg", "moment"])
        with pytest.raises(CptError, match="use_precision_aware_optimizer=True"):
            optimizer.HostStateOptimizer(config(use_precision_aware_optimizer=False))
        with pytest.raises(CptError, match="exp_avg_sq in fp8"):
            optimizer.HostStateOptimizer(config(exp_avg_sq_dtype=torch.uint8))

    def test_fp8_states_may_stay_on_the_gpu(self):
        module = optimizer.HostStateOptimizer(config(exp_avg_dtype=torch.uint8), host_states=["exp_avg_sq"])
        assert module.host_states == ("exp_avg_sq",)

    def test_the_states_are_dropped_before_the_teardown_copies_them(self):
        module = optimizer.HostStateOptimizer(config())
        adam = types.SimpleNamespace(state={"parameter": {"exp_avg": 1}})
        module._adams = [adam]
        left = []
        trainer = types.SimpleNamespace(strategy=types.SimpleNamespace(teardown=lambda: left.append(len(adam.state))))
        module.on_fit_start(trainer, types.SimpleNamespace(config=types.SimpleNamespace()))
        assert len(adam.state) == 1
        trainer.strategy.teardown()
        assert left == [0]


class TestPinnedMemory:
    @pytest.fixture
    def pinned(self, monkeypatch):
        """Plain host memory instead of pinned; the sizes asked for."""
        sizes = []
        monkeypatch.setattr(
            optimizer, "_pinned", lambda size: sizes.append(size) or torch.full((size,), 255, dtype=torch.uint8)
        )
        monkeypatch.setattr(optimizer, "SLAB_BYTES", 4096)
        return sizes

    def test_small_tensors_share_slabs_and_large_ones_have_their_own_size(self, pinned):
        memory = optimizer.PinnedMemory()
        taken = [memory._take(size) for size in (100, 1000, 3000, 1024, 1024, 1024)]
        assert [each.numel() for each in taken] == [100, 1000, 3000, 1024, 1024, 1024]
        assert pinned == [4096, 3000, 4096]
        spans = sorted((each.data_ptr(), each.data_ptr() + each.numel()) for each in taken)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))

    def test_a_refusal_says_how_much_and_what_to_do(self, monkeypatch):
        refusing = types.SimpleNamespace(cudaHostRegister=lambda *arguments: 2)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
        with pytest.raises(CptError, match=r"refused to pin 0\.00 GiB.*error 2.*ulimit"):
            optimizer._pinned(4096)


class TestInitialization:
    """Transformer Engine's FusedAdam asks for each state by name, once when it first steps and once when it loads."""

    @pytest.fixture
    def adam(self, monkeypatch):
        on_device = []
        adam = types.SimpleNamespace(state={}, _scales={}, on_device=on_device)
        adam.name_to_dtype_map = dict.fromkeys(optimizer.STATES, torch.float32) | {"exp_avg": torch.bfloat16}
        adam._initialize_state = lambda *arguments: on_device.append(arguments[1])
        monkeypatch.setattr(optimizer.PinnedMemory, "zeros", lambda self, shape, dtype: torch.zeros(shape, dtype=dtype))
        return adam

    def test_only_the_named_states_leave_the_device(self, adam):
        param = torch.ones(3, 2)
        adam.state[param] = {}
        optimizer.keep_states_on_host(adam, ["exp_avg", "master_param"])
        adam._initialize_state(param, "exp_avg", True)
        adam._initialize_state(param, "exp_avg_sq", True)
        adam._initialize_state(param, "master_param", False, True)
        assert adam.on_device == ["exp_avg_sq"]
        assert {name: state.dtype for name, state in adam.state[param].items()} == {
            "exp_avg": torch.bfloat16,
            "master_param": torch.int16,
        }
        assert adam._scales[param].keys() == {"exp_avg"}

    def test_loading_reuses_the_memory_and_keeps_its_values_until_they_are_overwritten(self, adam):
        param = torch.ones(3, 2)
        adam.state[param] = {}
        optimizer.keep_states_on_host(adam, ["exp_avg_sq"])
        adam._initialize_state(param, "exp_avg_sq", True)
        first = adam.state[param]["exp_avg_sq"].fill_(7.0)
        adam.state[param] = {}
        adam._initialize_state(param, "exp_avg_sq", False)
        assert adam.state[param]["exp_avg_sq"] is first
        assert (first == 7.0).all()
        adam._initialize_state(param, "exp_avg_sq", True)
        assert (first == 0.0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU with Transformer Engine")
class TestOnTheGpu:
    def train(self, host_states, dtype):
        from transformer_engine.pytorch.optimizers import FusedAdam

        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(n, 1000, device="cuda").bfloat16()) for n in (3, 500, 7)]
        adam = FusedAdam(
            parameters, lr=1e-3, weight_decay=0.1, master_weights=True, use_decoupled_grad=True,
            store_param_remainders=True, exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype,
        )  # fmt: skip
        optimizer.keep_states_on_host(adam, host_states)
        for _ in range(3):
            for parameter in parameters:
                parameter.decoupled_grad = torch.randn_like(parameter)
            adam.step()
        return [parameter.detach() for parameter in parameters], adam

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_states_on_the_host_give_the_same_weights_to_the_last_bit(self, dtype):
        upstream.step_adam_in_slices()
        on_device, _ = self.train((), dtype)
        on_host, adam = self.train(optimizer.STATES, dtype)
        assert all(torch.equal(a, b) for a, b in zip(on_device, on_host, strict=True))
        state = adam.state_dict()["state"][1]
        assert all(torch.isfinite(value.float().cpu()).all() for value in state.values())
