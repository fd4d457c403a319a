"""Several processes start from a base, save and resume under NumPy 2, which lacks names that Megatron uses."""

import functools
from pathlib import Path
from typing import Any

import nemo_run as run
import numpy
import pytest
from megatron.core.dist_checkpointing import exchange_utils

from nemo_cpt.recipes import tiny
from nemo_cpt.training import patches
from nemo_cpt.training.metrics import read_metrics
from tests.training import jobs

GONE = (  # numpy/_expired_attrs_2_0.py, and what went up to 2.4
    "alltrue asfarray bool8 byte_bounds cast cfloat clongfloat compare_chararrays complex_ cumproduct DataSource disp "
    "fastCopyAndTranspose find_common_type float_ get_array_wrap in1d Inf Infinity infty int0 issctype issubclass_ "
    "issubsctype longcomplex longfloat lookfor mat maximum_sctype msort NaN nbytes NINF NZERO obj2sctype PINF product "
    "PZERO recfromcsv recfromtxt round_ row_stack safe_eval sctype2char sctypes set_string_function singlecomplex "
    "sometrue source string_ tracemalloc_domain trapz uint0 unicode_ who"
)


def train(world: Path, blend: Any, max_steps: int, patched: bool = True) -> None:
    for name in GONE.split():
        vars(numpy).pop(name, None)
    if not patched:
        patches.multiply_shapes_with_numpy_2 = lambda: None
    recipe = tiny.continual_pretrain(
        str(world / "base"), blend, processes=2, name=f"numpy_2_{patched}", directory=str(world / "runs"),
        seq_length=64, global_batch_size=8, max_steps=max_steps, val_check_interval=2, extend="stretch",
    )  # fmt: skip
    assert recipe.trainer.strategy.ckpt_parallel_load
    run.run(recipe, direct=True)


def test_two_processes_start_from_a_base_and_resume(world: Path, blend: Any) -> None:
    log = world / "numpy_2.log"
    for max_steps in (2, 4):
        job = functools.partial(train, world, blend, max_steps)
        assert jobs.run(job, 2, log) == 0, log.read_text()[-3000:]
    steps = [line["step"] for line in read_metrics(world / "runs/numpy_2_True") if "reduced_train_loss" in line]
    assert steps == [1, 2, 3, 4]


def test_they_cannot_without_the_patch(world: Path, blend: Any) -> None:
    log = world / "numpy_2_without.log"
    assert jobs.run(functools.partial(train, world, blend, 2, False), 2, log) != 0
    assert "has no attribute 'product'" in log.read_text()


def test_numpy_itself_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_utils, "np", numpy)
    monkeypatch.delattr(numpy, "product", raising=False)
    patches.multiply_shapes_with_numpy_2()
    assert exchange_utils.np.product((3, 4)) == 12
    assert exchange_utils.np.asarray is numpy.asarray
    assert not hasattr(numpy, "product")
