"""Machines of a cloud or of Kubernetes, through SkyPilot."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_cpt.arguments import checked
from nemo_cpt.constants import CODE_IN_CONTAINER as CODE
from nemo_cpt.errors import CptError
from nemo_cpt.executors.counts import check_not_negative
from nemo_cpt.executors.environment import checked_secrets, checked_setup, existing_mounts, job_env, keep_secrets

if TYPE_CHECKING:
    import nemo_run as run

SECRETS_THERE = "~/.nemo_cpt_secrets.env"


@checked
def skypilot(
    gpus: str,
    gpus_per_node: int = 1,
    nodes: int = 1,
    *,
    infra: str | None = None,
    container_image: str | None = None,
    cluster_name: str | None = None,
    use_spot: bool = False,
    disk_size: int | None = None,
    mounts: Sequence[str] = (),
    setup: Sequence[str] = (),
    env: Mapping[str, str | float] | None = None,
    secrets: Sequence[str] | None = None,
    autodown: bool = True,
    idle_minutes_to_autostop: int | None = 10,
    max_restarts: int = 0,
) -> "run.SkypilotExecutor":
    """Bring up a SkyPilot cluster and run there, under torchrun. The committed code is shipped, and installed.

    SkyPilot's executor takes code from git only, so that uncommitted changes are refused. A checkout of nemo_cpt is
    installed from where it was shipped to: without its requirements where a container brings them, else with the
    pinned ones. Another repository is shipped as it is, and the container or `setup` brings nemo_cpt.

    Args:
        gpus: SkyPilot's name of the accelerator, for example "H100".
        gpus_per_node: of each machine.
        nodes: machines.
        infra: "aws/us-east-1", "k8s/my-context", ...; by default SkyPilot's cheapest.
        container_image: for example "docker:registry.example/nemo-cpt:1-root", built from the Dockerfile with
            `--target root`, as SkyPilot installs its own tools in it.
        cluster_name: to reuse a cluster; by default one for the experiment.
        use_spot: spot machines.
        disk_size: GiB.
        mounts: "source:target" of files and folders to copy there.
        setup: shell lines that prepare a machine, before nemo_cpt is installed.
        env: further variables; no secrets.
        secrets: names of variables to pass, in a file of mode 600; by default HF_TOKEN and WANDB_API_KEY where set.
        autodown: remove the cluster when it has been idle.
        idle_minutes_to_autostop: how long it may be idle; None keeps it.
        max_restarts: restarts after a crash.

    Returns:
        NeMo-Run's SkypilotExecutor.

    Raises:
        CptError: a count is out of range, a mount or a secret is missing, nothing brings nemo_cpt, `setup` takes it
            from a public index, SkyPilot is not installed.
    """
    if nodes < 1 or gpus_per_node < 1:
        raise CptError(f"skypilot(nodes={nodes}, gpus_per_node={gpus_per_node}): at least 1 of each")
    check_not_negative("skypilot", max_restarts=max_restarts, idle_minutes_to_autostop=idle_minutes_to_autostop)
    import nemo_run as run

    from nemo_cpt.executors import nemo_run_patches

    names = checked_secrets(secrets)
    copied = {target: source for source, _, target in (each.partition(":") for each in existing_mounts(mounts))}
    lines = [*checked_setup(setup), *_installation(container_image is not None)]
    if not lines and container_image is None:
        raise CptError(
            "skypilot(...): nothing installs nemo_cpt on the machines, as this folder's repository is another one: "
            "give container_image= with nemo_cpt in it, setup= with lines that install it, or launch from its checkout"
        )
    if names:  # SkyPilot's scripts read ~/.bashrc
        copied[SECRETS_THERE] = str(keep_secrets("skypilot", names))
        lines.append(f"chmod 600 {SECRETS_THERE}; echo '. {SECRETS_THERE}' >> ~/.bashrc")
    nemo_run_patches.apply()
    try:
        return run.SkypilotExecutor(
            gpus=gpus,
            gpus_per_node=gpus_per_node,
            num_nodes=nodes,
            launcher="torchrun",
            infra=infra,
            container_image=container_image,
            cluster_name=cluster_name,
            use_spot=use_spot,
            disk_size=disk_size,
            file_mounts=copied,
            setup="\n".join(lines),
            env_vars=job_env(env),
            autodown=autodown,
            idle_minutes_to_autostop=idle_minutes_to_autostop,
            retries=max_restarts,
            packager=run.GitArchivePackager(check_uncommitted_changes=True, check_untracked_files=True),
        )
    # NeMo-Run asserts that SkyPilot is installed, and says how to install it.
    except AssertionError as error:
        raise CptError(f"skypilot(...): {error}") from error


def _installation(in_container: bool) -> list[str]:
    """Shell lines that install the shipped code where it is nemo_cpt's."""
    if not _is_nemo_cpt(Path.cwd()):
        return []
    if in_container:
        return [f"python -m pip install --no-deps -e {CODE}"]
    # NeMo-Run leaves conda's environment before the task, too.
    return ["conda deactivate", f"python -m pip install -c {CODE}/constraints.txt -e '{CODE}[gpu]'"]


def _is_nemo_cpt(folder: Path) -> bool:
    """Whether a folder's git repository is nemo_cpt's own."""
    from nemo_cpt.executors.code import repository_root

    root = repository_root(folder)
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"] if root else {}
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return False
    return bool(project.get("name") == "nemo_cpt")
