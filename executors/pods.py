"""Patches of NeMo-Run's Kubeflow executor: configs and code that pods do not find, restarts that do not happen."""

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
                # "data": no links out of the folder, and nothing but files.
                tar.extractall(Path(executor.job_dir, "code"), filter="data")
            Path(archive).unlink()
        package(executor, packager, job_name=job_name)

    KubeflowExecutor.package = unpack_and_package


def supervise_jobs() -> None:
    """Start pods' jobs under `supervisor`, as the first process, which Kubernetes signals; retries were ignored."""
    from nemo_run.run.torchx_backend.schedulers.kubeflow import KubeflowScheduler

    prepare: Callable[..., Any] = KubeflowScheduler._submit_dryrun

    @wraps(prepare)
    def prepare_supervised(scheduler: Any, app: Any, cfg: Any) -> Any:
        code = f"{cfg.code_dir}/code"
        paths = f"export PYTHONSAFEPATH=1 PYTHONPATH={python_path(code, f'{code}/src')}; "
        for role in app.roles:
            supervise(role, f"{paths}exec python", "/tmp", cfg.retries)
        return prepare(scheduler, app, cfg)

    KubeflowScheduler._submit_dryrun = prepare_supervised
