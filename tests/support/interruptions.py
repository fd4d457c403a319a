"""Training jobs that are told to stop, or killed, at chosen points; and what they leave, compared with an unbroken run.

A job signals itself where it is to be hit, so that a busy machine changes nothing about where.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nemo_run as run
from nemo.utils import AppState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_cpt.recipes import continual, tiny
from nemo_cpt.training import loop_patches
from nemo_cpt.training.metrics import METRICS_FILE, read_metrics
from tests.training import jobs

STEPS, INTERVAL = 8, 3  # the last step is validated besides: 3, 6, 8

HOOKS = ("on_train_batch_start", "on_train_batch_end", "on_validation_batch_end", "on_validation_end", "on_train_start")
_NEMO = "nemo.lightning.pytorch.callbacks.model_checkpoint:ModelCheckpoint"
_MEGATRON = "megatron.core.dist_checkpointing"
WRITE_POINTS = {  # within the saving of a checkpoint, in this order: what is called, and whether before or after it
    "marker": (f"{_NEMO}.set_checkpoint_unfinished_marker", "after"),
    "context": ("nemo_cpt.training.checkpoints:_write_context", "before"),
    "common": (f"{_MEGATRON}.strategies.common:TorchCommonSaveStrategy.save_common", "before"),
    "weights": (f"{_MEGATRON}.strategies.filesystem_async:_write_item", "before"),
    "metadata": ("torch.distributed.checkpoint.filesystem:_FileSystemWriter.finish", "before"),
    "config": (f"{_MEGATRON}.serialization:save_config", "before"),
    "unmarking": (f"{_NEMO}.remove_checkpoint_unfinished_marker", "before"),
    "link": ("lightning.pytorch.callbacks.model_checkpoint:ModelCheckpoint._link_checkpoint", "before"),
    "removal": ("nemo_cpt.training.checkpoints:RunCheckpoint._remove_checkpoint", "before"),
    "deletion": ("shutil:rmtree", "before"),
}


@dataclass(frozen=True)
class Hit:
    """A signal that a job sends itself, or a disk that it fills.

    Attributes:
        where: one of `HOOKS`, or of `WRITE_POINTS` within a save.
        step: the optimizer steps that are done then; within a save, which may be of an earlier step, at least so many.
        signal: its name; "FULL" fills the run's file system instead, which must be a small one, to the last byte.
        everyone: it goes to every process of the job, as Slurm's and a terminal's do; else to the ranks alone.
        ranks: those that are hit; None for all.
        call: of a write point, which call from this step on is hit, of all the processes that write.
    """

    where: str
    step: int
    signal: str = "SIGTERM"
    everyone: bool = True
    ranks: tuple[int, ...] | None = None
    call: int = 1

    def send(self) -> None:
        if self.signal == "FULL":
            return fill(Path(AppState().log_dir))
        number = getattr(signal, self.signal)
        os.killpg(0, number) if self.everyone else os.kill(os.getpid(), number)


def fill(folder: Path) -> None:
    """Leave no room on the file system of `folder`: what is left goes to a file `ballast` beside it."""
    with open(folder.with_name("ballast"), "ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(2**16)):
            pass


class Hits(pl.Callback):
    """Sends a hit once its point is reached."""

    def __init__(self, hit: Hit) -> None:
        self.hit = hit

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.calls = multiprocessing.get_context("fork").Value("i", 0)  # writers are forked, and one of them is hit
        if self.hit.where in HOOKS:
            setattr(self, self.hit.where, lambda trainer, *args: self._reached(trainer))
        else:
            _around(*WRITE_POINTS[self.hit.where], lambda: self._reached(trainer))

    def _reached(self, trainer: pl.Trainer) -> None:
        chosen = self.hit.ranks is None or trainer.global_rank in self.hit.ranks
        here = trainer.global_step == self.hit.step or (
            self.hit.where in WRITE_POINTS and trainer.global_step > self.hit.step
        )
        if chosen and here:
            with self.calls.get_lock():
                self.calls.value += 1
                hits = self.calls.value == self.hit.call
            if hits:
                self.hit.send()


def _around(name: str, when: str, action: Callable[[], None]) -> None:
    """Call `action` before or after each call of `module:path.to.function`."""
    module, _, path = name.partition(":")
    *parents, attribute = path.split(".")
    owner = functools.reduce(getattr, parents, __import__(module, fromlist=["_"]))
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            action()
        result = original(*args, **kwargs)
        if when == "after":
            action()
        return result

    setattr(owner, attribute, staticmethod(call) if isinstance(vars(owner)[attribute], staticmethod) else call)


@dataclass(frozen=True)
class Setting:
    """What a run is like.

    Attributes:
        workers: of each data loader; they persist.
        asynchronous: checkpoints are written by processes of their own while the training goes on.
        processes: data-parallel ranks.
        adapters: LoRA's are trained, not every parameter.
        unpatched: a function of `loop_patches` that leaves what it patches as it is.
    """

    workers: int = 0
    asynchronous: bool = False
    processes: int = 1
    adapters: bool = False
    unpatched: str = ""


class Runs:
    """Runs of one recipe in a folder of their own.

    Args:
        world: folder with `base`.
        blend: what is trained on.
        folder: where the runs go.
        logs: where what they print goes; `folder` when None.
    """

    def __init__(self, world: Path, blend: Any, folder: Path, logs: Path | None = None) -> None:
        self.world, self.blend, self.folder, self.logs = world, blend, folder, logs or folder
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, setting: Setting, hit: Hit | None = None, **changes: Any) -> int:
        """Start a run, and return the first exit code of its processes that is not 0."""
        job = functools.partial(_train, self, name, setting, hit, changes)
        return jobs.run(job, setting.processes, log=self.log(name))

    def broken(self, name: str, setting: Setting, hits: Sequence[Hit], **changes: Any) -> list[int]:
        """Start a run for each hit, and once more without one; return the exit codes."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return [self.start(name, setting, hit, **changes) for hit in (*hits, None)]

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def left(self, name: str) -> dict[str, Any]:
        """What a run left: its checkpoints' names, and its validations and steps with their losses and rates."""
        measured = read_metrics(self.folder / name)
        return {
            "checkpoints": sorted(map(_described, (self.folder / name / "checkpoints").glob("*"))),
            "validations": [(line["step"], line["val_loss_ja"]) for line in measured if "val_loss_ja" in line],
            "steps": [(line["step"], line["reduced_train_loss"], line["lr"]) for line in measured if "lr" in line],
        }

    def lines(self, name: str) -> list[dict[str, float]]:
        """Every line of a run's metrics, also of what was done again."""
        return [json.loads(line) for line in (self.folder / name / METRICS_FILE).read_text().splitlines()]

    def logged(self, name: str) -> list[int]:
        """The steps that a run's last start gave its logger, TensorBoard, with the validations' losses."""
        newest = max((self.folder / "tb_logs" / name).glob("events*"), key=lambda path: path.stat().st_mtime_ns)
        events = EventAccumulator(str(newest))
        events.Reload()
        return [event.step for event in events.Scalars("val_loss")]

    def differences(self, name: str, unbroken: str) -> list[str]:
        """What a run left that is not as the unbroken one's."""
        one, other = self.left(unbroken), self.left(name)
        return [f"{kind}: {one[kind]} != {other[kind]}" for kind in one if one[kind] != other[kind]]


def _described(path: Path) -> str:
    return f"{path.name} -> {path.readlink()}" if path.is_symlink() else path.name


def _train(runs: Runs, name: str, setting: Setting, hit: Hit | None, changes: dict[str, Any]) -> None:
    if setting.unpatched:
        setattr(loop_patches, setting.unpatched, lambda original=None: original)
    settings = {"seq_length": 64, "global_batch_size": 8, "max_steps": STEPS, "val_check_interval": INTERVAL} | changes
    settings |= {"name": name, "directory": str(runs.folder), "processes": setting.processes}
    blend = replace(runs.blend, validation=settings.pop("validation", runs.blend.validation))
    limit = settings.pop("limit_val_batches", 1)
    recipe = tiny.continual_pretrain(str(runs.world / "base"), blend, **settings)
    if setting.adapters:
        recipe = continual.with_lora(recipe, rank=4)
    recipe.trainer.limit_val_batches = limit
    recipe.data.num_workers, recipe.data.persistent_workers = setting.workers, setting.workers > 0
    recipe.trainer.strategy.ckpt_async_save = setting.asynchronous
    recipe.trainer.callbacks.append(run.Config(Hits, hit or Hit("on_train_batch_end", -1)))
    for number in (signal.SIGINT, signal.SIGHUP):  # whatever started the tests
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    run.run(recipe, direct=True)
