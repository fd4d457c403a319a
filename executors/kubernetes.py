"""Kubernetes, through Kubeflow's Training Operator (TrainJob, v2)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from nemo_cpt.arguments import checked
from nemo_cpt.errors import CptError
from nemo_cpt.executors.counts import check_form, check_not_negative
from nemo_cpt.executors.environment import SECRETS, job_env

if TYPE_CHECKING:
    from nemo_run.core.execution.kubeflow import KubeflowExecutor


@checked
def kubernetes(
    image: str,
    gpus_per_node: int,
    workdir_pvc: str,
    nodes: int = 1,
    *,
    namespace: str = "default",
    runtime: str = "torch-distributed",
    claims: Mapping[str, str] | None = None,
    shm_size: str = "16Gi",
    cpus: str | None = None,
    memory: str | None = None,
    secret: str | None = None,
    secrets: Sequence[str] = SECRETS,
    env: Mapping[str, str | float] | None = None,
    image_pull_secrets: Sequence[str] = (),
    tolerations: Sequence[Mapping[str, Any]] = (),
    max_restarts: int = 0,
    code: Literal["ship", "committed"] | None = "ship",
    preempt_seconds: int | None = None,
) -> "KubeflowExecutor":
    """Submit a TrainJob, under torchrun. The code travels with the task's config, over the volume `workdir_pvc`.

    Args:
        image: with NeMo and nemo_cpt installed.
        gpus_per_node: GPUs and processes of each pod.
        workdir_pvc: a ReadWriteMany volume claim, which carries code and config to the pods, at /nemo_run.
        nodes: pods.
        namespace: where the job lives.
        runtime: the ClusterTrainingRuntime.
        claims: further volume claims, by the path they are mounted at.
        shm_size: size of /dev/shm.
        cpus: CPUs of a pod, as Kubernetes writes them.
        memory: memory of a pod, as Kubernetes writes it.
        secret: a Kubernetes Secret, which holds `secrets` as its keys; secrets are not passed in any other way.
        secrets: its keys, each an environment variable of the job.
        env: further variables; no secrets.
        image_pull_secrets: names of Secrets for the registry.
        tolerations: as in a pod's spec.
        max_restarts: restarts after a crash.
        code: "ship" copies the git repository of the current folder as it is on disk, "committed" refuses while
            anything is uncommitted, None takes the image's.
        preempt_seconds: how long a pod that is told to go may save its checkpoint (Kubernetes gives 30 s). By default
            twice what a step and a checkpoint take by the planner, 600 where it cannot plan the recipe.

    Returns:
        NeMo-Run's KubeflowExecutor.

    Raises:
        CptError: a count is out of range, a size is malformed, `secrets` are of no `secret`, the kubernetes package or
            a configuration of kubectl is missing.

    Example:
        >>> # kubectl create secret generic tokens --from-literal=HF_TOKEN=...
        >>> kubernetes("registry/nemo-cpt:1", gpus_per_node=8, nodes=2, workdir_pvc="work", secret="tokens")
    """
    if nodes < 1 or gpus_per_node < 1:
        raise CptError(f"kubernetes(nodes={nodes}, gpus_per_node={gpus_per_node}): at least 1 of each")
    check_not_negative("kubernetes", preempt_seconds=preempt_seconds, max_restarts=max_restarts)
    size = "give a quantity as Kubernetes writes it, such as '16Gi' or '500M'"
    check_form(
        "kubernetes", r"(\d+\.?\d*|\.\d+)([KMGTPE]i|[mkMGTPE]|[eE][+-]?\d+)?", size, shm_size=shm_size, memory=memory
    )
    if secrets != SECRETS and not secret:
        raise CptError(
            f"kubernetes(secrets={list(secrets)}): they are keys of a Kubernetes Secret, whose name is secret=..."
        )
    from nemo_run import Packager
    from nemo_run.core.execution.kubeflow import KubeflowExecutor

    from nemo_cpt.executors import nemo_run_patches
    from nemo_cpt.executors.code import CodeSnapshot
    from nemo_cpt.executors.stopping import GRACE

    nemo_run_patches.apply()
    # A pod's own /dev/shm has 64 MiB, in which data loaders die with "Bus error".
    mounted = {"/dev/shm": {"emptyDir": {"medium": "Memory", "sizeLimit": shm_size}}} | {
        path: {"persistentVolumeClaim": {"claimName": claim}} for path, claim in (claims or {}).items()
    }
    with _explained():
        return KubeflowExecutor(
            image=image,
            num_nodes=nodes,
            gpus_per_node=gpus_per_node,
            launcher="torchrun",
            namespace=namespace,
            runtime_ref=runtime,
            workdir_pvc=workdir_pvc,
            # By their places: a volume and its mount have one name.
            volumes=[{"name": f"volume-{index}"} | source for index, source in enumerate(mounted.values())],
            volume_mounts=[{"name": f"volume-{index}", "mountPath": path} for index, path in enumerate(mounted)],
            cpu_requests=cpus,
            memory_requests=memory,
            memory_limits=memory,
            env_list=[_from_secret(name, secret) for name in secrets] if secret else [],
            env_vars=job_env(env),
            image_pull_secrets=list(image_pull_secrets),
            tolerations=[dict(each) for each in tolerations],
            retries=max_restarts,
            packager=CodeSnapshot(refuse_uncommitted=code == "committed") if code else Packager(),
            pod_spec_overrides={GRACE: preempt_seconds},
        )


@contextmanager
def _explained() -> Iterator[None]:
    """Say what to install, or to configure, where NeMo-Run's executor cannot be made."""
    try:
        yield
    except ImportError as error:
        raise CptError("kubernetes(...) needs the kubernetes package: pip install kubernetes") from error
    except Exception as error:
        # By name, since the package that defines it may be what is missing.
        if type(error).__name__ != "ConfigException":
            raise
        raise CptError(f"kubernetes(...): no cluster is configured here ({error}); see `kubectl config`") from error


def _from_secret(name: str, secret: str) -> dict[str, Any]:
    # Optional: a key that the Secret lacks would keep the pod from starting, and a run without W&B needs none.
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name, "optional": True}}}
