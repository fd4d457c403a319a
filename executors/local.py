"""This machine: one process, or several under torchrun; several machines by hand."""

import os
import sys
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_cpt.arguments import checked
from nemo_cpt.errors import CptError
from nemo_cpt.executors.counts import check_not_negative
from nemo_cpt.executors.environment import job_env

if TYPE_CHECKING:
    import nemo_run as run


@checked
def local(
    processes: int | None = None,
    gpus: int | None = None,
    env: Mapping[str, str | float] | None = None,
    nodes: int = 1,
    max_restarts: int = 0,
) -> "run.LocalExecutor":
    """Run on this machine, in one process without torchrun or in several with it.

    The job inherits the whole environment, so HF_TOKEN and WANDB_API_KEY reach it without being written anywhere.
    It runs in the current folder with the interpreter that calls this. A task that fails raises CptError with the
    log's last lines when the experiment ends. On SIGTERM, SIGUSR1 or Ctrl-C a recipe saves a checkpoint first; the run
    then counts as failed (exit code 75 of its process), and the same command goes on from there.

    Args:
        processes: processes on this machine; by default one a GPU, or one.
        gpus: GPUs the job sees: the first `gpus` of those visible now, 0 for none; by default all stay visible.
        env: further environment variables; no secrets, because NeMo-Run writes them to disk.
        nodes: machines in the run. With more than one, start the same script on each of them with MASTER_ADDR,
            MASTER_PORT and NODE_RANK set (MASTER_ADDR and MASTER_PORT alike, NODE_RANK from 0).
        max_restarts: restarts of all processes after a crash; what a CptError ended is not tried again.

    Returns:
        NeMo-Run's LocalExecutor, with the torchrun launcher where more than one process takes part.

    Raises:
        CptError: a count is out of range, `env` holds a secret, or a run over several nodes lacks its variables.
    """
    import nemo_run as run

    from nemo_cpt.executors import nemo_run_patches

    processes = processes if processes is not None else max(gpus or 1, 1)
    _check_counts(processes, gpus, nodes, max_restarts)
    nemo_run_patches.apply()
    return run.LocalExecutor(
        ntasks_per_node=processes,
        nodes=nodes,
        # One process needs no rendezvous, and its traceback comes unprefixed.
        launcher="torchrun" if processes * nodes > 1 else None,
        # The user's last, so that it stands.
        env_vars=_quiet_torchrun() | _interpreter_first() | visible_gpus(gpus) | job_env(env),
        retries=max_restarts,
    )


def _check_counts(processes: int, gpus: int | None, nodes: int, max_restarts: int) -> None:
    if processes < 1:
        raise CptError(f"local(processes={processes}): at least one process is needed")
    if gpus is not None and gpus < 0:
        raise CptError(f"local(gpus={gpus}): give 0 to hide all GPUs, or the number to use")
    if nodes < 1:
        raise CptError(f"local(nodes={nodes}): at least one node is needed")
    check_not_negative("local", max_restarts=max_restarts)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if nodes > 1 and not os.environ.get(name)]
    if missing:
        raise CptError(
            f"local(nodes={nodes}) needs {', '.join(missing)} in the environment: start the script on every node with "
            "the address and a free port of the first one, and NODE_RANK=0, 1, ..."
        )


def _interpreter_first() -> dict[str, str]:
    """NeMo-Run starts plain `python` and `torchrun`: make them those of this interpreter, activated or not."""
    return {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])}


def _quiet_torchrun() -> dict[str, str]:
    return {"LOGLEVEL": os.environ.get("LOGLEVEL", "WARNING")}  # NeMo-Run would set INFO


def visible_gpus(gpus: int | None) -> dict[str, str]:
    """Return what `gpus` makes of CUDA_VISIBLE_DEVICES: the first ones of those visible now; nothing for None.

    Raises:
        CptError: fewer are visible.
    """
    if gpus is None:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    # CUDA hides all GPUs from the first that does not exist on; "" and "-1" are how people hide every one.
    devices = list(takewhile(lambda device: device.strip() not in ("", "-1"), visible.split(",")))
    if len(devices) < gpus:
        raise CptError(
            f"local(gpus={gpus}): CUDA_VISIBLE_DEVICES={visible!r} shows {len(devices)}; unset it, or ask for fewer"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[:gpus])}
