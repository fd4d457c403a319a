"""A job that is told to stop saves a checkpoint first, and says that it did."""

import os
import signal
import threading
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.pytorch.callbacks import PreemptionCallback

from nemo_cpt import signals
from nemo_cpt.errors import StoppedEarlyError
from nemo_cpt.signals import STOP_SIGNALS, shield_children
from nemo_cpt.training.checkpoints import save_now


class SaveWhenStopped(PreemptionCallback):
    """Save a checkpoint when any process of the job gets SIGTERM, SIGINT, SIGUSR1 or SIGHUP, and end the job.

    It acts before the next step begins, or within a validation, which the resumed run then does from its start. NeMo's
    PreemptionCallback listens to one signal on rank 0, from the first step on and not in validations, and ends the
    process within the hooks of a step, with exit code 0 whether or not a checkpoint is on disk. A second SIGINT ends
    the job at once. A SIGHUP that `nohup` has the job ignore stays ignored.

    Raises:
        StoppedEarlyError: The job was told to stop, and its last step is on disk: the same command goes on from there.
        CptError: The job was told to stop, and no checkpoint of its last step is there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._handlers_before: dict[int, Any] = {}
        self._first_step = 0
        self._signal: int | None = None
        self._given = signals.Given()
        self._speaks = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Shield what the job will start, and take the last turn in each hook: other callbacks shall end the step."""
        shield_children()
        # Lightning goes through this list in every hook: the last one sees metrics, counters and savers done.
        trainer.callbacks = [*(each for each in trainer.callbacks if each is not self), self]

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen from here on: only now has Lightning installed its own handlers, which these replace."""
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen also in a resumed run, which has no sanity check."""
        self._listen(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Stop between two steps."""
        self._stop_if_told(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Not here, where NeMo's stops: loggers, Lightning's counters and other callbacks have yet to end the step."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop ahead of a validation, which the resumed run does first."""
        self._stop_if_told(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Stop in the middle of a validation."""
        self._stop_if_told(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen no longer: what follows the training is not ours to guard."""
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Listen no longer."""
        self._restore_handlers()

    def _listen(self, trainer: pl.Trainer) -> None:
        # A stop before any step of this start has nothing new to save.
        self._first_step, self._speaks = trainer.global_step, trainer.is_global_zero
        if trainer.received_sigterm:  # by Lightning's handler, which would end the run unsaved behind the first step
            self._signal = signal.SIGTERM
        # Python installs handlers in the main thread only; a second call would take our own for those of before.
        if self._handlers_before or threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers_before[number] = signal.signal(number, self._note)
        signals.training_began = True

    def _note(self, number: int, frame: Any) -> None:
        if self._given.add(number) > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is None and self._speaks:
            more = ", once more to end at once" if number == signal.SIGINT else ""
            # os.write, not print: a handler may interrupt a print, whose buffer does not allow a second one.
            os.write(1, f"nemo_cpt: {signal.Signals(number).name}: saving at the end of the step{more}\n".encode())
        self._signal = number

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before = {}

    def _stop_if_told(self, trainer: pl.Trainer) -> None:
        # Every rank asks at the same place: a rank that stopped alone would leave the others in their next collective.
        number = _largest_of_all_ranks(self._signal or 0)
        if not number:
            return
        step, told = trainer.global_step, f"told to stop by {signal.Signals(number).name}"
        if trainer.sanity_checking or step == self._first_step:
            again = f"goes on from step {step}" if step else "starts again"
            raise StoppedEarlyError(f"{told} before a step was done: the same command {again}", trained=False)
        # Before the exception: whoever catches it may end the process.
        save_now(trainer)
        raise StoppedEarlyError(f"{told}, saved at step {step}: the same command goes on from there")


def _largest_of_all_ranks(number: int) -> int:
    """The same answer on every rank, whichever of them got the signal."""
    largest = torch.tensor(number, device=torch.cuda.current_device(), dtype=torch.int32)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest.item())
