"""Asynchronous checkpoints: one at a time, and written from a copy that nothing else gets in the meantime."""

import mmap
import multiprocessing
import queue
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import load
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from nemo.lightning.io.pl import MegatronCheckpointIO
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from nemo_cpt.cpu_stack import cpu_stack
from nemo_cpt.training import patches

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    with cpu_stack():
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    patches.apply()
    for owner, name in [
        (AsyncFinalizableCheckpointIO, "save_checkpoint"),
        (TemporalAsyncCaller, "schedule_async_call"),
        (TemporalAsyncCaller, "close"),
    ]:
        monkeypatch.setattr(owner, name, getattr(owner, name).unpatched)


class Saves:
    """Saves of one tensor whose writers wait until the process that started them waits for them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.awaited = folder, FORK.Event()
        self.io = AsyncFinalizableCheckpointIO(MegatronCheckpointIO(async_save=True, parallel_save=False))
        self.weight = torch.zeros(8)
        write, join = FileSystemWriterAsync.write_preloaded_data, TemporalAsyncCaller.close

        def write_when_awaited(*args: Any, **kwargs: Any) -> None:
            self.awaited.wait()
            write(*args, **kwargs)

        def close(*args: Any, **kwargs: Any) -> None:
            self.awaited.set()
            join(*args, **kwargs)

        monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(write_when_awaited))
        monkeypatch.setattr(TemporalAsyncCaller, "close", close)

    def save(self, step: int) -> int:
        """Start a save of zeros + step, and return how many are under way."""
        self.awaited.clear()
        self.weight += 1
        progress = {"epoch_loop.batch_progress": {"total": {"completed": step}}}
        state = {"loops": {"fit_loop": progress}, "weight": ShardedTensor.from_rank_offsets("weight", self.weight)}
        self.io.save_checkpoint(state, self.folder / f"step{step}")
        return self.io.async_calls_queue.get_num_unfinalized_calls()

    def written(self, step: int) -> float:
        wanted = {"weight": ShardedTensor.from_rank_offsets("weight", torch.empty(8))}
        return load(wanted, str(self.folder / f"step{step}" / "weights"))["weight"].mean().item()


@pytest.mark.usefixtures("megatron")
def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patches.apply()
    saves = Saves(tmp_path, monkeypatch)
    assert [saves.save(step) for step in (1, 2, 3)] == [1, 1, 1]
    assert [saves.written(step) for step in (1, 2)] == [1, 2]
    saves.io.maybe_finalize_save_checkpoint(blocking=True)
    assert saves.written(3) == 3


@pytest.mark.usefixtures("megatron", "unpatched")
def test_nemo_lets_them_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = Saves(tmp_path, monkeypatch)
    assert [saves.save(step) for step in (1, 2, 3)] == [1, 2, 3]
    saves.io.maybe_finalize_save_checkpoint(blocking=True)


class PinnedMemory:
    """What PyTorch's pinned memory is to a fork: shared with it, and given out again as soon as it is let go of."""

    def __init__(self) -> None:
        self.free = [mmap.mmap(-1, 32) for _ in range(1)]

    def take(self, value: float) -> torch.Tensor:
        memory = self.free.pop() if self.free else mmap.mmap(-1, 32)
        tensor = torch.frombuffer(memory, dtype=torch.float32).fill_(value)
        weakref.finalize(tensor, self.free.append, memory)
        return tensor


def save_beside_a_batch() -> list[float]:
    """Save ones while a data loader asks for memory; what was written."""
    pinned, caller, go_on, written = PinnedMemory(), TemporalAsyncCaller(), FORK.Event(), FORK.SimpleQueue()

    def write(rank: int, staged: Any, results: Any) -> None:
        go_on.wait()
        written.put(staged[0].tolist())

    def stage() -> list[torch.Tensor]:
        return [pinned.take(1.0)]

    caller.schedule_async_call(AsyncRequest(write, (0, None, None), [], preload_fn=stage))
    batch = pinned.take(7.0)
    go_on.set()
    assert caller.is_current_async_call_done(blocking=True)
    assert batch.tolist() == [7.0] * 8
    assert len(pinned.free) == (0 if not hasattr(caller, "staged") else 1)  # let go of once it is written
    return written.get()


@pytest.mark.usefixtures("megatron")
def test_what_is_written_is_what_was_staged() -> None:
    patches.apply()
    assert save_beside_a_batch() == [1.0] * 8


@pytest.mark.usefixtures("megatron", "unpatched")
def test_megatron_writes_what_took_its_place() -> None:
    assert save_beside_a_batch() == [7.0] * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
class TestOnGpu:
    def save_beside_a_batch(self) -> tuple[bool, list[float]]:
        """The same with PyTorch's own pinned memory: whether the batch got the checkpoint's, and what was written."""
        weight, caller, go_on, written = (
            torch.ones(2**16, device="cuda"), TemporalAsyncCaller(), FORK.Event(), FORK.SimpleQueue()
        )  # fmt: skip
        addresses = []

        def write(rank: int, staged: Any, results: Any) -> None:
            go_on.wait()
            written.put([staged[0][2][1][0][1].min().item(), staged[0][2][1][0][1].max().item()])

        def stage() -> Any:
            staged = FileSystemWriterAsync.preload_tensors([("file", "key", ([], [(None, weight)]))], True)
            addresses.append(staged[0][2][1][0][1].data_ptr())
            return staged

        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            caller.schedule_async_call(AsyncRequest(write, (0, None, None), [], preload_fn=stage))
            batch = torch.empty(2**16, pin_memory=True).fill_(7.0)
            go_on.set()
            caller.close()
        finally:
            torch.distributed.destroy_process_group()
        return batch.data_ptr() == addresses[0], written.get()

    def test_a_batch_gets_other_memory(self) -> None:
        patches.apply()
        assert self.save_beside_a_batch() == (False, [1.0, 1.0])

    @pytest.mark.usefixtures("unpatched")
    def test_it_gets_the_checkpoints_without_the_patch(self) -> None:
        assert self.save_beside_a_batch() == (True, [7.0, 7.0])


@pytest.mark.parametrize("patched", [True, False])
def test_who_keeps_the_writers_reports_does_not_import_pytorch(patched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    patches.report_writes_as_bytes()
    get_queue = filesystem_async._get_write_results_queue
    reports = get_queue() if patched else get_queue.unpatched()
    report = {0: [WriteResult(MetadataIndex("weight"), size_in_bytes=4, storage_data=None)]}
    reports.put(report)
    manager = (reports._queue if patched else reports)._manager
    loaded = [Path(each.path).name for each in psutil.Process(manager._process.pid).memory_maps()]
    assert any("libtorch" in name for name in loaded) != patched
    assert reports.get_nowait() == report
    with pytest.raises(queue.Empty):
        reports.get_nowait()
    manager.shutdown()
