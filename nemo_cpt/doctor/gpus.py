"""The GPUs that a job takes: how many, how large, how free, and by the planner whether it fits into their memory."""

from collections.abc import Sequence

from nemo_cpt.doctor.examination import Examination, Finding, State
from nemo_cpt.doctor.job import Job
from nemo_cpt.doctor.nvidia import Gpu, GpuProcess
from nemo_cpt.planning import Plan, plan_workload
from nemo_cpt.planning.search import nearest_that_fits

USED_MIB = 1024  # a display or a monitor takes less
FP8_SINCE = (8, 9)  # compute capability: Ada
AS_SOLD = 0.9  # a card of 48 GB shows 44.99 GiB with ECC on


def gpus(examination: Examination) -> Finding:
    """Whether this machine shows a process as many GPUs as the job takes, each as large as its settings want."""
    if not examination.place.here:
        return Finding("GPUs", "skipped", "this machine's are not the job's")
    job, seen = examination.job, examination.visible_gpus
    wanted = job.gpus_here if job else 0
    if not examination.has_gpus:
        found = "none" if wanted == 0 else f"none, and {job.recipe if job else ''} takes {wanted}"
        return Finding("GPUs", "error" if wanted else "skipped", found, _elsewhere(0) if wanted else "")
    found = _described(seen) if seen else f"none of {len(examination.nvidia.gpus)} is visible"
    # At least one is expected where the machine has any.
    if len(seen) < max(wanted, 1):
        visible = examination.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = visible is not None and len(examination.nvidia.gpus) >= wanted
        cure = f"CUDA_VISIBLE_DEVICES={visible!r} hides them: unset it" if hidden else _elsewhere(len(seen))
        state: State = "error" if wanted else "skipped"
        return Finding("GPUs", state, f"{found}; the job takes {wanted}" if wanted else found, cure if wanted else "")
    sold = job.gpu_memory_gib if job else None
    small = [gpu for gpu in seen[:wanted] if sold and _gib(gpu.total_mib) < sold * AS_SOLD]
    if small:
        cure = f"give the recipe gpu_memory_gib={_gib(small[0].total_mib):.0f}, or a larger card"
        return Finding("GPUs", "error", f"{found}; the recipe is set for {sold:g} GiB", cure)
    if any(gpu.mig for gpu in seen):
        return Finding("GPUs", "warning", f"{found}; in MIG mode", "a process sees one slice; NCCL joins no slices")
    return Finding("GPUs", "ok", found)


def gpu_memory(examination: Examination) -> Finding:
    """Whether the GPUs that a job would take are free, and who is on those that are not."""
    job = examination.job
    chosen = examination.visible_gpus[: job.gpus_here if job else None]
    if not chosen:
        return Finding("GPU memory", "skipped", "no GPU is looked at")
    # By the card's memory, not by the processes, which containers hide.
    busy = [gpu for gpu in chosen if (gpu.used_mib or 0) > USED_MIB]
    if not busy:
        free = min((gpu.free_mib for gpu in chosen if gpu.free_mib is not None), default=None)
        known = f"{_gib(free):.1f} GiB free" if free is not None else "the driver does not tell"
        return Finding("GPU memory", "ok", known + (" on each" if len(chosen) > 1 else ""))
    found = "; ".join(_busy(gpu, examination.nvidia.processes) for gpu in busy)
    cure = "end those processes, or choose other GPUs with CUDA_VISIBLE_DEVICES"
    # Half a card gone: none of the recipes' settings, which fill it, can fit.
    hopeless = [gpu for gpu in busy if job and (gpu.used_mib or 0) > (gpu.total_mib or 0) / 2]
    return Finding("GPU memory", "error" if hopeless else "warning", found, cure)


def fit(examination: Examination) -> Finding:
    """Whether the planner finds that the job fits; the nearest setting that would, where it does not.

    The card is the one that is here, else the one that the recipe is made for. The first time, this builds the recipe,
    in a process that imports NeMo.
    """
    job = examination.job
    if job is None or not job.gpus_per_node:
        return Finding("fit", "skipped", "the job takes no GPU")
    room = _room_gib(examination, job)
    if room is None:
        return Finding("fit", "skipped", "the card is not known here: nemo-cpt plan RECIPE --gpu-memory 80")
    planned = plan_workload(job.workload(), room)
    old = [gpu for gpu in examination.visible_gpus[: job.gpus_here] if gpu.capability and gpu.capability < FP8_SINCE]
    # Ahead of the memory: a smaller batch would not help.
    if planned.workload.fp8 and old:
        return Finding("fit", "error", f"the {old[0].name} has no fp8 products", "train with precision=bf16")
    if planned.fits:
        return Finding("fit", "ok", planned.verdict)
    return Finding("fit", "error", planned.verdict, _what_would_fit(planned, room))


def _busy(gpu: Gpu, processes: Sequence[GpuProcess]) -> str:
    own = sorted((each for each in processes if each.gpu_uuid == gpu.uuid), key=lambda each: -(each.used_mib or 0))
    who = ", ".join(_who(process) for process in own[:3]) or "no process is shown (another container's, or another's)"
    more = f", and {len(own) - 3} more" if len(own) > 3 else ""
    return f"GPU {gpu.index}: {_gib(gpu.used_mib):.1f} of {_gib(gpu.total_mib):.1f} GiB in use by {who}{more}"


def _who(process: GpuProcess) -> str:
    memory = f" {_gib(process.used_mib):.1f} GiB" if process.used_mib is not None else ""
    return f"{process.name.split('/')[-1] or 'process'} (pid {process.pid}{memory})"


def _described(gpus: Sequence[Gpu]) -> str:
    kinds: dict[str, int] = {}
    for gpu in gpus:
        memory = f" {_gib(gpu.total_mib):.1f} GiB" if gpu.total_mib is not None else ""
        kinds[gpu.name + memory] = kinds.get(gpu.name + memory, 0) + 1
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _gib(mib: int | None) -> float:
    return float("inf") if mib is None else mib / 1024


def _elsewhere(there: int) -> str:
    fewer = f"take fewer (gpus_per_node={there}), " if there else ""
    return f"{fewer}run it elsewhere, by another executor, or try tiny.continual_pretrain on the CPU"


def _room_gib(examination: Examination, job: Job) -> float | None:
    """The total of the smallest GPU that the job takes: of those here, else of the one that the recipe is made for."""
    sizes = [gpu.total_mib for gpu in examination.visible_gpus[: job.gpus_here] if gpu.total_mib]
    return min(sizes) / 1024 if sizes else job.gpu_memory_gib


def _what_would_fit(planned: Plan, room: float) -> str:
    found = nearest_that_fits(planned.workload, room, None)
    if found is None:
        return "a larger card, more of them, LoRA, or a smaller model"
    return "; ".join(f"{each.knob} {each.before} -> {each.after}" for each in found.changes)
