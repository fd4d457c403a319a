"""What the machine gives a process: shared memory, locked memory, environment variables."""

import os
import resource

from nemo_cpt.doctor.examination import Examination, Finding, from_error
from nemo_cpt.doctor.versions import SHM_GIB
from nemo_cpt.errors import CptError
from nemo_cpt.training.preconditions import check_environment

SHM = "/dev/shm"
DATA_LOADERS_GIB = 1  # Docker's default of 64 MiB ends data loaders with "Bus error"


def shared_memory(examination: Examination) -> Finding:
    """Whether /dev/shm holds what NCCL and the data loaders put there."""
    if not examination.place.here:
        return Finding(SHM, "skipped", "this machine's is not the job's")
    try:
        status = os.statvfs(SHM)
    except OSError as error:
        return Finding(SHM, "warning", f"cannot be read ({error})", "mount a tmpfs there: data loaders need it")
    # f_bavail: what root keeps back is not for us.
    size, free = (blocks * status.f_frsize / 2**30 for blocks in (status.f_blocks, status.f_bavail))
    found = f"{size:.1f} GiB, {free:.1f} GiB free"
    if free >= (SHM_GIB if _uses_gpus(examination) else DATA_LOADERS_GIB):
        return Finding(SHM, "ok", found)
    cure = f"start the container with --shm-size={SHM_GIB}g (or --ipc=host), or mount -o remount,size={SHM_GIB}g {SHM}"
    return Finding(SHM, "warning", found, cure)


def locked_memory(examination: Examination) -> Finding:
    """Whether processes may pin memory without limit, which InfiniBand and NCCL's buffers want."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:g} MiB"
    if soft == resource.RLIM_INFINITY:
        return Finding("memlock", "ok", found)
    if not examination.place.here or not _uses_gpus(examination):
        return Finding("memlock", "skipped", f"{found}; matters on machines with GPUs")
    cure = "start the container with --ulimit memlock=-1, or raise it in /etc/security/limits.conf"
    return Finding("memlock", "warning", found, cure)


def attention_variables(examination: Examination) -> Finding:
    """Whether NVTE_* variables contradict the attention backend, which Megatron Core refuses while it builds."""
    backend = examination.job.attention_backend if examination.job else "auto"
    given = sorted(name for name in examination.environ if name.startswith("NVTE_"))
    try:
        check_environment(backend, examination.environ)
    except CptError as error:
        return from_error("NVTE_* variables", error)
    return Finding("NVTE_* variables", "ok", ", ".join(given) or "none set")


def device_connections(examination: Examination) -> Finding:
    """Whether tensor parallelism may count on the order in which kernels start.

    Megatron Core (`tensor_parallel/layers.py`) lets the gradient's all-reduce start before the product it overlaps
    with, and counts on one hardware queue for that; GPUs from Blackwell on do not need it.
    """
    name, job = "CUDA_DEVICE_MAX_CONNECTIONS", examination.job
    value = examination.environ.get(name)
    if job is None or not job.gpus_per_node or job.tensor_model_parallel_size == 1:
        return Finding(name, "ok" if value else "skipped", value or "not set; matters with tensor parallelism")
    if value == "1":
        return Finding(name, "ok", "1")
    cure = f"export {name}=1 before the launch: with tensor parallelism communication overlaps only then"
    found = f"{value or 'not set'}, with tensor parallel {job.tensor_model_parallel_size}"
    return Finding(name, "warning", found, cure)


def _uses_gpus(examination: Examination) -> bool:
    return bool(examination.job.gpus_here) if examination.job else examination.has_gpus
