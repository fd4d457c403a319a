"""The doctor: what stands between this machine and a job, found before the job, without importing torch or NeMo.

A check is a function that takes an `Examination` and returns a `Finding`, or several; `CHECKS` and `JOB_CHECKS`
are the whole examination, `PREFLIGHT` what `nemo-cpt run` looks at before each launch. A check that is added to one of
these lists takes part.
"""

from nemo_cpt.doctor import access, containers, gpus, host, inputs, mounts, network, slurm, software
from nemo_cpt.doctor.examination import Check, Examination, Finding, examine, worst
from nemo_cpt.doctor.job import Job, Place

PREFLIGHT: tuple[Check, ...] = (
    software.python,
    software.packages,
    software.driver,
    gpus.gpus,
    gpus.gpu_memory,
    host.shared_memory,
    host.attention_variables,
    host.device_connections,
    network.interfaces,
    network.rendezvous,
    inputs.settings,
    inputs.base,
    inputs.run_folder,
    inputs.data,
    inputs.vocabulary,
    inputs.disk,
    access.weights_and_biases,
    access.mlflow,
    containers.docker,
    mounts.mounts,
    slurm.slurm,
    slurm.cores,
)
"""Quick ones: no process is started but sinfo and scontrol."""

FITTING: tuple[Check, ...] = (gpus.fit, slurm.saving_in_time, slurm.memory)
"""Looked at before a launch where nothing else is red: the first time it takes as long as NeMo's import."""

CHECKS: tuple[Check, ...] = (
    software.python,
    software.packages,
    software.combination,
    software.driver,
    software.torch_import,
    software.transformer_engine_import,
    gpus.gpus,
    gpus.gpu_memory,
    host.shared_memory,
    host.locked_memory,
    host.attention_variables,
    host.device_connections,
    network.interfaces,
    network.rendezvous,
    network.ranks,
    inputs.disk,
    access.hugging_face,
    access.weights_and_biases,
    slurm.slurm,
)
"""The whole examination of a machine."""

JOB_CHECKS: tuple[Check, ...] = (
    inputs.settings,
    inputs.base,
    inputs.run_folder,
    inputs.data,
    inputs.vocabulary,
    gpus.fit,
    slurm.cores,
    slurm.saving_in_time,
    slurm.memory,
    access.mlflow,
    containers.docker,
    mounts.mounts,
)
"""What is looked at besides, where a recipe is named."""

__all__ = [
    "CHECKS",
    "FITTING",
    "JOB_CHECKS",
    "PREFLIGHT",
    "Check",
    "Examination",
    "Finding",
    "Job",
    "Place",
    "examine",
    "worst",
]
