"""The fastest setting that fits: searched over what a recipe may change without training something else."""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from nemo_cpt.arguments import checked
from nemo_cpt.constants import ADAM_STATES, MEMORY_MARGIN
from nemo_cpt.errors import CptError
from nemo_cpt.planning import hardware, memory, throughput
from nemo_cpt.planning.hardware import GIB, Gpu
from nemo_cpt.planning.plans import Plan, plan_workload
from nemo_cpt.planning.recipe_reader import read
from nemo_cpt.planning.recipe_writer import apply
from nemo_cpt.planning.workload import Workload

ALLOWED = ("recompute", "micro_batch", "loss", "host_states", "layout")
FALLBACKS = ("gradients", "rank", "seq_length")
MICRO_BATCHES = (1, 2, 4, 8)
SHORTEST, LOWEST_RANK = 1024, 8
UNDECIDED = 0.03  # of two layouts: less than the speed model errs on several GPUs (docs/planning.md)
HOST_STATES = 0.2  # gained by Adam's states on the host where the card would hold them: for less, they stay on it
LARGER_BATCH = 0.05  # gained by recomputing for a larger micro batch: what was planned as 4 % was measured as 1 %


@dataclass(frozen=True)
class Change:
    """One knob that was turned, and what that bought on top of those before it.

    Attributes:
        knob: its name in the recipe.
        before: its value there.
        after: its value now.
        memory_gib: GiB less on the fullest GPU; negative for more.
        tokens_per_second: gained; negative for lost.
    """

    knob: str
    before: Any
    after: Any
    memory_gib: float
    tokens_per_second: float

    def __str__(self) -> str:
        return (
            f"{self.knob} {self.before} -> {self.after}: {-self.memory_gib:+.1f} GiB, "
            f"{self.tokens_per_second:+,.0f} tokens/s"
        )


@dataclass(frozen=True)
class Fit:
    """The fastest setting that fits.

    Attributes:
        recipe: the given recipe, changed; None if a workload was given.
        plan: of the setting.
        changes: what was changed, in the order in which it was applied.
    """

    recipe: Any
    plan: Plan
    changes: list[Change]


@checked
def fit(
    recipe: Any,
    gpu_memory_gib: float | None = None,
    gpu: str | None = None,
    *,
    margin: float = MEMORY_MARGIN,
    allow: Collection[str] = ALLOWED,
) -> Fit:
    """Change a recipe so that it fits and runs as fast as it can.

    Args:
        recipe: the run.Partial of a recipe function; it is changed in place.
        gpu_memory_gib: the card's memory as sold, in GiB; the kind's own when None.
        gpu: the kind of GPU, a key of `GPUS`; an H200 when None.
        margin: share of the memory that stays free.
        allow: what may be changed: "recompute", "micro_batch" (at the same global batch), "loss" (Transformer Engine's,
            in place), "layout" (tensor and pipeline parallelism), and, where nothing fits otherwise or it is a fifth
            faster, "host_states" (Adam's states in pinned host memory). None of these changes what is learned. Where
            still nothing fits, in this order, and not unless named: "gradients" (Megatron's buffer in bf16), "rank" and
            "seq_length" (halved until it fits).

    Returns:
        The recipe, its plan and the changes, with what each bought.

    Raises:
        CptError: nothing fits; the message names the smallest memory that would do.
    """
    before = read(recipe)
    found = fit_workload(before, gpu_memory_gib, gpu, margin=margin, allow=allow)
    apply(recipe, before, found.plan.workload)
    return Fit(recipe, found.plan, found.changes)


@checked
def fit_workload(
    work: Workload,
    gpu_memory_gib: float | None = None,
    gpu: str | None = None,
    *,
    margin: float = MEMORY_MARGIN,
    allow: Collection[str] = ALLOWED,
) -> Fit:
    """Find the fastest setting of a workload that fits.

    Args:
        work: what is to be trained.
        gpu_memory_gib: see `fit`.
        gpu: see `fit`.
        margin: see `fit`.
        allow: see `fit`.

    Raises:
        CptError: nothing fits, `allow` names what there is not, or the GPU is unknown.
    """
    unknown = set(allow) - {*ALLOWED, *FALLBACKS}
    if unknown:
        raise CptError(f"allow names {sorted(unknown)}: {', '.join([*ALLOWED, *FALLBACKS])} can be allowed")
    kind = hardware.gpu(gpu)
    usable = kind.memory_gib if gpu_memory_gib is None else hardware.usable_gib(gpu_memory_gib)
    # The margin is for what the planner cannot know: other processes on the card, and its own error.
    budget = usable * (1 - margin) * GIB
    for tier in _tiers(work, allow):
        # A tier is searched whole before the next one gives up more.
        settings = (_fastest(tier.replace(**states), allow, kind, budget) for states in _states(tier, allow))
        if fitting := [each for each in settings if each]:
            best = max(fitting, key=lambda each: _worth(each, work, kind))
            return Fit(None, plan_workload(best, gpu_memory_gib, gpu), changes(work, best, kind, budget))
    raise CptError(_nothing_fits(work, allow, usable, margin))


def _worth(work: Workload, before: Workload, gpu: Gpu) -> float:
    """Its speed, less what states that go to the host have to gain: how fast they are stepped there differs by machine.

    They take no more of the host's memory: a checkpoint of states on the card is written from a copy there.
    """
    moved = work.host_states != before.host_states
    return _tokens_per_second(work, gpu) / (1 + HOST_STATES * moved)


def _fastest(work: Workload, allow: Collection[str], gpu: Gpu, budget: float) -> Workload | None:
    """The fastest setting of what costs nothing to give up; None where none fits.

    Of layouts whose speeds the model cannot tell apart, that with fewest stages, then least cut layers. The table of
    four H200 in docs/planning.md has what that choice was measured to be worth. Within the layout, one that recomputes
    nothing is taken where recomputation would only make room for a larger micro batch.
    """
    fitting = [each for each in _candidates(work, allow, budget) if _peak(each, budget) <= budget]
    if not fitting:
        return None
    speeds = {each: _tokens_per_second(each, gpu) for each in fitting}
    as_fast = [each for each, speed in speeds.items() if speed >= (1 - UNDECIDED) * max(speeds.values())]
    simplest = min(_layout(each) for each in as_fast)
    settings = [each for each in fitting if _layout(each) == simplest]
    fastest = max(speeds[each] for each in settings)
    plain = [each for each in settings if not _recomputes(each) and speeds[each] >= (1 - LARGER_BATCH) * fastest]
    # Of equally fast ones, the one that leaves most memory.
    return max(plain or settings, key=lambda each: (speeds[each], -_peak(each, budget)))


def _recomputes(work: Workload) -> bool:
    return work.recompute != "none" or work.recompute_outputs


def _layout(work: Workload) -> tuple[int, int]:
    return work.pipeline_model_parallel_size, work.tensor_model_parallel_size


def nearest_that_fits(work: Workload, gpu_memory_gib: float | None, gpu: str | None) -> Fit | None:
    """Find the fastest setting that fits and trains the same; else one with more given up; None if there is none.

    Args:
        work: what is to be trained.
        gpu_memory_gib: see `fit`.
        gpu: see `fit`.
    """
    # First what trains the same; what gives something up is offered only where that does not fit.
    for allowed in (ALLOWED, (*ALLOWED, *FALLBACKS)):
        try:
            return fit_workload(work, gpu_memory_gib, gpu, allow=allowed)
        except CptError:
            continue
    return None


def changes(before: Workload, after: Workload, gpu: Gpu, room: float) -> list[Change]:
    """Return the steps from one workload to another, a knob at a time, with what each bought."""
    steps, current = [], before
    # Twice: what is refused until another knob is turned is turned after it.
    for knob, fields in (*_KNOBS.items(), *_KNOBS.items()):
        values = {name: getattr(after, name) for name in (*fields, *_TOGETHER.get(knob, ()))}
        # `fields` alone decide whether it was turned: what comes along may have come with a knob before.
        if all(getattr(current, name) == values[name] for name in fields):
            continue
        try:
            changed = current.replace(**values)
        except CptError:  # a layout that the micro batch does not go with
            continue
        memory_gib = (_peak(current, room) - _peak(changed, room)) / GIB
        gained = _tokens_per_second(changed, gpu) - _tokens_per_second(current, gpu)
        steps.append(Change(knob, _shown(current, knob), _shown(changed, knob), memory_gib, gained))
        current = changed
    return steps


# What a reader knows as one setting, and the workload's fields that hold it. Changes are told in this order:
# what is given up first, then what lays the model out anew, last what fills the memory that is left.
_KNOBS = {
    "seq_length": ("seq_length",),
    "rank": ("lora_rank",),
    "loss": ("loss",),
    "host_states": ("host_states",),
    "gradients": ("grad_bytes",),
    "layout": ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    "micro_batch_size": ("micro_batch_size",),
    "recompute_outputs": ("recompute_outputs",),
    "recompute": ("recompute", "recompute_num_layers"),
}
# Fields that a knob drags along, because the workload is refused, or means something else, without them.
_TOGETHER = {
    "host_states": ("precision_aware", "master_bytes", "distributed_optimizer"),
    "layout": ("sequence_parallel",),
}


def _shown(work: Workload, knob: str) -> Any:
    if knob == "recompute":
        return f"{work.recompute} {work.recompute_num_layers}" if work.recompute == "block" else work.recompute
    if knob == "layout":
        return f"tensor {work.tensor_model_parallel_size} x pipeline {work.pipeline_model_parallel_size}"
    if knob == "gradients":
        return {4: "fp32", 2: "bf16"}[work.grad_bytes]
    value = getattr(work, _KNOBS[knob][0])
    return (", ".join(value) or "none") if isinstance(value, tuple) else value


def _tiers(work: Workload, allow: Collection[str]) -> Iterator[Workload]:
    """The workload as it is, then with more and more of what was allowed to be given up."""
    gradients = [work.grad_bytes, 2] if "gradients" in allow and work.grad_bytes > 2 else [work.grad_bytes]
    ranks = [work.lora_rank]
    if "rank" in allow and work.lora_rank:
        ranks += _halved(work.lora_rank, LOWEST_RANK)
    lengths = [work.seq_length] + (_halved(work.seq_length, SHORTEST) if "seq_length" in allow else [])
    # A product's last factor changes first: the gradients lose bits before the rank is halved, and the sequence is cut
    # last. So the first tier with anything that fits gives up the least.
    for length, rank, grad_bytes in itertools.product(lengths, ranks, gradients):
        yield work.replace(seq_length=length, lora_rank=rank, grad_bytes=grad_bytes)


def _halved(value: int, least: int) -> list[int]:
    halves = []
    while (value := value // 2) >= least:
        halves.append(value)
    return halves


def _candidates(work: Workload, allow: Collection[str], budget: float) -> Iterator[Workload]:
    """Every setting of the other knobs; of recomputation only the least that fits."""
    # Always better where it is allowed: less memory, and no slower.
    if "loss" in allow:
        work = work.replace(loss="te")
    sizes = MICRO_BATCHES if "micro_batch" in allow else (work.micro_batch_size,)
    for layout, size in itertools.product(_layouts(work, allow), sizes):
        try:
            each = work.replace(**layout, micro_batch_size=size)
        except CptError:  # sizes that do not divide each other
            continue
        if "recompute" not in allow:
            yield each
            continue
        # Recomputing costs time and saves memory, layer by layer: more than the least that fits is never faster.
        yield _least_recompute(each.replace(recompute_outputs=False), budget)
        if not each.fp8:  # where it saves nothing
            yield _least_recompute(each.replace(recompute_outputs=True), budget)


def _states(work: Workload, allow: Collection[str]) -> list[dict[str, Any]]:
    """Where Adam's states may be: as they are, else on the host, whose memory the planner is not told."""
    as_they_are: dict[str, Any] = {}
    if "host_states" not in allow or work.lora_rank is not None or work.host_states or work.weight_bytes != 2:
        return [as_they_are]
    return [
        as_they_are,
        {"host_states": ADAM_STATES, "precision_aware": True, "master_bytes": 2, "distributed_optimizer": True},
    ]


def _layouts(work: Workload, allow: Collection[str]) -> list[dict[str, Any]]:
    if "layout" not in allow or work.gpus == 1:
        return [{}]
    # Tensor parallelism within a node, over its fast links, and no key-value head cut in two.
    tensor = [size for size in (1, 2, 4, 8) if size <= work.gpus_per_node and work.num_query_groups % size == 0]
    pipeline = [size for size in (1, 2, 4, 8, 16) if size <= work.gpus and work.num_layers % size == 0]
    return [
        {"tensor_model_parallel_size": t, "pipeline_model_parallel_size": p, "sequence_parallel": t > 1}
        for t, p in itertools.product(tensor, pipeline)
        if t * p * work.context_parallel_size <= work.gpus
    ]


def _least_recompute(work: Workload, budget: float) -> Workload:
    """The fewest recomputed layers that fit, by bisection: memory falls with each; all of them where none fits."""
    plain = work.replace(recompute="none", recompute_num_layers=0)
    # Without recomputation first: block's 0 layers would still keep the embedding's output for the adapters.
    if _peak(plain, budget) <= budget:
        return plain
    # `low` layers are too few (0 was tried above); `high` are enough, or all there are.
    low, high = 0, work.stage_layers
    while high - low > 1:
        middle = (low + high) // 2
        if _peak(work.replace(recompute="block", recompute_num_layers=middle), budget) <= budget:
            high = middle
        else:
            low = middle
    return work.replace(recompute="block", recompute_num_layers=high)


def _peak(work: Workload, room: float) -> int:
    return max(stage.total for stage in memory.stages(work, room))


def _tokens_per_second(work: Workload, gpu: Gpu) -> float:
    return throughput.speed(work, gpu).tokens_per_second


def _nothing_fits(work: Workload, allow: Collection[str], usable: float, margin: float) -> str:
    tiers = (tier.replace(**states) for tier in _tiers(work, allow) for states in _states(tier, allow))
    settings = (each for tier in tiers for each in _candidates(tier, allow, 0))  # a budget of 0: the least
    least = min(_peak(each, 0) for each in settings) / GIB / (1 - margin)
    left = [name for name in (*ALLOWED, *FALLBACKS) if name not in allow]
    kind = "LoRA" if work.lora_rank else "training every parameter"
    advice = f"; allow more to be changed ({', '.join(left)})" if left else ""
    more = "" if work.lora_rank else ", or LoRA"
    return (
        f"nothing fits in {usable:.1f} GiB: {kind} takes at least {least:.1f} GiB a GPU with {margin:.0%} to spare. "
        f"Take a GPU of that size, or more GPUs{more}{advice}"
    )
