"""Whether Slurm's commands are here, its controller answers, and the partition is one that can run the job."""

import shutil
import subprocess
from dataclasses import dataclass

from nemo_cpt.doctor.examination import Examination
from nemo_cpt.doctor.finding import Finding

COMMANDS = ("sbatch", "squeue", "sinfo")
SECONDS = 15


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
    nodes = sum(each.nodes for each in chosen)
    if job and job.nodes > nodes:
        found = f"partition {label} has {nodes} nodes, the job takes {job.nodes}"
        return Finding("Slurm", "error", found, "take fewer nodes (executor.nodes=) or another partition")
    if job and job.gpus_per_node and not any("gpu" in each.resources for each in chosen):
        found = f"partition {label} lists no GPUs (gres {chosen[0].resources})"
        return Finding("Slurm", "warning", found, f"compare with `sinfo -o '%P %G'`; partitions: {_listed(partitions)}")
    return Finding("Slurm", "ok", f"partition {label}: up, {nodes} nodes, gres {chosen[0].resources}")


def _partitions() -> list[Partition]:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%P|%a|%D|%G"], capture_output=True, text=True, timeout=SECONDS, check=True
    )
    found = []
    for line in done.stdout.splitlines():
        name, availability, nodes, resources = (part.strip() for part in line.split("|"))
        found.append(Partition(name.removesuffix("*"), name.endswith("*"), availability == "up", int(nodes), resources))
    return found


def _listed(partitions: list[Partition]) -> str:
    marked = dict.fromkeys(each.name + "*" * each.default for each in partitions)
    return f"partitions {', '.join(marked)}" if marked else "no partitions"
