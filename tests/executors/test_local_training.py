"""The tiny recipe on this machine: stopped, it saves; started again, it goes on at its step, in the same W&B run."""

import copy
import os
import signal
import threading

import nemo_run as run
import pytest

from nemo_cpt.errors import StoppedEarlyError
from nemo_cpt.executors import local
from nemo_cpt.executors.tracking import EXPERIMENT, continue_wandb_run
from nemo_cpt.launching import jobs
from tests.support.executor_jobs import losses, recipe_arguments, wait_until


def test_stopped_it_goes_on_at_its_step_and_in_its_wandb_run(project, material, tmp_path, monkeypatch):
    from lightning.pytorch.loggers import WandbLogger
    from waiting import Wait

    from nemo_cpt.catalog.build import build_recipe

    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    results = tmp_path / "results"
    recipe = build_recipe("tiny.continual_pretrain", recipe_arguments(material, results, 1))
    recipe.log.wandb = run.Config(WandbLogger, project="cpt", save_dir=str(tmp_path))
    recipe.trainer.callbacks.insert(0, run.Config(Wait, folder=str(tmp_path), waits=[4]))
    stopped = threading.Thread(target=stop_this_process_at_step, args=(4, tmp_path), daemon=True)
    stopped.start()
    with pytest.raises(StoppedEarlyError, match="task t: stopped ahead of the end, saved"):
        run.run(recipe, executor=local(), name="t")
    stopped.join()
    assert [task["status"] for task in jobs.status(None)["tasks"]] == ["STOPPED"]
    assert losses(results)[-1][0] == 4
    run.run(recipe, executor=local(), name="t")
    assert [step for step, _ in losses(results)] == list(range(1, 31))
    ids = [folder.name.rpartition("-")[2] for folder in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(ids) == 2
    assert set(ids) == {(results / "tiny_cpt" / "wandb" / "run_id").read_text()}


def stop_this_process_at_step(step, folder):
    """As Ctrl-C or a machine that is taken away does, to the launcher; the job goes on once it has heard of it."""
    wait_until((folder / f"at.{step}").exists)
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: any("saving at the end of the step" in log.read_text() for log in folder.rglob("combined.log")))
    (folder / f"go.{step}").touch()


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """A config as far as it matters here, and an environment without W&B's variables."""
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", EXPERIMENT):
        monkeypatch.setenv(name, "")  # so that it is taken back after the test
        monkeypatch.delenv(name)
    from nemo import lightning as nl

    log = run.Config(nl.NeMoLogger, log_dir=str(tmp_path), name="n", wandb=run.Config(dict))
    return run.Partial(lambda log: None, log=log)


def test_under_slurm_the_first_experiment_names_the_run_and_a_later_one_continues_it(logged, monkeypatch):
    for experiment in ("t_1", "t_2"):
        monkeypatch.setenv("WANDB_RUN_ID", experiment)
        monkeypatch.setenv(EXPERIMENT, experiment)
        started_again = copy.deepcopy(logged)
        assert continue_wandb_run(started_again) == "t_1"
        assert started_again.log.wandb.id == "t_1"


def test_an_id_that_the_user_set_stands(logged, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert continue_wandb_run(logged) is None
    assert os.environ["WANDB_RUN_ID"] == "mine"
    assert list(tmp_path.iterdir()) == []


def test_other_processes_than_the_first_write_nothing(logged, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    assert continue_wandb_run(logged)
    assert list(tmp_path.iterdir()) == []
