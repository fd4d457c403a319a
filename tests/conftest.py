"""What all tests share: no hub, one torch thread (the tests fork), and a word on what is skipped."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item.path)))
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _group(path: Path) -> str:
    """A file's tests stay in one process, which shares their fixtures; those with a Slurm cluster share the one."""
    cluster = path.stem in ("test_slurm", "test_slurm_training", "test_ssh", "test_doctor_slurm")
    return "slurm" if cluster else f"{path.parent.name}/{path.stem}"
