"""Whether Slurm answers, its partition can run the job, and the job can save before Slurm ends it."""

import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from nemo_cpt.doctor.examination import Examination, Finding
from nemo_cpt.doctor.job import Job
from nemo_cpt.errors import CptError
from nemo_cpt.planning.memory import host_memory
from nemo_cpt.planning.save_window import saving, window_within

COMMANDS = ("sbatch", "squeue", "sinfo", "scontrol")
SECONDS = 15
_GIVES_CORES = re.compile(r"\bDefCpuPerGPU=|\bOverSubscribe=EXCLUSIVE\b")  # of a partition


@dataclass(frozen=True)
class Partition:
    """One line of sinfo: a partition has several where its nodes differ in their generic resources."""

    name: str
    default: bool
    up: bool
    nodes: int
    resources: str


def slurm(examination: Examination) -> Finding:
    """Whether a job submitted from here would find its partition, nodes and GPUs."""
    missing = [command for command in COMMANDS if not shutil.which(command)]
    submits = examination.place.slurm
    # Only where sbatch would run here; a cluster behind ssh is not this machine's to judge.
    if missing and submits:
        cure = "submit on a login node, or from here with executor.tunnel=ssh(host=..., user=..., job_dir=...)"
        return Finding("Slurm", "error", f"not here: {', '.join(missing)}", cure)
    if missing:
        return Finding("Slurm", "skipped", "no Slurm here")
    try:
        partitions = _partitions()
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines() or ["sinfo failed"]
        cure = "ask the cluster's administrators, or try `sinfo` again: the controller does not answer"
        return Finding("Slurm", "error" if submits else "skipped", said[-1], cure if submits else "")
    return _compared(examination, partitions) if submits else Finding("Slurm", "ok", _listed(partitions))


def _submitted_job(examination: Examination) -> Job | None:
    """The job, where it takes GPUs of a Slurm that it is submitted to from here: of others nothing can be asked."""
    job = examination.job
    return job if job and job.place.slurm and job.gpus_per_node and shutil.which("scontrol") else None


def cores(examination: Examination) -> Finding:
    """Whether a rank has more than the one core that Slurm gives to a task for which none are asked."""
    if _submitted_job(examination) is None:
        return Finding("cores", "skipped", "no job for GPUs that is submitted from here")
    if examination.place.asks_for_cores:
        return Finding("cores", "ok", "as the job asks for them")
    try:
        whole_nodes = re.search(r"SelectType += select/linear", _config(examination))
        shares = [line for line in _chosen_lines(examination) if not _GIVES_CORES.search(line)]
    except (OSError, subprocess.SubprocessError):
        return Finding("cores", "skipped", "scontrol does not answer")
    if whole_nodes or not shares:
        return Finding("cores", "ok", "the partition gives a GPU its own, or whole nodes")
    return Finding(
        "cores",
        "warning",
        "Slurm gives each rank one core, as none are asked for, and the partition has no DefCpuPerGPU",
        "give executor.cpus_per_task=8: beside the training, two processes of each rank read data and others write "
        "checkpoints",
    )


def saving_in_time(examination: Examination) -> Finding:
    """Whether Slurm leaves the job the time for a step and a checkpoint, ahead of its limit and when it preempts it.

    The first time, this builds the recipe, in a process that imports NeMo.
    """
    job, place = _submitted_job(examination), examination.place
    if job is None:
        return Finding("saving", "skipped", "no job for GPUs that a Slurm of this machine would end")
    try:
        needed = saving(job.workload())
    except CptError as error:  # what the planner cannot read may run all the same
        return Finding("saving", "warning", f"the recipe cannot be planned: {error}", "compare the window by hand")
    # As given; else what the executor itself will take.
    window = place.preempt_seconds
    if window is None:
        window = window_within(place.limit_seconds, needed.window)
    kill_wait, grace = _grace(examination)
    leaves = [f"{window} s ahead of the limit"]
    leaves += [f"{grace + kill_wait} s when the job is preempted"] if grace is not None else []
    leaves += [f"{kill_wait} s when it is cancelled or requeued"]
    found = f"{needed}; Slurm leaves {', '.join(leaves)}"
    if window < needed.seconds:
        return Finding("saving", "warning", found, f"give executor.preempt_seconds={needed.window}, and time for it")
    # Slurm's own word, which no argument of ours changes: a warning, not an error.
    if grace is not None and grace + kill_wait < needed.seconds:
        cure = "a preemption costs the steps since the last checkpoint: write more of them (val_check_interval=)"
        return Finding("saving", "warning", found, cure)
    return Finding("saving", "ok", found)


def memory(examination: Examination) -> Finding:
    """Whether Slurm's default leaves a job that asks for no memory what its plan takes of a node's.

    The first time, this builds the recipe, in a process that imports NeMo.
    """
    job, place = _submitted_job(examination), examination.place
    if job is None:
        return Finding("memory", "skipped", "no job for GPUs that is submitted from here")
    if place.asks_for_memory:
        return Finding("memory", "ok", "as the job asks for it")
    try:
        # Where memory is not shared out, nothing is held to it.
        shared = re.search(r"SelectTypeParameters += \S*MEMORY", _config(examination), re.IGNORECASE)
        defaults = [_default_memory(line, job, examination) for line in _chosen_lines(examination)] if shared else []
    except (OSError, subprocess.SubprocessError):
        return Finding("memory", "skipped", "scontrol does not answer")
    least = min((each for each in defaults if each is not None), default=None)
    if least is None:
        return Finding("memory", "ok", "Slurm has no default for it, or gives whole nodes")
    try:
        needed = host_memory(job.workload()).total / 2**30
    except CptError as error:  # what the planner cannot read may run all the same
        return Finding("memory", "warning", f"the recipe cannot be planned: {error}", "compare the default by hand")
    found = f"of a node's memory Slurm gives the job {least:.0f} GiB by default, and its plan takes {needed:.0f} GiB"
    if least >= needed:
        return Finding("memory", "ok", found)
    return Finding(
        "memory", "warning", found, f"give executor.mem={math.ceil(needed / 0.9)}G, or 0 for the node's whole"
    )


def _default_memory(partition: str, job: Job, examination: Examination) -> float | None:
    """GiB of each node that a job gets in a partition where it asks for none; None where that is not limited or known.

    Args:
        partition: what scontrol shows of it, in one line.
        job: for GPUs.
        examination: of the job.
    """
    place, gpus = job.place, job.gpus_per_node

    def default(name: str) -> int:
        # The partition's own before the cluster's; UNLIMITED is the word for neither.
        said = re.search(rf"\b{name}=(\d+)", partition) or re.search(rf"\b{name} *= *(\d+)", _config(examination))
        return int(said[1]) if said else 0

    megabytes = default("DefMemPerGPU") * gpus or default("DefMemPerNode")
    if not megabytes and (place.cores_of_task or not place.asks_for_cores) and "=EXCLUSIVE" not in partition:
        cores = (place.cores_of_task or default("DefCpuPerGPU") or 1) * (place.processes or gpus)
        megabytes = default("DefMemPerCPU") * cores  # of a whole node's cores it would be another number
    return megabytes / 1024 or None


def _grace(examination: Examination) -> tuple[int, int | None]:
    """Seconds between SIGTERM and SIGKILL, and the partition's grace period, None where no job is preempted."""
    kill_wait = re.search(r"KillWait += (\d+)", _config(examination))
    chosen = [line for line in _chosen_lines(examination) if not re.search(r" PreemptMode=(OFF|N/A)", line)]
    periods = [int(found[1]) for line in chosen if (found := re.search(r" GraceTime=(\d+)", line))]
    return int(kill_wait[1]) if kill_wait else 30, min(periods, default=None)  # 30 is Slurm's default


def _config(examination: Examination) -> str:
    """What scontrol shows of the cluster."""
    return _said_once(examination, "scontrol", "show", "config")


def _chosen_lines(examination: Examination) -> list[str]:
    """What scontrol shows of the job's partition, of each where several are named."""
    shown = _said_once(examination, "scontrol", "--oneliner", "show", "partition").splitlines()
    return [line for line in shown if _is_chosen(line, examination.place.partition)]


def _said_once(examination: Examination, *command: str) -> str:
    if command not in examination.answers:
        examination.answers[command] = _said(*command)
    return examination.answers[command]


def _is_chosen(line: str, partition: str | None) -> bool:
    if partition is None:
        return " Default=YES" in line
    return any(line.startswith(f"PartitionName={name} ") for name in partition.split(","))


def _compared(examination: Examination, partitions: list[Partition]) -> Finding:
    wanted, job = examination.place.partition, examination.job
    names = wanted.split(",") if wanted else [each.name for each in partitions if each.default][:1]
    chosen = [each for each in partitions if each.name in names]
    if not chosen:
        found = f"there is no partition {wanted}" if wanted else "the cluster has no default partition"
        return Finding("Slurm", "error", f"{found}; it has {_listed(partitions)}", "give executor.partition=")
    label = ",".join(names)
    if not any(each.up for each in chosen):
        return Finding("Slurm", "error", f"partition {label} is down", f"choose another: {_listed(partitions)}")
    # Of several partitions a job runs in one; each has a line for every kind of its nodes.
    nodes = max(sum(each.nodes for each in chosen if each.name == name) for name in names)
    if job and job.nodes > nodes:
        found = f"partition {label} has {nodes} nodes, the job takes {job.nodes}"
        return Finding("Slurm", "error", found, "take fewer nodes (executor.nodes=) or another partition")
    if job and job.gpus_per_node and not any("gpu" in each.resources for each in chosen):
        found = f"partition {label} lists no GPUs (gres {chosen[0].resources})"
        return Finding("Slurm", "warning", found, f"compare with `sinfo -o '%P %G'`; partitions: {_listed(partitions)}")
    return Finding("Slurm", "ok", f"partition {label}: up, {nodes} nodes, gres {chosen[0].resources}")


def _partitions() -> list[Partition]:
    found = []
    for line in _said("sinfo", "--noheader", "--format=%P|%a|%D|%G").splitlines():
        name, availability, nodes, resources = (part.strip() for part in line.split("|"))
        # sinfo marks the default partition by a star.
        found.append(Partition(name.removesuffix("*"), name.endswith("*"), availability == "up", int(nodes), resources))
    return found


def _said(*command: str) -> str:
    # What people set for their terminals would hide partitions.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SINFO_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True, env=environ)
    return done.stdout


def _listed(partitions: list[Partition]) -> str:
    marked = dict.fromkeys(each.name + "*" * each.default for each in partitions)
    return f"partitions {', '.join(marked)}" if marked else "no partitions"
