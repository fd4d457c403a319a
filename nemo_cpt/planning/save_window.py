"""How long a run needs to save when it is told to stop, and how long before its time limit it is told."""

from dataclasses import dataclass

from nemo_cpt.planning.hardware import GPUS
from nemo_cpt.planning.memory import checkpoint_bytes
from nemo_cpt.planning.plans import plan_workload
from nemo_cpt.planning.workload import Workload

WRITE_BYTES_S = 1e9
"""Of a checkpoint, all ranks together. Four H200 wrote 112 GB at 1.4e9 bytes/s; file systems are shared."""
DEFAULT_SECONDS = 600
"""For a run that cannot be planned: an 8B model's checkpoint, and steps of up to three minutes, twice."""


@dataclass(frozen=True)
class Saving:
    """What a run does between the signal and its end.

    Attributes:
        step_seconds: of a step.
        checkpoint_bytes: of a checkpoint with the optimizer's states.
        gpu: the kind of GPU that was reckoned with.
    """

    step_seconds: float
    checkpoint_bytes: int
    gpu: str

    @property
    def seconds(self) -> float:
        """A step and the checkpoint's write."""
        return self.step_seconds + self.checkpoint_bytes / WRITE_BYTES_S

    @property
    def window(self) -> int:
        """Seconds to give it, in whole minutes: twice as many, for a validation or a checkpoint that is under way."""
        return 60 * int(2 * self.seconds / 60 + 1)

    def __str__(self) -> str:
        return (
            f"a step ({self.step_seconds:.0f} s on {self.gpu}) and a checkpoint ({self.checkpoint_bytes / 1e9:.3g} GB "
            f"at {WRITE_BYTES_S / 1e9:g} GB/s) take {self.seconds:.0f} s"
        )


def saving(work: Workload) -> Saving:
    """Return what a workload needs, on the slowest of the planner's GPUs that hold it.

    A window that is too long costs little: a run that has saved ends, and goes on when it has come back.
    """
    # The cluster's cards are not known where a job is made.
    plans = [plan_workload(work, gpu=name) for name in GPUS]
    slowest = max([each for each in plans if each.fits] or plans, key=lambda each: each.speed.step_seconds)
    return Saving(slowest.speed.step_seconds, checkpoint_bytes(work), slowest.gpu.name)


def window_within(limit: int | None, needed: int | None) -> int:
    """Return the window in seconds: what is needed, but half of the limit at most, so that the run trains at all.

    Args:
        limit: the time limit in seconds; None where it is not known, or there is none.
        needed: `Saving.window`; None where the run cannot be planned.
    """
    wanted = needed or DEFAULT_SECONDS
    return wanted if limit is None else min(wanted, limit // 2)
