"""Exports while a run trains: what they hold, what a failing one does, and what a stop leaves."""

import errno
import fcntl
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import lightning.pytorch as pl
import nemo_run as run
import pytest
from nemo.utils import AppState

from nemo_cpt.checkpoint import export_hf
from nemo_cpt.checkpoint.context import RUN_JSON
from nemo_cpt.checkpoint.provenance import Provenance, write_provenance
from nemo_cpt.errors import CptError
from nemo_cpt.recipes import smollm2, tiny
from nemo_cpt.training import exports
from nemo_cpt.training.run_folder import DUE, EXPORTED, EXPORTS, newest_whole
from tests.support import small_models
from tests.support.executor_jobs import wait_until
from tests.training import jobs


class StopWhileExporting(pl.Callback):
    """The job tells itself to stop when the export of step 2 is under way."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            wait_until(lambda: (Path(AppState().log_dir) / EXPORTS / "step-2.log").read_text().endswith("\n"))
            os.kill(os.getpid(), signal.SIGTERM)


def train(
    world: Path,
    blend: Any,
    name: str,
    command: list[str] | None = None,
    stopped_while_exporting: bool = False,
    **changes: Any,
) -> None:
    if command:
        exports.COMMAND = command
    settings = {"seq_length": 64, "global_batch_size": 8, "max_steps": 6, "val_check_interval": 2, "export_every": 2}
    recipe = tiny.continual_pretrain(
        str(world / "base"), blend, name=name, directory=str(world / "runs"), **settings | changes
    )
    recipe.log.ckpt.save_top_k = 1
    if stopped_while_exporting:
        recipe.trainer.callbacks.append(run.Config(StopWhileExporting))
    run.run(recipe, direct=True)


def start(world: Path, blend: Any, name: str, **changes: Any) -> Path:
    """Run a job to its end and return the folder of its exports."""
    log = world / f"{name}.log"
    assert jobs.run(functools.partial(train, world, blend, name, **changes), log=log) == 0, log.read_text()[-3000:]
    return world / "runs" / name / EXPORTS


def test_every_step_asked_for_is_exported_though_its_checkpoint_is_gone(
    world: Path, blend: Any, tmp_path: Path
) -> None:
    made = start(world, blend, "exported", max_steps=7)
    assert sorted(path.name for path in made.iterdir()) == ["step-2", "step-4", "step-6", "step-7"]
    newest = newest_whole(world / "runs" / "exported" / "checkpoints")
    assert newest.step == 7
    export_hf(newest.path, tmp_path / "hf")
    small_models.assert_same_weights(made / "step-7", tmp_path / "hf")
    with pytest.raises(AssertionError):
        small_models.assert_same_weights(made / "step-6", tmp_path / "hf")


def test_the_newest_are_kept(world: Path, blend: Any) -> None:
    made = start(world, blend, "thinned", export_keep=1)
    wait_until(lambda: [path.name for path in made.iterdir()] == ["step-6"])  # a thread removes the others


def test_one_that_fails_is_told_and_the_run_goes_on(world: Path, blend: Any) -> None:
    made = start(world, blend, "failing", command=[sys.executable, "-c", "import sys; sys.exit('no room')"])
    said = (world / "failing.log").read_text()
    for step in (2, 4, 6):
        assert f"warning: step {step} was not exported: no room ({made}/step-{step}.log)" in said


def test_a_stop_ends_the_export_and_the_same_command_makes_it_good(world: Path, blend: Any) -> None:
    hangs = [sys.executable, "-c", "import os, signal; print(os.getpid(), flush=True); signal.pause()"]
    log, made = world / "stopped.log", world / "runs" / "stopped" / EXPORTS
    job = functools.partial(train, world, blend, "stopped", hangs, stopped_while_exporting=True)
    assert jobs.run(job, log=log) != 0
    assert "not yet exported: step 2. The same command" in log.read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(int((made / "step-2.log").read_text()), 0)
    start(world, blend, "stopped")
    assert sorted(path.name for path in made.iterdir()) == ["step-2", "step-4", "step-6"]


def exporter(folder: Path, ckpt_path: Path | None, max_steps: int = 100) -> exports.ExportCheckpoints:
    """The callback of a run in `folder` that begins, or goes on from a checkpoint."""
    AppState().log_dir = folder
    trainer = SimpleNamespace(
        is_global_zero=True,
        ckpt_path=ckpt_path,
        max_steps=max_steps,
        checkpoint_callback=SimpleNamespace(dirpath=folder / "checkpoints"),
    )
    found = exports.ExportCheckpoints(every=2)
    found.on_fit_start(trainer, None)
    return found


def test_an_export_ends_with_its_killed_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would go on beside the one that the job, started again, makes of the same step."""
    holds = "import fcntl, signal, sys; file = open(sys.argv[1] + '/held', 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
    code = f"{holds}print('holds', flush=True); signal.pause()"
    monkeypatch.setattr(exports, "COMMAND", [sys.executable, "-c", code])
    waiting = tmp_path / EXPORTS / f"{EXPORTED}2"

    def export() -> None:
        found = exporter(tmp_path, None)
        waiting.mkdir()
        found._start_next()
        signal.pause()

    job = multiprocessing.get_context("fork").Process(target=export)
    job.start()
    log = tmp_path / EXPORTS / "step-2.log"
    wait_until(lambda: log.exists() and "holds" in log.read_text())
    job.kill()
    job.join()
    with (waiting / "held").open() as held:
        wait_until(lambda: _locked(held))


def test_an_export_whose_end_a_killed_job_did_not_see_is_not_made_again(tmp_path: Path) -> None:
    made, checkpoint = tmp_path / EXPORTS, tmp_path / "checkpoints" / "steps=4" / "weights"
    for folder in (made / "step-2", made / f"{EXPORTED}2", made / f"{EXPORTED}4", checkpoint):
        folder.mkdir(parents=True)
    (made / "step-2.log").touch()
    found = exporter(tmp_path, checkpoint)
    assert found._steps("step-") == [2]
    assert found._steps(EXPORTED) == [4]
    assert not (made / "step-2.log").exists()


def _locked(file: IO[str]) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def test_exports_behind_which_a_run_goes_back_are_no_longer_its_own(tmp_path: Path, capsys: Any) -> None:
    made = tmp_path / EXPORTS
    for name in ("step-2/old", "step-4/old", "step-6/old", f"{EXPORTED}6"):
        (made / name).mkdir(parents=True)
    checkpoint = tmp_path / "checkpoints" / "steps=2"
    (checkpoint / "weights").mkdir(parents=True)
    exporter(tmp_path, checkpoint / "weights")
    assert "exports of steps that are trained again, 4, 6, are in" in capsys.readouterr().err
    assert sorted(path.name for path in made.glob("step-*")) == ["step-2"]
    exporter(tmp_path, None)  # begun anew
    assert list(made.glob("step-*")) == []
    earlier = sorted((made / exports.EARLIER).iterdir())
    assert [path.name[:6] for path in earlier] == ["step-2", "step-4", "step-6"]
    assert all((path / "old").is_dir() for path in earlier)
    wait_until(lambda: not (made / f"{EXPORTED}6").exists())


def test_a_step_that_is_due_is_owed_until_its_files_are_linked(tmp_path: Path, capsys: Any) -> None:
    """A job that is killed between the last save and the next look at the checkpoints owes the last export."""
    made, checkpoint = tmp_path / EXPORTS, tmp_path / "checkpoints/steps=2"
    found = exporter(tmp_path, None)
    trainer = SimpleNamespace(is_global_zero=True, global_step=2, max_steps=2)
    found.on_train_batch_end(trainer, None)
    (checkpoint / "weights").mkdir(parents=True)
    assert [path.name for path in made.iterdir()] == [f"{DUE}2"]
    again = exporter(tmp_path, checkpoint, max_steps=2)
    again._link_finished()
    assert [path.name for path in made.iterdir()] == [f"{EXPORTED}2"]
    (made / f"{DUE}2").touch()  # killed between the two
    assert exporter(tmp_path, checkpoint, max_steps=2)._awaited == []
    # One that the run goes back behind is noted again when it is reached; one without a checkpoint is told, and over.
    (made / f"{DUE}4").touch()
    assert exporter(tmp_path, checkpoint, max_steps=4)._awaited == []
    lost = exporter(tmp_path, None, max_steps=4)
    lost._await(4)
    lost._link_finished()
    shutil.rmtree(made / f"{EXPORTED}2")
    lost.teardown(trainer, None, "fit")
    assert "because no checkpoint of it was found: step 4" in capsys.readouterr().err
    wait_until(lambda: not list(made.iterdir()))  # a thread removes what is not wanted any more


def test_what_the_export_of_a_killed_job_made_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(exports, "COMMAND", [sys.executable, "-c", "import sys; sys.exit('it exists already')"])
    found = exporter(tmp_path, None)
    for step, trained in ((2, {"step": 2}), (4, {"step": 2})):  # the second one is another training's
        linked, exported = (tmp_path / EXPORTS / name for name in (f"{EXPORTED}{step}", f"step-{step}"))
        for folder in (linked, exported):
            folder.mkdir()
        (linked / RUN_JSON).write_text(json.dumps({"step": step}))
        write_provenance(exported, Provenance(trainings=[trained]))
        found._start_next()
        found._running[1].wait()
        assert found._end_of_running()
        wait_until(lambda folder=linked: not folder.exists())
    said = capsys.readouterr().err
    assert "exported step 2 to" in said
    assert "warning: step 4 was not exported: it exists already" in said


def test_a_folder_that_is_there_is_not_taken_for_what_was_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(exports, "COMMAND", [sys.executable, "-c", "import sys; sys.exit('it exists already')"])
    found = exporter(tmp_path, None)
    for name in ("step-2", f"{EXPORTED}2"):
        (tmp_path / EXPORTS / name).mkdir()
    found._start_next()
    found._running[1].wait()
    assert found._end_of_running()
    assert "warning: step 2 was not exported: it exists already" in capsys.readouterr().err


def test_files_that_cannot_be_linked_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "checkpoints/steps=2/weights").mkdir(parents=True)
    (tmp_path / "checkpoints/steps=2/weights/__0_0.distcp").touch()
    found = exporter(tmp_path, None)
    found._awaited = [2]
    found._go_on()
    assert "warning: step 2 is not exported: its files cannot be linked" in capsys.readouterr().err
    assert list((tmp_path / EXPORTS).iterdir()) == []


def test_steps_that_are_not_saved_are_refused() -> None:
    for wrong, words in (
        ({"export_every": 75}, "export_every 75 is not a multiple of the 50 steps between checkpoints: give 50"),
        ({"export_every": 5, "save_every": 2}, "of the 2 steps between checkpoints: give 4, or save_every=5"),
        ({"export_every": 0}, "whole numbers of 1 or more"),
        ({"export_every": 50, "export_keep": 0}, "whole numbers of 1 or more"),
        ({"export_keep": 2}, "give both, or neither"),
    ):
        for recipe in (smollm2.continual_pretrain, functools.partial(smollm2.instruction_tune, val_check_interval=50)):
            with pytest.raises(CptError, match=words):
                recipe(**wrong)
