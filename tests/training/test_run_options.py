"""`logger=`, `early_stop=` and `seed=` of a recipe: what they do in a job, and in the next start of its run."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import numpy
import pytest
import torch

from nemo_cpt.checkpoint.distributed_reader import DistributedReader
from nemo_cpt.errors import CptError
from nemo_cpt.recipes import continual, tiny
from nemo_cpt.training.early_stop import StopEarly
from nemo_cpt.training.options import LoggerOptions, read_early_stop, read_logger
from nemo_cpt.training.run_folder import newest_whole
from tests.training import jobs

NO_LEARNING = {"lr": 1e-30, "min_lr": 0.0, "warmup_steps": 0}  # so that no validation is better than the first
WANDB = {"wandb": "cpt", "group": "ja", "tags": ["tiny"], "offline": True}


def _train(world: Path, blend: Any, name: str, **changes: Any) -> None:
    sizes = {"seq_length": 64, "global_batch_size": 8, "val_check_interval": 2, "directory": str(world / "runs")}
    made = tiny.continual_pretrain(str(world / "base"), blend, name=name, **sizes | NO_LEARNING | changes)
    run.run(continual.with_lora(made, rank=4), direct=True)


def start(world: Path, blend: Any, name: str, **changes: Any) -> str:
    """Start a run, or go on with it; return what it prints."""
    log = world / f"{name}.log"
    before = log.stat().st_size if log.exists() else 0
    assert jobs.run(functools.partial(_train, world, blend, name, **changes), log=log) == 0, log.read_text()[-3000:]
    return log.read_text()[before:]


@pytest.fixture(scope="module")
def told(world: Path, blend: Any) -> list[str]:
    """What three starts of one run print: two alike, and one with more patience."""
    given = {"max_steps": 20, "early_stop": "ja", "logger": WANDB, "seed": 1}
    return [start(world, blend, "stopping", patience=patience, **given) for patience in (1, 1, 2)]


def test_a_run_ends_when_the_loss_of_a_set_falls_no_more(told: list[str], world: Path) -> None:
    assert "ended early at step 4 of 20: val_loss_ja has not fallen below" in told[0]
    assert "(step 2) in 1 validations. To train on, give a larger patience=" in told[0]
    assert "ended early at step 4 of 20" in told[1]
    assert "ended early at step 6 of 20" in told[2]
    steps = [json.loads(line) for line in (world / "runs/stopping/metrics/steps.jsonl").read_text().splitlines()]
    assert [each["step"] for each in steps if "reduced_train_loss" in each] == [1, 2, 3, 4, 5, 6]
    assert newest_whole(world / "runs/stopping/checkpoints").step == 6


def test_a_resumed_run_goes_on_in_its_wandb_run(told: list[str], world: Path) -> None:
    ran = sorted((world / "runs/stopping/wandb").glob("offline-run-*"))
    assert len(ran) >= 2
    assert {folder.name.rpartition("-")[2] for folder in ran} == {(world / "runs/stopping/wandb/run_id").read_text()}
    written = next(ran[0].glob("*.wandb")).read_bytes()
    for word in (b"val_loss_ja", b"reduced_train_loss", b"stopping", b"tiny"):
        assert word in written


def test_another_seed_gives_other_adapters(told: list[str], world: Path, blend: Any) -> None:
    start(world, blend, "other_seed", max_steps=1, seed=2)
    one, other = (_first_adapter(world / "runs" / name / "checkpoints") for name in ("stopping", "other_seed"))
    assert one.shape == other.shape
    assert not numpy.array_equal(one, other)


def _first_adapter(checkpoints: Path) -> numpy.ndarray:
    reader = DistributedReader(newest_whole(checkpoints).path / "weights")
    return reader.read("module.decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight", 0)


def test_a_resumed_run_goes_on_in_its_mlflow_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install mlflow-skinny")
    from nemo_cpt.recipes import parts

    log = parts.log(str(tmp_path), "r", logger={"mlflow": "cpt", "tags": ["tiny"], "group": "ja"})
    ids = set()
    for step in (1, 2):
        (logger,) = fdl.build(log).extra_loggers
        logger.log_metrics({"val_loss_ja": 2.0}, step=step)
        ids.add(logger.run_id)
    assert ids == {(tmp_path / "r/mlflow/run_id").read_text()}
    (values,) = (tmp_path / "mlruns").rglob("metrics/val_loss_ja")
    assert len(values.read_text().splitlines()) == 2


def test_what_a_logger_may_be() -> None:
    assert read_logger(None) == read_logger("tensorboard") == LoggerOptions()
    assert read_logger("wandb:cpt") == LoggerOptions(kind="wandb", project="cpt")
    assert read_logger(WANDB) == LoggerOptions(kind="wandb", project="cpt", group="ja", tags=("tiny",), offline=True)
    assert read_logger({"mlflow": "cpt", "tags": "one", "uri": "http://h"}).tags == ("one",)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("wandb", "give the project's name, as in wandb:my-project"),
        ("wnadb:cpt", "give wandb:PROJECT, mlflow:EXPERIMENT or tensorboard"),
        ({"group": "ja"}, "give wandb:PROJECT"),
        ({"wandb": "cpt", "grop": "ja"}, "wandb has no field grop; near: group"),
        ({"mlflow": "cpt", "offline": True}, "mlflow has no field offline; it has: name, group, tags, uri"),
        ({"wandb": "cpt", "tags": 3}, r"logger\['tags'\]=3: give a list of text or text or None"),
        ({"wandb": "cpt", "offline": "yes"}, r"logger\['offline'\]='yes': give True or False"),
    ],
)
def test_a_logger_that_there_is_not(given: Any, says: str) -> None:
    with pytest.raises(CptError, match=says):
        read_logger(given)


def test_a_loss_that_is_no_number_is_no_good_end() -> None:
    stop = StopEarly("ja", patience=2)
    stops = [stop._evaluate_stopping_criteria(torch.tensor(loss))[0] for loss in (3.0, math.nan, math.nan)]
    assert (stops, float(stop.best_score)) == ([False, False, True], 3.0)


def test_what_an_early_stop_may_be() -> None:
    assert read_early_stop(None, None, ["ja"]) is None
    assert read_early_stop("ja", None, ["ja"]) == ("ja", 3)
    for given, says in {
        ("jp", None): "early_stop=jp: that is no validation set; there are: ja, en",
        (None, 2): "patience=2 is early_stop's",
        ("ja", 0): "patience=0: give a whole number of 1 or more",
    }.items():
        with pytest.raises(CptError, match=says):
            read_early_stop(*given, ["ja", "en"])
