"""What all tests share: no hub, one torch thread (the tests fork), and a word on what is skipped."""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import nemo_cpt  # noqa: F401  ahead of Megatron, which it keeps from compiling

TESTS = Path(__file__).parent

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Begun first, so that at the end no process is left with a file of minutes while the others have none.
SLOW = ("executors", "training", "checkpoint")
# Those that mostly wait for a real Slurm: one process runs them all, from the beginning, while the others work.
WAITING = ("slurm_training", "slurm_ends", "slurm_workflow", "slurm", "ssh", "array_jobs")

# Under nohup and behind `&` the tests are deaf to these; with a handler, what they start is not.
for _number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda number, frame: None)

settings.register_profile("busy", deadline=None)  # the machine may have other work
settings.load_profile("busy")

gc.set_threshold(100_000)  # most of what the tests make is modules, which stay


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Close what a test has left in circles of references: sockets, pipes of processes, gloo's event loops.

    The collector comes so seldom here that a process would have more than 1,000 of them open, which is the limit.
    """
    result = yield
    gc.collect(1)  # not the oldest, among which are many modules
    if (nextitem is None or nextitem.path != item.path) and len(os.listdir("/proc/self/fd")) > 200:
        gc.collect()
    return result


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What killed processes leave where they keep temporary files goes when pytest removes its own folders."""
    folder = tmp_path_factory.mktemp("tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)  # what it has read before
        yield


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported until now: no collection walks over it, nor copies it in a process that is forked


def _waits(file: Path) -> bool:
    return file.parent.name == "executors" and file.stem.removeprefix("test_") in WAITING


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "waiting" if _waits(Path(file)) else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (not _waits(item.path), item.path.relative_to(TESTS).parts[0] not in SLOW))
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
