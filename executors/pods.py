"""Patches of NeMo-Run's Kubeflow executor: configs and code that pods do not find, restarts that do not happen."""

import shlex
import sys
import tarfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from nemo_cpt.executors.environment import python_path
from nemo_cpt.executors.stopping import supervise


def find_configs() -> None:
    """Let a pod find a task's config: NeMo-Run copies the job's folder to the volume, but names the local path."""
    from nemo_run.core.execution.kubeflow import KubeflowExecutor

    assign: Callable[..., None] = KubeflowExecutor.assign

    @wraps(assign)
    def assign_and_map(executor: Any, *args: Any, **kwargs: Any) -> None:
        assign(executor, *args, **kwargs)
        if executor.workdir_pvc and not executor.workdir_local_path:
            executor.workdir_local_path = executor.job_dir

    KubeflowExecutor.assign = assign_and_map


def ship_code() -> None:
    """Unpack what a CodeSnapshot packs into the job's folder, which goes to the volume; NeMo-Run ignores packagers."""
    from nemo_run.core.execution.kubeflow import KubeflowExecutor

    from nemo_cpt.executors.code import CodeSnapshot

    package: Callable[..., None] = KubeflowExecutor.package

    @wraps(package)
    def unpack_and_package(executor: Any, packager: Any, job_name: str) -> None:
        if isinstance(packager, CodeSnapshot):
            archive = packager.package(Path.cwd(), executor.job_dir, job_name)
            with tarfile.open(archive) as tar:
                tar.extractall(Path(executor.job_dir, "code"), filter=_within)
            Path(archive).unlink()
        package(executor, packager, job_name=job_name)

    KubeflowExecutor.package = unpack_and_package


def _within(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """Files, and links to them; a link out of the repository leads to nothing in a pod, and is left away."""
    try:
        return tarfile.data_filter(member, folder)
    except (tarfile.AbsoluteLinkError, tarfile.LinkOutsideDestinationError):
        print(f"nemo_cpt: not shipped with the code, a link out of it: {member.name}", file=sys.stderr)
        return None


def quote_variables() -> None:
    """Quote variables in a pod's script, which exports them once more: of `a b` it made `a`."""
    from nemo_run.core.execution.kubeflow import KubeflowExecutor

    write: Callable[..., None] = KubeflowExecutor.materialize_launch_script

    @wraps(write)
    def write_quoted(executor: Any, *args: Any, **kwargs: Any) -> None:
        given = executor.env_vars
        # For the script alone: the pod's own specification has them as they are.
        executor.env_vars = {name: shlex.quote(value) for name, value in given.items()}
        try:
            write(executor, *args, **kwargs)
        finally:
            executor.env_vars = given

    KubeflowExecutor.materialize_launch_script = write_quoted


def supervise_jobs() -> None:
    """Start pods' jobs under `supervisor`, as the first process, which Kubernetes signals; retries were ignored."""
    from nemo_run.run.torchx_backend.schedulers.kubeflow import KubeflowScheduler

    from nemo_cpt.executors.code import CodeSnapshot, import_folders

    prepare: Callable[..., Any] = KubeflowScheduler._submit_dryrun

    @wraps(prepare)
    def prepare_supervised(scheduler: Any, app: Any, cfg: Any) -> Any:
        code = f"{cfg.code_dir}/code"
        # Where nothing was shipped the folder is not there, which Python passes over.
        folders = import_folders(code) if isinstance(cfg.packager, CodeSnapshot) else [code]
        paths = f"export PYTHONSAFEPATH=1 PYTHONPATH={python_path(*folders)}; "
        for role in app.roles:
            # The marker is for the supervisor alone, which is in the same pod: no folder that outlives it is needed.
            supervise(role, f"{paths}exec python", "/tmp", cfg.retries)
        return prepare(scheduler, app, cfg)

    KubeflowScheduler._submit_dryrun = prepare_supervised


def show_manifests() -> None:
    """Let a dry run print the TrainJob and the script that its pods start, of which NeMo-Run prints the name alone."""
    from nemo_run.run.torchx_backend.schedulers.kubeflow import KubeflowScheduler

    prepare: Callable[..., Any] = KubeflowScheduler._submit_dryrun

    @wraps(prepare)
    def prepare_and_show(scheduler: Any, app: Any, cfg: Any) -> Any:
        found = prepare(scheduler, app, cfg)
        found._fmt = _manifest_and_script
        return found

    KubeflowScheduler._submit_dryrun = prepare_and_show


def _manifest_and_script(request: Any) -> str:
    import yaml

    manifest = yaml.safe_dump(request.executor.get_job_body(request.name, request.cmd), sort_keys=False)
    script = Path(request.executor.job_dir, "launch.sh")
    return f"{manifest}\n# launch.sh\n{script.read_text()}" if script.is_file() else manifest
