"""A container of Docker's on this machine."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nemo_cpt.arguments import checked
from nemo_cpt.constants import CODE_IN_CONTAINER
from nemo_cpt.errors import CptError
from nemo_cpt.executors.counts import check_form, check_not_negative
from nemo_cpt.executors.environment import checked_secrets, existing_mounts, job_env, keep_secrets

if TYPE_CHECKING:
    import nemo_run as run

IMAGE = "localhost/nemo-cpt"
"""What the Dockerfile builds; with a host in its name, so that one that is not there is asked of no public registry."""
SECRETS_IN_CONTAINER = "/run/secrets/nemo_cpt.env"


@checked
def docker(
    image: str = IMAGE,
    gpus: int = -1,
    mounts: Sequence[str] | None = None,
    shm_size: str = "16g",
    ulimits: Sequence[str] = ("memlock=-1", "stack=67108864"),
    *,
    processes: int | None = None,
    network: str = "host",
    user: str | None = None,
    ipc_mode: str | None = None,
    env: Mapping[str, str | float] | None = None,
    secrets: Sequence[str] | None = None,
    max_restarts: int = 0,
) -> "run.DockerExecutor":
    """Run in a container, as `docker run --gpus all --shm-size=16g --ulimit memlock=-1 --network=host` would.

    NeMo's data loaders and NCCL need shared memory and locked pages beyond Docker's defaults; these are the flags of
    NVIDIA's tutorials. The job runs in the current folder, mounted where NeMo-Run starts tasks, on the code as it is;
    the image has nemo_cpt, as the one that the Dockerfile builds. `docker stop -t 600 NAME` lets a recipe save a
    checkpoint first.

    Args:
        image: the image; by default the one of `docker build --tag localhost/nemo-cpt .`.
        gpus: GPUs the container sees; -1 for all, 0 for none.
        mounts: "source:target[:ro]"; by default the current folder, also at its own path.
        shm_size: size of /dev/shm.
        ulimits: "name=soft[:hard]", as `docker run --ulimit`.
        processes: processes, under torchrun if several; by default `gpus`, or one where that is -1.
        network: Docker network.
        user: "uid:gid" or a name in the container; by default yours, so that what the job writes is yours. Give "root"
            with rootless Docker, where that is you, and for images that need it.
        ipc_mode: Docker's --ipc, for example "host".
        env: further variables; no secrets.
        secrets: names of variables to pass, in a file of mode 600 that is mounted read-only; by default HF_TOKEN and
            WANDB_API_KEY where they are set.
        max_restarts: restarts after a crash.

    Returns:
        NeMo-Run's DockerExecutor.

    Raises:
        CptError: a mount does not exist, an ulimit or a size is malformed, a count is out of range, a secret is not
            set.
    """
    import nemo_run as run

    from nemo_cpt.executors import nemo_run_patches

    if gpus < -1 or (processes is not None and processes < 1):
        raise CptError(f"docker(gpus={gpus}, processes={processes}): gpus is -1 or more, processes 1 or more")
    check_not_negative("docker", max_restarts=max_restarts)
    check_form(
        "docker",
        r"(?i)(\d+\.?\d*|\.\d+)( ?[BKMGT]B?)?",
        "give a size as Docker takes it, such as '16g'",
        shm_size=shm_size,
    )
    processes = processes or max(gpus, 1)
    names = checked_secrets(secrets)
    volumes = volumes_of(mounts)
    variables = {"PYTHONUNBUFFERED": "1", **job_env(env)}
    if names:  # NeMo-Run starts the task by `bash -c`, which reads BASH_ENV first
        volumes.append(f"{keep_secrets('docker', names)}:{SECRETS_IN_CONTAINER}:ro")
        variables["BASH_ENV"] = SECRETS_IN_CONTAINER
    # When an executor is made, because by then NeMo-Run is imported, and nothing was launched yet.
    nemo_run_patches.apply()
    return run.DockerExecutor(
        container_image=image,
        num_gpus=gpus or None,
        ntasks_per_node=processes,
        launcher="torchrun" if processes > 1 else None,
        shm_size=shm_size,
        ulimits=[_ulimit(each) for each in ulimits],
        network=network,
        ipc_mode=ipc_mode,
        volumes=volumes,
        env_vars=variables,
        additional_kwargs={"user": user or f"{os.getuid()}:{os.getgid()}"},
        retries=max_restarts,
        # Nothing to pack: the current folder itself is mounted.
        packager=run.Packager(),
    )


def volumes_of(mounts: Sequence[str] | None) -> list[str]:
    """Return what a container of `docker(mounts=...)` has mounted, secrets apart.

    Raises:
        CptError: a mount does not exist.
    """
    folder = os.getcwd()
    # Twice: under its own path, which configurations name, and where NeMo-Run starts tasks.
    return [*existing_mounts(mounts if mounts is not None else [f"{folder}:{folder}"]), f"{folder}:{CODE_IN_CONTAINER}"]


def _ulimit(text: str) -> str:
    """Docker's "name=soft[:hard]" as NeMo-Run takes it apart, "name:soft:hard" (its docstring says otherwise)."""
    name, equals, limits = text.partition("=")
    soft, _, hard = limits.partition(":")
    if not equals or not all(each.lstrip("-").isdigit() for each in (soft, hard or soft)):
        raise CptError(f"docker(ulimits=[{text!r}]): write name=soft or name=soft:hard, for example 'memlock=-1'")
    return f"{name}:{soft}:{hard or soft}"
