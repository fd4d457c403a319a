"""Hugging Face folders of a run's checkpoints, written while it trains."""

import os
import re
import shutil
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
from nemo.utils import AppState

from nemo_cpt.checkpoint.provenance import read_provenance, trainings_of
from nemo_cpt.training.options import check_exports
from nemo_cpt.training.run_folder import DUE, EXPORTED, EXPORTS, checkpoints, resumed_from

EARLIER = "earlier"  # in it: exports of steps that the run went back behind
COMMAND = [sys.executable, "-m", "nemo_cpt.cli", "export"]
# Before a command, each where it is installed. By the last the kernel ends an export whose job was killed: going on,
# the job makes it anew.
GENTLY = (("nice", "-n", "19"), ("ionice", "-c", "3"), ("setpriv", "--pdeathsig", "KILL"))
_REMOVED = ".removed-"


class ExportCheckpoints(pl.Callback):
    """Export the checkpoint of every so many steps, and the last one, to `exports/step-N` in the run's folder.

    A process of its own does it, at the lowest priority and without a GPU, one export after the other, from hard links
    to the checkpoint's files: these stay where the run removes the checkpoint. No step waits for it. An export is
    complete or absent; one that fails is told, and the run goes on. At its end the run waits for those that are under
    way. One that is stopped leaves them to the same command, which makes them when it goes on. A run that goes back
    behind an export, or begins anew, moves it to `exports/earlier`.

    Args:
        every: steps between exports; each must be saved.
        keep: how many exports are kept, the newest; all when None.
    """

    def __init__(self, every: int, keep: Optional[int] = None) -> None:  # noqa: UP045  NeMo-Run cannot parse `| None`
        check_exports(every, keep)
        self.every, self.keep = every, keep
        self._folder = self._checkpoints = Path()
        self._awaited: list[int] = []  # steps whose checkpoints are not yet seen
        self._running: tuple[int, subprocess.Popen[bytes]] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up what a stopped run left: links that wait, and newer checkpoints than were exported."""
        if not trainer.is_global_zero:
            return
        self._folder = Path(AppState().log_dir) / EXPORTS
        self._checkpoints = Path(str(getattr(trainer.checkpoint_callback, "dirpath", None)))
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(f"{_REMOVED}*"):
            _remove(left)
        self._set_aside(trainer)
        linked = [*self._steps("step-"), *self._steps(EXPORTED)]
        # Whole, though the job was killed before it saw that.
        for step in {*self._steps("step-")} & {*self._steps(EXPORTED)}:
            _remove(self._folder / f"{EXPORTED}{step}")
            self._log(step).unlink(missing_ok=True)
        for step in set(self._steps(DUE)) & set(linked):
            self._mark(step).unlink()
        # Of older checkpoints exports were made, and perhaps thinned out, or failed and were told of.
        saved = {each.step for each in checkpoints(self._checkpoints)}
        missed = {step for step in saved if step > max(linked, default=0) and self._due(trainer, step)}
        for step in sorted(missed.union(self._steps(DUE))):
            self._await(step)

    def _set_aside(self, trainer: pl.Trainer) -> None:
        """Move what a training exported that this start goes back behind: of the same steps, and another model."""
        checkpoint = resumed_from(trainer.ckpt_path)
        # -1 of a checkpoint whose step nobody knows: then nothing is taken for later than it.
        reached = checkpoint.step if checkpoint else 0
        for step in self._steps(EXPORTED):
            if step > reached >= 0:
                _remove(self._folder / f"{EXPORTED}{step}")
        for step in self._steps(DUE):
            if step > reached >= 0:
                self._mark(step).unlink()
        left = sorted(step for step in self._steps("step-") if step > reached >= 0)
        for step in left:
            # Moved, not removed: the step that it was made at may never be trained again.
            (self._folder / EARLIER).mkdir(exist_ok=True)
            (self._folder / f"step-{step}").rename(self._folder / EARLIER / f"step-{step}-{uuid.uuid4().hex[:8]}")
        if left:
            _say(f"exports of steps that are trained again, {_listed(left)}, are in {self._folder / EARLIER} now")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Note a step that is to be exported, and go on with those whose checkpoints are written."""
        if not trainer.is_global_zero:
            return
        if self._due(trainer, trainer.global_step):
            self._await(trainer.global_step)
        self._go_on()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wait for the exports that are under way, and say which are missing."""
        if not trainer.is_global_zero or stage != "fit":
            return
        self._go_on()
        while self._running is not None:
            step, process = self._running
            _say(f"waiting for the export of step {step}")
            process.wait()
            self._go_on()
        if self._awaited:
            _say(f"not exported, because no checkpoint of it was found: step {_listed(self._awaited)}")
        for step in list(self._awaited):
            self._await_no_more(step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the export that is under way: the process must be gone with its job."""
        if not trainer.is_global_zero:
            return
        if self._running is not None:
            self._running[1].kill()  # it does not listen to the signals that stop a job
            self._running[1].wait()
        if left := sorted({*self._awaited, *self._steps(EXPORTED)}):
            _say(f"not yet exported: step {_listed(left)}. The same command does it when it goes on")

    def _due(self, trainer: pl.Trainer, step: int) -> bool:
        return step > 0 and (step % self.every == 0 or step == trainer.max_steps)

    def _await(self, step: int) -> None:
        """Have a step exported when its checkpoint is written: by the next start, where this one is killed."""
        if step not in self._awaited:
            self._awaited.append(step)
        try:
            self._mark(step).touch()
        except OSError as error:
            _say(f"warning: exports of this run: {error}")

    def _await_no_more(self, step: int) -> None:
        self._awaited.remove(step)
        self._mark(step).unlink(missing_ok=True)

    def _mark(self, step: int) -> Path:
        return self._folder / f"{DUE}{step}"

    def _go_on(self) -> None:
        try:
            self._link_finished()
            if self._running is None or self._end_of_running():
                self._start_next()
        except OSError as error:
            _say(f"warning: exports of this run: {error}")

    def _link_finished(self) -> None:
        for checkpoint in checkpoints(self._checkpoints) if self._awaited else []:
            if checkpoint.step in self._awaited:
                # Renamed when it is whole: a job that is killed meanwhile leaves no half one.
                partial = self._folder / f"{_REMOVED}{checkpoint.step}"
                try:
                    shutil.copytree(checkpoint.path, partial, copy_function=os.link)
                    partial.rename(self._folder / f"{EXPORTED}{checkpoint.step}")
                except OSError as error:
                    shutil.rmtree(partial, ignore_errors=True)
                    _say(f"warning: step {checkpoint.step} is not exported: its files cannot be linked ({error})")
                self._await_no_more(checkpoint.step)  # last: a kill before leaves it owed

    def _start_next(self) -> None:
        if not (waiting := self._steps(EXPORTED)):
            return
        step = min(waiting)
        gentle = [word for words in GENTLY if shutil.which(words[0]) for word in words]
        command = [*gentle, *COMMAND, str(self._folder / f"{EXPORTED}{step}"), str(self._folder / f"step-{step}")]
        # The GPUs and the CPUs are the training's.
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with self._log(step).open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._running = step, process
        _say(f"exporting step {step}")

    def _end_of_running(self) -> bool:
        """Whether the running export has ended, which then is told and cleared away."""
        assert self._running is not None
        step, process = self._running
        if process.poll() is None:
            return False
        self._running = None
        linked, exported = self._folder / f"{EXPORTED}{step}", self._folder / f"step-{step}"
        # Of a job that was killed the export goes on, and may have been there first.
        made, own = process.returncode == 0, trainings_of(linked)
        made |= bool(own) and list(read_provenance(exported).trainings[-len(own) :]) == own
        _remove(linked)
        if made and exported.is_dir():
            self._log(step).unlink()
            _say(f"exported step {step} to {exported}")
            self._thin()
        else:
            said = self._log(step).read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            _say(f"warning: step {step} was not exported: {said[-1]} ({self._log(step)})")
        return True

    def _thin(self) -> None:
        for step in sorted(self._steps("step-"))[: -self.keep] if self.keep else []:
            _remove(self._folder / f"step-{step}")

    def _steps(self, prefix: str) -> list[int]:
        names = (re.fullmatch(rf"{re.escape(prefix)}(\d+)", path.name) for path in self._folder.glob(f"{prefix}*"))
        return [int(name[1]) for name in names if name]

    def _log(self, step: int) -> Path:
        return self._folder / f"step-{step}.log"


def _remove(folder: Path) -> None:
    """Remove a folder beside the training: gigabytes take a second."""
    removed = folder if folder.name.startswith(_REMOVED) else folder.rename(folder.with_name(_REMOVED + folder.name))
    threading.Thread(target=shutil.rmtree, args=(removed, True)).start()


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))


def _say(text: str) -> None:
    print(f"nemo_cpt: {text}", file=sys.stderr, flush=True)
