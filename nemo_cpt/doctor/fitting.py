"""Whether a job fits into the memory of the GPUs that it takes, by the planner."""

from nemo_cpt.doctor.examination import Examination
from nemo_cpt.doctor.finding import Finding
from nemo_cpt.doctor.job import Job
from nemo_cpt.planning import Plan, plan_workload
from nemo_cpt.planning.search import nearest_that_fits


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
    if planned.fits:
        return Finding("fit", "ok", planned.verdict)
    return Finding("fit", "error", planned.verdict, _cure(planned, room))


def _room_gib(examination: Examination, job: Job) -> float | None:
    """The total of the smallest GPU that the job takes: of those here, else of the one that the recipe is made for."""
    sizes = [gpu.total_mib for gpu in examination.visible_gpus[: job.gpus_here] if gpu.total_mib]
    return min(sizes) / 1024 if sizes else job.gpu_memory_gib


def _cure(planned: Plan, room: float) -> str:
    found = nearest_that_fits(planned.workload, room, None)
    if found is None:
        return "a larger card, more of them, LoRA, or a smaller model"
    return "; ".join(f"{each.knob} {each.before} -> {each.after}" for each in found.changes)
