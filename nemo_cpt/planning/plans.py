"""A plan: does it fit, how long does it take."""

from dataclasses import dataclass
from typing import Any

from nemo_cpt.arguments import checked
from nemo_cpt.constants import MEMORY_MARGIN
from nemo_cpt.planning import hardware, memory, throughput
from nemo_cpt.planning.hardware import GIB, Gpu
from nemo_cpt.planning.memory import HostMemory, StageMemory
from nemo_cpt.planning.recipe_reader import read
from nemo_cpt.planning.throughput import Speed
from nemo_cpt.planning.workload import Workload


@dataclass(frozen=True)
class Plan:
    """What a workload takes.

    Attributes:
        workload: what was planned.
        gpu: the kind of GPU.
        memory_gib: what a process finds on it, in GiB.
        stages: the peak of each pipeline stage's GPU.
        host: a node's host memory.
        speed: of a step.
    """

    workload: Workload
    gpu: Gpu
    memory_gib: float
    stages: list[StageMemory]
    host: HostMemory
    speed: Speed

    @property
    def worst(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak_gib(self) -> float:
        """The fullest GPU's peak, with CUDA's context, in GiB."""
        return self.worst.total / GIB

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU holds its peak; of a lower bound, whether that fits."""
        # CUDA's context is in the peak: what is compared with is the card's, not what a process can allocate.
        return self.peak_gib <= self.memory_gib

    @property
    def lower_bound(self) -> bool:
        """Whether the recipe holds something that the planner leaves out."""
        return bool(self.workload.unmodelled)

    @property
    def tokens(self) -> int:
        """Those that the recipe trains on; 0 for one without steps, which has no duration of its own."""
        return self.workload.max_steps * self.workload.tokens_per_step

    @property
    def verdict(self) -> str:
        """One line for people and scripts."""
        bound = "at least " if self.lower_bound else ""
        word = "fits" if self.fits else "does not fit"
        room = self.memory_gib - self.peak_gib
        return (
            f"{word}: {bound}{self.peak_gib:.1f} GiB of {self.memory_gib:.1f} GiB "
            f"({abs(room):.1f} GiB {'free' if room >= 0 else 'too much'})"
        )

    def as_dict(self, tokens: float | None = None) -> dict[str, Any]:
        """Return the plan as plain data for JSON: bytes, seconds, and hours for `tokens` if given."""
        tokens = self.tokens if tokens is None else tokens
        return {
            "fits": self.fits,
            "verdict": self.verdict,
            "gpu": self.gpu.name,
            "memory_gib": self.memory_gib,
            "peak_gib": round(self.peak_gib, 3),
            # Of rank 0, whose allocator a run's `gpu_memory_gib` is of: another stage may be fuller.
            "reserved_gib": round(self.stages[0].reserved / GIB, 3),
            "lower_bound": self.lower_bound,
            "left_out": list(self.workload.unmodelled),
            "stages": [
                {"stage": each.stage, "moment": each.moment, "total_bytes": each.total, "bytes": each.parts}
                for each in self.stages
            ],
            "host_bytes": self.host.parts,
            "step_seconds": self.speed.seconds,
            "tokens_per_second": round(self.speed.tokens_per_second, 1),
            "tokens_per_second_per_gpu": round(self.speed.tokens_per_second / self.speed.gpus, 1),
            "model_tflops_per_gpu": round(self.speed.model_tflops, 1),
            "speed_error": self.speed.error,
            "tokens": tokens,
            "hours": round(self.speed.hours(tokens), 3),
        }


@checked
def plan(recipe: Any, gpu_memory_gib: float | None = None, gpu: str | None = None) -> Plan:
    """Plan a recipe as it is.

    Args:
        recipe: the run.Partial that a recipe function returned, edited or not.
        gpu_memory_gib: the card's memory as sold (48, 80), in GiB; the kind's own when None.
        gpu: the kind of GPU, a key of `GPUS`; an H200, on which the planner was measured, when None.

    Returns:
        The plan. What the planner does not model stands in `plan.workload.unmodelled`: the peak is a lower bound then.

    Raises:
        CptError: it is no recipe of a Llama-shaped model, its sizes do not go together, or the GPU is unknown.
    """
    return plan_workload(read(recipe), gpu_memory_gib, gpu)


@checked
def plan_workload(work: Workload, gpu_memory_gib: float | None = None, gpu: str | None = None) -> Plan:
    """Plan a workload; see `plan`."""
    kind = hardware.gpu(gpu)
    usable = kind.memory_gib if gpu_memory_gib is None else hardware.usable_gib(gpu_memory_gib)
    room = usable * (1 - MEMORY_MARGIN) * GIB  # as a job leaves it that copies its weights (`patches._free_gpu_bytes`)
    return Plan(work, kind, usable, memory.stages(work, room), memory.host_memory(work), throughput.speed(work, kind))
