"""What would be run, and where: the dry run's table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_cpt.catalog import Function
from nemo_cpt.conversations import Conversations
from nemo_cpt.corpus import Blend
from nemo_cpt.doctor import Job
from nemo_cpt.errors import CptError
from nemo_cpt.output import span
from nemo_cpt.training.run_folder import newest_whole


def rows(
    job: Job,
    function: Function,
    arguments: Mapping[str, Any],
    fields: Sequence[str],
    options: Sequence[str],
    where: Any,
) -> Iterator[tuple[str, str]]:
    """Names and values, in the order in which people ask for them.

    Args:
        job: what the recipe's source says of it.
        function: the recipe.
        arguments: those given to it.
        fields: `path.to.field=value` on its config.
        options: `key=value` of the executor.
        where: the executor.
    """
    yield "recipe", f"{function.name}: {function.summary}"
    yield from _changed(function, arguments, fields)
    # As the executor has it, which decides, and not the recipe.
    processes = where.nnodes() * where.nproc_per_node()
    nodes = f" on {where.nnodes()} nodes" if where.nnodes() > 1 else ""
    kind = "GPU" if job.gpus_per_node else "CPU process"
    yield "runs on", f"{job.place.executor}: {processes} {kind}{'es' * (kind != 'GPU') if processes > 1 else ''}{nodes}"
    if options:
        yield "executor's options", ", ".join(options)
    yield "base", job.base or "-"
    yield from _data(job)
    if tokens := job.max_steps * job.global_batch_size * job.seq_length:
        batch = f"{job.global_batch_size} x {job.seq_length} tokens"
        yield "steps", f"{job.max_steps:,} of {batch}, {tokens:,} tokens in all"
    yield "run folder", f"{job.directory} ({_begins(job)})"
    yield from _plan(job)


def _changed(function: Function, arguments: Mapping[str, Any], fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    defaults = {name: _default(function, name) for name in arguments if name not in ("base", "data")}
    texts = [
        f"{name}={arguments[name]} (default {default})"
        for name, default in defaults.items()
        if repr(arguments[name]) != default
    ]
    if texts or fields:
        yield "changed", ", ".join([*texts, *fields])


def _default(function: Function, name: str) -> str:
    parameter = function.parameters.get(name)
    return (parameter.default or "none") if parameter else "none"


def _data(job: Job) -> Iterator[tuple[str, str]]:
    if job.data is None:
        return
    yield "trains on", ", ".join(f"{prefix} {how_much}" for prefix, how_much in how_much(job.data))
    yield "validates on", ", ".join(f"{name}: {prefix}" for name, prefix in job.data.validation.items()) or "nothing"
    if job.replay is not None:
        yield "replays", ", ".join(job.replay.train)


def how_much(data: Blend | Conversations) -> Iterator[tuple[str, str]]:
    """What each training set's weight comes to: its share of the tokens, or how often an epoch goes through it."""
    if isinstance(data, Conversations):
        yield from ((prefix, f"{weight:g} x an epoch") for prefix, weight in data.train.items())
        return
    try:
        shares = data.shares().values()
    except CptError:  # weights of its tokens or documents, which are on another machine
        yield from ((prefix, f"{weight:g} x its {data.weighting}") for prefix, weight in data.train.items())
        return
    yield from ((prefix, f"{100 * share:.0f} %") for prefix, share in zip(data.train, shares, strict=True))


def _begins(job: Job) -> str:
    if not job.place.same_files:
        return "on the job's machine"
    newest = newest_whole(job.directory / "checkpoints")
    return f"goes on from step {newest.step}, {newest.path.name}" if newest else "a new run"


def _plan(job: Job) -> Iterator[tuple[str, str]]:
    """The planner's verdict and its hours, of a recipe for GPUs."""
    from nemo_cpt.planning import plan_workload

    if not job.gpus_per_node:
        return
    try:
        plan = plan_workload(job.workload(), job.gpu_memory_gib)
    except CptError as error:
        yield "plan", f"none: {error.message}"
        return
    speed = plan.speed
    yield "memory", plan.verdict
    yield "speed", f"{speed.tokens_per_second:,.0f} tokens/s, {span(speed.hours(plan.tokens) * 3600)} ({speed.error})"
