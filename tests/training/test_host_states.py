"""Adam's states in pinned host memory: the arithmetic needs Transformer Engine and a GPU, the bookkeeping does not."""

import itertools
from collections import defaultdict
from importlib.util import find_spec

import pytest
import torch

from nemo_cpt.checkpoint.nemo_model import one_process
from nemo_cpt.constants import ADAM_STATES
from nemo_cpt.cpu_stack import cpu_stack
from nemo_cpt.errors import CptError
from nemo_cpt.training import host_states, patches

ON_GPU = torch.cuda.is_available() and find_spec("transformer_engine") is not None


class Cudart:
    """CUDA's runtime, as far as pinning goes: the sizes asked for, and an error code."""

    def __init__(self, code=0):
        self.code, self.sizes = code, []

    def cudaHostRegister(self, address, size, flags):  # noqa: N802
        self.sizes.append(size)
        return self.code


@pytest.fixture
def cudart(monkeypatch):
    """Host memory that nobody pins, viewed as CUDA tensors that stay on the CPU, in slabs of 4 kB."""
    played = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: played)
    monkeypatch.setattr(host_states, "as_cuda", lambda host: host.view(host.shape))
    monkeypatch.setattr(host_states, "SLAB_BYTES", 4096)
    return played


class Adam(torch.optim.Optimizer):
    """The methods of Transformer Engine's FusedAdam that are replaced, in its words; with bf16 first moments."""

    store_param_remainders = True
    name_to_dtype_map = dict.fromkeys(ADAM_STATES, torch.float32) | {"exp_avg": torch.bfloat16}

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})
        self._scales, self.on_device, self.copied = {}, [], []

    def _initialize_state(self, param, state_name, zero_buffer, store_param_remainders=False):
        self.on_device.append(state_name)
        self.state[param][state_name] = torch.zeros_like(param, dtype=self.name_to_dtype_map[state_name])

    def initialize_state(self, param, store_param_remainders):
        for name in ("exp_avg", "exp_avg_sq"):
            self._initialize_state(param, name, True)
        self._initialize_state(param, "master_param", False, store_param_remainders)

    def get_unscaled_state(self, param, state_name):
        state = self.state[param][state_name]
        return state.float() if state.dtype == torch.bfloat16 else state

    def set_scaled_state(self, param, state_name, unscaled_state):
        self.copied.append(state_name)
        if state_name not in self.state[param]:
            self._initialize_state(param, state_name, False, state_name == "master_param")
        self.state[param][state_name].copy_(unscaled_state)

    def step(self):
        raise NotImplementedError


@pytest.fixture
def adam(cudart):
    return Adam([torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16)) for _ in range(2)])


class TestPinnedMemory:
    def test_small_tensors_share_slabs_and_large_ones_have_their_own_size(self, cudart):
        memory = host_states.PinnedMemory()
        taken = [memory._take(size, torch.uint8) for size in (100, 1000, 3000, 1024, 1024, 1024)]
        assert [each.numel() for each in taken] == [100, 1000, 3000, 1024, 1024, 1024]
        assert cudart.sizes == [4096, 3000, 4096]
        spans = sorted((each.data_ptr(), each.data_ptr() + each.numel()) for each in taken)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert not any(each.any() for each in taken)

    def test_megatron_writes_them_without_a_copy(self, cudart):
        """`FileSystemWriterAsync.prepare_write_data` clones a CPU tensor whose storage is larger than itself."""
        memory = host_states.PinnedMemory()
        for count in (100, 3000):
            taken = memory._take(count, torch.float32)
            assert taken.untyped_storage().size() == taken.numel() * taken.itemsize

    def test_a_forked_process_does_not_copy_it(self, cudart):
        taken = host_states.PinnedMemory()._take(1, torch.uint8)
        address = taken.data_ptr()
        with open("/proc/self/smaps") as maps:
            blocks = maps.read().split("VmFlags:")
        flags = next(after.split("\n")[0] for before, after in itertools.pairwise(blocks) if holds(before, address))
        assert "dc" in flags.split()  # do not copy area on fork, man 5 proc

    def test_a_refusal_says_how_much_and_what_to_do(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(code=2))
        with pytest.raises(CptError, match=r"refused to pin 0\.00 GiB.*error 2.*ulimit"):
            host_states._pinned(4096)
        with pytest.raises(CptError, match=r"refused to pin .*Cannot allocate memory"):
            host_states._pinned(2**60)


def holds(block, address):
    """Whether the last mapping of a piece of /proc/self/smaps holds an address."""
    spans = [line.split()[0] for line in block.splitlines() if "-" in line.split(" ")[0] and ":" not in line.split()[0]]
    start, end = (int(each, 16) for each in spans[-1].split("-"))
    return start <= address < end


class TestStates:
    """Transformer Engine's FusedAdam asks for each state by name, once when it first steps and once when it loads."""

    def test_only_the_named_states_leave_the_device(self, adam):
        host_states.HostStates(adam, ["exp_avg", "master_param"]).allocate()
        param = adam.param_groups[0]["params"][0]
        assert adam.on_device == ["exp_avg_sq"] * 2
        assert {name: state.dtype for name, state in adam.state[param].items()} == {
            "exp_avg": torch.bfloat16,
            "exp_avg_sq": torch.float32,
            "master_param": torch.int16,
        }
        assert adam._scales[param].keys() == {"exp_avg"}

    def test_loading_reuses_the_memory_and_keeps_its_values_until_they_are_overwritten(self, adam):
        host_states.HostStates(adam, ["exp_avg_sq"])
        param = adam.param_groups[0]["params"][0]
        adam._initialize_state(param, "exp_avg_sq", True)
        first = adam.state[param]["exp_avg_sq"].fill_(7.0)
        adam.state[param] = {}
        adam._initialize_state(param, "exp_avg_sq", False)
        assert adam.state[param]["exp_avg_sq"].data_ptr() == first.data_ptr()
        assert (first == 7.0).all()
        adam._initialize_state(param, "exp_avg_sq", True)
        assert (first == 0.0).all()

    def test_states_that_are_there_are_not_made_again(self, adam):
        states = host_states.HostStates(adam, ADAM_STATES)
        states.allocate()
        param = adam.param_groups[0]["params"][1]
        adam.state[param]["exp_avg_sq"].fill_(7.0)
        states.allocate()
        assert (adam.state[param]["exp_avg_sq"] == 7.0).all()
        adam._initialize_state(param, "exp_avg_sq", True)
        assert (adam.state[param]["exp_avg_sq"] == 0.0).all()

    def test_a_checkpoint_is_written_from_and_read_into_the_states_themselves(self, adam):
        states = host_states.HostStates(adam, ADAM_STATES)
        states.allocate()
        param = adam.param_groups[0]["params"][0]
        unscaled = {
            "param" if name == "master_param" else name: adam.get_unscaled_state(param, name) for name in ADAM_STATES
        }
        written = states.for_checkpoint(unscaled)
        assert {name: tensor.dtype for name, tensor in written.items()} == {
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
            "param": torch.int16,
        }
        adam.load_state_dict(adam.state_dict())
        for name, tensor in written.items():
            adam.set_scaled_state(param, "master_param" if name == "param" else name, tensor.fill_(3))
        assert adam.copied == ["exp_avg"]  # in bf16; what is stored as it is written was in its place
        assert all((state == 3).all() for state in adam.state[param].values())

    def test_states_on_the_gpu_are_written_from_there(self, adam):
        states = host_states.HostStates(adam, ["exp_avg_sq"])
        moment, other = torch.ones(2), torch.zeros(2)
        written = states.for_checkpoint({"exp_avg": moment, "exp_avg_sq": other, "param": moment})
        assert written["exp_avg"] is written["param"] is moment

    def test_states_from_elsewhere_are_copied(self, adam):
        host_states.HostStates(adam, ADAM_STATES)
        values = {"exp_avg_sq": torch.full((3, 2), 5.0), "master_param": torch.full((3, 2), 4, dtype=torch.int16)}
        groups = adam.state_dict()["param_groups"]
        adam.load_state_dict({"state": {1: values}, "param_groups": [groups[0] | {"lr": 0.5}]})
        first, second = adam.param_groups[0]["params"]
        assert adam.param_groups[0]["lr"] == 0.5
        assert isinstance(adam.state, defaultdict)
        assert first not in adam.state
        assert (adam.state[second]["exp_avg_sq"] == 5.0).all()
        assert (adam.state[second]["master_param"] == 4).all()


class TestCheckpoints:
    @pytest.fixture
    def in_threads(self, monkeypatch):
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

        name = "write_preloaded_data_multiproc"
        monkeypatch.setattr(FileSystemWriterAsync, name, vars(FileSystemWriterAsync)[name])  # put back after the test
        host_states.write_checkpoints_in_threads()

    def save(self, folder, tensors):
        """By Megatron, which forks its writers; what they would read is not there in a forked process."""
        from megatron.core import dist_checkpointing

        folder.mkdir()
        dist_checkpointing.save(self.sharded(tensors), str(folder))

    def sharded(self, tensors):
        from megatron.core.dist_checkpointing import ShardedTensor

        return {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}

    def test_megatron_writes_and_reads_the_memory_itself(self, tmp_path, cudart, in_threads):
        from megatron.core import dist_checkpointing

        memory = host_states.PinnedMemory()
        tensors = {name: memory._take(size, torch.float32) for name, size in (("small", 10), ("large", 5000))}
        for tensor in tensors.values():
            tensor.copy_(torch.randn(tensor.shape))
        expected = {name: tensor.clone() for name, tensor in tensors.items()}
        with cpu_stack(), one_process("gloo"):
            self.save(tmp_path / "saved", tensors)
            for tensor in tensors.values():
                tensor.zero_()
            loaded = dist_checkpointing.load(self.sharded(tensors), str(tmp_path / "saved"))
        for name, tensor in expected.items():
            assert loaded[name].data_ptr() == tensors[name].data_ptr()
            assert torch.equal(tensors[name], tensor)

    def test_a_writers_error_ends_the_save(self, tmp_path, cudart, in_threads, monkeypatch):
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from torch.distributed.checkpoint import CheckpointException

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(filesystem_async, "_write_item", full)
        with cpu_stack(), one_process("gloo"), pytest.raises(CheckpointException, match="No space left on device"):
            self.save(tmp_path / "saved", {"state": torch.ones(5)})


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU with Transformer Engine")
class TestOnTheGpu:
    def train(self, names, dtype):
        from transformer_engine.pytorch.optimizers import FusedAdam

        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(n, 1000, device="cuda").bfloat16()) for n in (3, 500, 7)]
        adam = FusedAdam(
            parameters, lr=1e-3, weight_decay=0.1, master_weights=True, use_decoupled_grad=True,
            store_param_remainders=True, exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype,
        )  # fmt: skip
        host_states.HostStates(adam, names)
        for _ in range(3):
            for parameter in parameters:
                parameter.decoupled_grad = torch.randn_like(parameter)
            adam.step()
        return [parameter.detach() for parameter in parameters], adam

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_states_on_the_host_give_the_same_weights_to_the_last_bit(self, dtype):
        patches.step_adam_in_slices()
        on_device, _ = self.train((), dtype)
        on_host, adam = self.train(ADAM_STATES, dtype)
        assert all(torch.equal(a, b) for a, b in zip(on_device, on_host, strict=True))
        state = adam.state_dict()["state"][1]
        assert all(torch.isfinite(value.float().cpu()).all() for value in state.values())
