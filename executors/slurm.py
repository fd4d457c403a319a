"""A Slurm cluster, with Pyxis containers or without any, from its login node or over SSH."""

import difflib
import inspect
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemo_cpt.arguments import checked
from nemo_cpt.errors import CptError
from nemo_cpt.executors import window
from nemo_cpt.executors.counts import check_form, check_not_negative
from nemo_cpt.executors.environment import (
    check_for_shells,
    checked_secrets,
    checked_setup,
    existing_mounts,
    job_env,
)

if TYPE_CHECKING:
    import nemo_run as run

_FOR_A_TERMINAL = "it is for sbatch on a command line"
NOT_IN_NEMO_RUNS_LIST = (
    "bb", "bbf", "begin", "cluster_constraint", "contiguous", "cores_per_socket", "cpu_freq", "deadline", "export_file",
    "extra", "extra_node_info", "hint", "resv_ports", "stepmgr", "use_min_nodes",
)  # fmt: skip
"""Directives of sbatch that it has beside `SlurmExecutor.SBATCH_FLAGS`; NeMo-Run writes any."""

SAID_OTHERWISE = {
    "chdir": "give workdir",
    "clusters": "export SLURM_CLUSTERS, which Slurm's other commands heed too",
    "no_requeue": "give requeue=False",
    "ntasks": "give nodes and tasks_per_node",
    "ntasks_per_node": "give tasks_per_node",
    "output": "the job's folder holds its logs, where `nemo-cpt logs` finds them",
} | dict.fromkeys(("help", "parsable", "test_only", "usage", "version", "wait", "wrap"), _FOR_A_TERMINAL)
"""Directives that another argument decides, or with which nobody would know of the job's state."""


_SIZES = ("mem", "mem_per_cpu", "mem_per_gpu", "tmp")
_COUNTS = ("cpus_per_gpu", "cpus_per_task", "ntasks_per_gpu", "ntasks_per_socket")
_RANGES = ("sockets_per_node", "threads_per_core")


@checked
@dataclass(frozen=True)
class ssh:  # noqa: N801  reads as a function where it is used: tunnel=ssh(...)
    """The way to a login node that is another machine; `rsync` and `ssh` must be installed on both.

    Attributes:
        host: the login node.
        user: account there.
        job_dir: folder there, on the cluster's shared file system, for scripts, code and logs.
        identity: private key file; without one, the agent's keys and the default ones are tried.
        port: SSH port.
    """

    host: str
    user: str
    job_dir: str
    identity: str | None = None
    port: int = 22


@checked
def slurm(
    account: str | None = None,
    partition: str | None = None,
    nodes: int = 1,
    gpus_per_node: int | None = None,
    time: str | int | timedelta | None = None,
    *,
    tasks_per_node: int | None = None,
    container_image: str | None = None,
    mounts: Sequence[str] | None = None,
    setup: Sequence[str] = (),
    env: Mapping[str, str | float] | None = None,
    secrets: Sequence[str] | None = None,
    mpi: str | None = None,
    gres: str | None = None,
    constraint: str | None = None,
    dependency: str | None = None,
    array: str | None = None,
    requeue: bool = True,
    preempt_seconds: int | None = None,
    max_restarts: int = 0,
    chain: int = 1,
    tunnel: Literal["local"] | ssh = "local",
    workdir: str | None = None,
    code: Literal["ship", "committed"] | None = "ship",
    venv: str | None = None,
    job_name_prefix: str = "cpt.",
    srun_args: Sequence[str] = (),
    **directives: Any,
) -> "run.SlurmExecutor":
    """Submit to Slurm: one srun of `nodes` x `tasks_per_node` tasks, one a GPU, without torchrun.

    The job runs the code as it is on disk when it is submitted, from a copy. It goes on after preemption:
    `preempt_seconds` before the time limit (and when Slurm preempts it) the tasks get SIGTERM, write a checkpoint, and
    the job requeues itself; where that was too late it comes back to its last checkpoint. HF_TOKEN and WANDB_API_KEY
    travel in a file of mode 600 in the job's folder, never in a script. W&B continues the same run. A task that fails
    raises CptError with the log's last lines, unless the experiment is detached.

    Args:
        account: as sbatch; None where the cluster wants none.
        partition: as sbatch; None for the cluster's default.
        nodes: number of nodes.
        gpus_per_node: GPUs of each node; by default what the recipe's trainer asks for.
        time: limit, as sbatch writes it ("30", "4:00:00", "2-00") or a timedelta; None for the partition's default.
        tasks_per_node: processes on each node; by default `gpus_per_node`, or as many as the recipe's trainer has.
        container_image: an image for Pyxis; None runs in the virtual environment, on a shared file system.
        mounts: "source:target[:flags]" for Pyxis; by default the current folder at its own path.
        setup: shell lines to run before the tasks start, for example "module load cuda".
        env: further variables, literal values; no secrets.
        secrets: names of environment variables to pass; by default HF_TOKEN and WANDB_API_KEY where they are set.
        mpi: srun's --mpi; by default pmix in a container, else the cluster's default. PyTorch needs neither.
        gres: instead of --gpus-per-node, for example "gpu:h100:8".
        constraint: as sbatch.
        dependency: as sbatch, for example "afterok:123".
        array: as sbatch.
        requeue: go on after preemption, the time limit or a node's failure.
        preempt_seconds: seconds before the time limit at which the tasks get SIGTERM; 0 for no signal. Slurm may send
            it up to 60 s early. By default twice what a step and a checkpoint take by the planner, 600 where it cannot
            plan the recipe, and half of `time` at most.
        max_restarts: restarts after a crash; preemptions are not counted.
        chain: jobs submitted one behind the other, each going on where the last stopped, for runs longer than the
            limit where requeueing is not wanted. Those left over when the run is finished end at once.
        tunnel: "local" on a login node, or `ssh(...)`.
        workdir: folder the tasks run in, as they see it; by default the current folder (which `mounts` must hold), over
            SSH the shipped code's.
        code: "ship" copies the git repository of the current folder as it is on disk, with uncommitted and untracked
            files, but not ignored ones; "committed" refuses while there are any; None copies nothing.
        venv: virtual environment on the nodes; by default this interpreter's, but over SSH and in containers what is
            on PATH there.
        job_name_prefix: before the task's name in squeue.
        srun_args: further arguments of srun.
        **directives: any other directive of sbatch, with _ for -: mem="0", qos="high", exclusive=True.

    Returns:
        NeMo-Run's SlurmExecutor, which `run.run`, `run.Experiment` and `nemo` submit.

    Raises:
        CptError: a value is out of range or malformed, values contradict each other, a directive does not exist, a
            mount or a secret is missing.

    Example:
        >>> run.run(recipe, executor=slurm(account="llm", partition="gpu", nodes=2, gpus_per_node=8, time="4:00:00"))
    """
    _check_counts(nodes=nodes, gpus_per_node=gpus_per_node, tasks_per_node=tasks_per_node, chain=chain)
    check_not_negative("slurm", max_restarts=max_restarts)
    _check_directives(directives)
    if array and chain > 1:
        raise CptError(
            f"slurm(array={array!r}, chain={chain}): the first task to finish would end the chain of all; give either"
        )
    limit = _time(time)
    _check_window(preempt_seconds, limit)
    if max_restarts and not requeue:
        raise CptError(f"slurm(requeue=False, max_restarts={max_restarts}): Slurm restarts a job by requeueing it")
    container_image, mounts, workdir, venv = _as_the_job_finds_them(tunnel, container_image, mounts, workdir, venv)

    import nemo_run as run

    from nemo_cpt.executors import nemo_run_patches
    from nemo_cpt.executors.code import CodeSnapshot
    from nemo_cpt.executors.slurm_job import RunLog, SlurmJob

    nemo_run_patches.apply()
    return SlurmJob(
        account=account,
        partition=partition,
        nodes=nodes,
        # One task a GPU, and no torchrun: Slurm starts, counts and signals them itself.
        ntasks_per_node=tasks_per_node or gpus_per_node or 1,
        # Either says how many; both could contradict each other.
        gpus_per_node=None if gres else gpus_per_node,
        gres=gres,
        time=limit,
        constraint=constraint,
        array=array,
        container_image=container_image,
        container_mounts=mounts,
        srun_args=[
            # A requeued job goes on in the same log, instead of emptying it.
            "--open-mode=append",
            *_mpi_args(mpi, container_image),
            *_workdir_args(workdir, container_image),
            *srun_args,
        ],
        # Behind a job that failed this one would wait for ever, and with it whoever waits for it.
        additional_parameters={"kill_on_invalid_dep": "yes"}
        | ({"dependency": dependency} if dependency else {})
        | directives,
        env_vars=job_env(env),
        retries=max_restarts,
        job_name_prefix=job_name_prefix,
        job_details=RunLog(),
        tunnel=_tunnel(tunnel),
        packager=CodeSnapshot(refuse_uncommitted=code == "committed") if code else run.Packager(),
        comes_back=requeue,
        may_requeue=requeue,
        chain=chain,
        secrets=checked_secrets(secrets),
        setup=checked_setup(setup),
        python_folder=_python_folder(venv, tunnel, container_image),
        takes_recipes_size=tasks_per_node is None and gpus_per_node is None and gres is None,
        preempt_seconds=preempt_seconds,
    )


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            hint = "leave it out for a job without GPUs" if name == "gpus_per_node" else "at least 1 is needed"
            raise CptError(f"slurm({name}={count}): {hint}")


def _check_directives(directives: Mapping[str, Any]) -> None:
    if not directives:
        return
    from nemo_run import SlurmExecutor

    known = {*SlurmExecutor.SBATCH_FLAGS, *NOT_IN_NEMO_RUNS_LIST, *SAID_OTHERWISE}
    for name in directives:
        if name not in known:
            near = difflib.get_close_matches(name, sorted({*known, *inspect.signature(slurm).parameters}), n=3)
            raise CptError(f"slurm({name}=...): sbatch has no such directive; near: {', '.join(near) or 'none'}")
        if name in SAID_OTHERWISE:
            raise CptError(f"slurm({name}=...): {SAID_OTHERWISE[name]}")
    sizes, counts, ranges = (
        {name: directives[name] for name in names if name in directives} for names in (_SIZES, _COUNTS, _RANGES)
    )
    size = "give a size as sbatch takes it: in MB, or with K, M, G or T behind it, such as '64G'"
    check_form("slurm", r"(?i)\d+([KMGT]i?B?)?", size, **sizes)  # it reads the first letter alone
    check_form("slurm", r"[1-9]\d*", "give a whole number, at least 1", **counts)
    check_form("slurm", r"[1-9]\d*(-\d+)?|\*", "give a whole number, at least 1, or a range, such as '1-2'", **ranges)
    _time(directives.get("time_min"), "time_min")


def _as_the_job_finds_them(
    tunnel: Literal["local"] | ssh,
    container_image: str | None,
    mounts: Sequence[str] | None,
    workdir: str | None,
    venv: str | None,
) -> tuple[str | None, list[str], str | None, str | None]:
    """Image, mounts, workdir and venv, completed where they are on this machine's disks.

    Raises:
        CptError: a path is not whole and would be looked for elsewhere, a mount is missing or does not hold the
            folder that tasks run in, or a name is taken.
    """
    in_container, over_ssh = container_image is not None, tunnel != "local"
    # Over SSH paths are the cluster's: there the shipped code is all that is known to be there.
    if mounts is None:
        mounts = [f"{os.getcwd()}:{os.getcwd()}"] if in_container and not over_ssh else []
    mounts = list(mounts) if over_ssh else existing_mounts(mounts)
    if workdir is None and not over_ssh:
        workdir = os.getcwd()
        if in_container:
            _check_is_mounted(workdir, mounts)
    _check_workdir(workdir)
    # What is not on this machine's disks cannot be completed or looked at from here.
    elsewhere = in_container or over_ssh
    workdir, venv = _path("workdir", workdir, elsewhere), _path("venv", venv, elsewhere)
    # Pyxis takes both; `~` and `.` would be the compute node's.
    if container_image and container_image.startswith(("~", ".")):  # a file, and not a registry's image
        container_image = _path("container_image", container_image, over_ssh)
    return container_image, mounts, workdir, venv


def _check_workdir(workdir: str | None) -> None:
    if workdir and re.match(r"/nemo_run(/|$)", workdir):
        raise CptError(f"workdir {workdir}: /nemo_run is NeMo-Run's name of the job's folder; use another")


def _check_is_mounted(workdir: str, mounts: Sequence[str]) -> None:
    """Refuse a container in which the current folder is not, where every task would fail to start."""
    inside = [Path(mount.split(":")[1]) for mount in mounts]
    # Many clusters let enroot mount the home of the user in every container.
    if not any(Path(workdir).is_relative_to(each) for each in [*inside, Path.home()]):
        raise CptError(
            f"slurm(mounts={mounts}): the tasks run in the current folder, {workdir}, which these do not hold: "
            f"add '{workdir}:{workdir}', or give workdir=, a folder as the container has it"
        )


def _path(name: str, path: str | None, elsewhere: bool) -> str | None:
    """A path as a job can find it: nothing expands `~` there, and its current folder is another one.

    Raises:
        CptError: it is not whole, and what would complete it is not on this machine.
    """
    if path is None or os.path.isabs(path):
        return path
    if elsewhere:
        raise CptError(f"slurm({name}={path!r}): give the whole path, from / on, as the job sees it")
    return str(Path(path).expanduser().absolute())


def _time(limit: str | int | timedelta | None, name: str = "time") -> str | None:
    if isinstance(limit, timedelta):
        if limit <= timedelta():
            raise CptError(f"slurm({name}={limit!r}): more than nothing")
        # A bare number is minutes to sbatch.
        return str(max(1, round(limit.total_seconds() / 60)))
    if limit is not None and not window.is_limit(str(limit)):
        forms = "minutes, M:SS, H:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"
        raise CptError(f"slurm({name}={limit!r}): write {forms}, for example '4:00:00'")
    return None if limit is None else str(limit)


def _check_window(preempt_seconds: int | None, limit: str | None) -> None:
    if preempt_seconds is None:
        return
    limit_seconds = window.seconds_of(limit)
    if not 0 <= preempt_seconds <= window.LONGEST_SECONDS:
        raise CptError(f"slurm(preempt_seconds={preempt_seconds}): 0 to {window.LONGEST_SECONDS}, as sbatch takes them")
    if limit_seconds is not None and limit_seconds <= preempt_seconds:
        raise CptError(
            f"slurm(time={limit!r}, preempt_seconds={preempt_seconds}): the tasks would be told to stop at their "
            f"start; give more than {preempt_seconds / 60:g} minutes, or fewer preempt_seconds"
        )


def _mpi_args(mpi: str | None, container_image: str | None) -> list[str]:
    mpi = mpi or ("pmix" if container_image else None)
    return [f"--mpi={mpi}"] if mpi else []


def _workdir_args(workdir: str | None, container_image: str | None) -> list[str]:
    """The last of two equal flags counts, and NeMo-Run's own comes first. It does not quote srun's arguments."""
    if not workdir:
        return []
    return [f"--{'container-workdir' if container_image else 'chdir'}={shlex.quote(workdir)}"]


def _python_folder(venv: str | None, tunnel: Literal["local"] | ssh, container_image: str | None) -> str:
    if venv:
        return str(Path(venv) / "bin")
    return str(Path(sys.executable).parent) if tunnel == "local" and not container_image else ""


def _tunnel(tunnel: Literal["local"] | ssh) -> Any:
    import nemo_run as run

    if tunnel == "local":
        return run.LocalTunnel(job_dir="")
    if not isinstance(tunnel, ssh):
        raise CptError(f"slurm(tunnel={tunnel!r}): give 'local' or ssh(host=..., user=..., job_dir=...)")
    if not os.path.isabs(tunnel.job_dir):
        raise CptError(f"ssh(job_dir={tunnel.job_dir!r}): give the whole path there, from / on")
    check_for_shells(tunnel.job_dir, "give ssh(job_dir=...) another")
    if tunnel.identity and not Path(tunnel.identity).expanduser().is_file():
        raise CptError(f"ssh(identity={tunnel.identity!r}): no such key file")
    identity = str(Path(tunnel.identity).expanduser()) if tunnel.identity else None
    return run.SSHTunnel(
        host=tunnel.host, user=tunnel.user, port=tunnel.port, job_dir=tunnel.job_dir, identity=identity
    )
