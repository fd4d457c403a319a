"""What `slurm(...)` returns, and how it is submitted, followed and cancelled: extensions of NeMo-Run's classes."""

import io
import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import invoke
import nemo_run as run
from nemo_run.config import RUNDIR_NAME
from nemo_run.core.execution.slurm import SlurmExecutor, SlurmJobDetails
from nemo_run.core.tunnel.client import SSHTunnel, Tunnel
from nemo_run.run.torchx_backend.schedulers.slurm import SlurmTunnelScheduler, _get_job_dirs, _save_job_dir
from torchx.schedulers.api import DescribeAppResponse
from torchx.schedulers.slurm_scheduler import SLURM_STATES
from torchx.specs import AppDef, AppDryRunInfo, AppState, Role

from nemo_cpt.errors import CptError, StoppedEarlyError
from nemo_cpt.executors.environment import secrets_file
from nemo_cpt.executors.runner import MARKER, REFUSAL
from nemo_cpt.executors.stopping import with_our_runner
from nemo_cpt.executors.supervisor import MARKER_PREFIX, REFUSAL_PREFIX
from nemo_cpt.executors.tracking import EXPERIMENT

SBATCH = "sbatch"
UNDERWAY = (AppState.PENDING, AppState.RUNNING, AppState.SUBMITTED)


@dataclass(kw_only=True)
class RunLog(SlurmJobDetails):
    """One log file for the tasks of a run, over requeues and the jobs of a chain; NeMo-Run follows only one."""

    @property
    def srun_stdout(self) -> Path:
        return Path(str(self.folder)) / f"log-{self.job_name}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}.out"


@dataclass(kw_only=True)
class SlurmJob(SlurmExecutor):
    """NeMo-Run's SlurmExecutor with what it lacks.

    Attributes:
        comes_back: the job requeues itself after its tasks were told to stop and saved.
        may_requeue: Slurm may requeue it (sbatch --requeue or --no-requeue).
        chain: number of jobs, one behind the other.
        secrets: names of environment variables that go into a file of mode 600.
        setup: shell lines of the user.
        python_folder: put first on PATH in the job.
        takes_recipes_size: the number of tasks and GPUs of a node is the one of the task's trainer.
    """

    comes_back: bool = True
    may_requeue: bool = True
    chain: int = 1
    secrets: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    python_folder: str = ""
    takes_recipes_size: bool = False

    def fit(self, task: Any) -> None:
        """Make a task's trainer and this job agree, before either is fixed.

        The trainer gets this job's number of nodes; a job that was given neither GPUs nor tasks gets the trainer's
        devices.

        Raises:
            CptError: the trainer's devices differ from the tasks on a node.
        """
        trainer = getattr(task, "trainer", None)
        if not isinstance(trainer, run.Config) or not isinstance(getattr(trainer, "devices", None), int):
            return
        trainer.num_nodes = self.nodes
        if self.takes_recipes_size:
            gpus = trainer.devices if trainer.accelerator == "gpu" else None
            self.ntasks_per_node, self.gpus_per_node = trainer.devices, gpus
        if trainer.devices != self.ntasks_per_node:
            raise CptError(
                f"the recipe's trainer has devices={trainer.devices}, and the job {self.ntasks_per_node} tasks on each "
                "node: give the recipe's gpus_per_node and slurm(gpus_per_node=...) the same number"
            )

    @property
    def folder(self) -> str:
        """The job's folder on the cluster."""
        return os.path.join(self.tunnel.job_dir, Path(self.job_dir).name)

    def script_head(self) -> str:
        """Return the shell lines that run before srun."""
        job = f"/{RUNDIR_NAME}" if self.container_image else self.folder  # as the tasks see it
        lines = [
            "{ set +vx; } 2>/dev/null",
            f"job={shlex.quote(self.folder)}",
            f'rm -f "$job/{MARKER_PREFIX}$SLURM_JOB_ID" "$job/{REFUSAL_PREFIX}$SLURM_JOB_ID"',  # of an earlier start
            *self._chain_lines(),
            "export MASTER_ADDR=${head_node_ip%% *}",
            f'export {MARKER}={shlex.quote(job)}/{MARKER_PREFIX}"$SLURM_JOB_ID"',
            f'export {REFUSAL}={shlex.quote(job)}/{REFUSAL_PREFIX}"$SLURM_JOB_ID"',
            f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(job)}/code:{shlex.quote(job)}/code/src:$PYTHONPATH",
            *([f"export PATH={shlex.quote(self.python_folder)}:$PATH"] if self.python_folder else []),
            f"export {EXPERIMENT}={self.experiment_id} WANDB_RESUME=allow",
            f"export WANDB_RUN_ID=${{WANDB_RUN_ID:-{self.experiment_id}}}",
            *(['. "$job/secrets.env"'] if self.secrets else []),
            *self.setup,
            # When srun has failed, before NeMo-Run's script looks whether the job is to start again.
            f"""trap '[ ! -e "$job/{REFUSAL_PREFIX}$SLURM_JOB_ID" ] || TORCHX_MAX_RETRIES=0' ERR""",
            self._on_exit(),
        ]
        return "\n".join(lines)

    def _chain_lines(self) -> list[str]:
        if self.chain == 1:
            return []
        return [
            '[ -e "$job/finished" ] && { echo "an earlier job of the chain finished the run"; exit 0; }',
            '[ -e "$job/failed" ] && { echo "an earlier job of the chain failed"; exit 1; }',
        ]

    def _on_exit(self) -> str:
        """A trap, because NeMo-Run's script has no place for lines after srun.

        A cancelled job is not RUNNING any more when its tasks have saved and ended, and must not come back.
        """
        come_back = 'scontrol requeue "$SLURM_JOB_ID"' if self.comes_back else f"exit {StoppedEarlyError.exit_code}"
        return f"""leave() {{
    code=$?
    if [ -e "$job/{MARKER_PREFIX}$SLURM_JOB_ID" ]; then
        echo "stopped ahead of the end, with a checkpoint"
        if scontrol show job -o "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
            {come_back}
        fi
    elif [ $code -eq 0 ]; then
        touch "$job/finished"
        {'[ -n "$SLURM_ARRAY_JOB_ID" ] || rm -f "$job/secrets.env"' if self.secrets else ":"}
    elif [ $code -lt 126 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -ge "$TORCHX_MAX_RETRIES" ]; then
        touch "$job/failed"
    fi
}}
trap leave EXIT"""


class SlurmJobScheduler(SlurmTunnelScheduler):
    """NeMo-Run's scheduler for Slurm; it treats a SlurmJob as described there, and other executors as ever."""

    def _submit_dryrun(self, app: AppDef, cfg: Any) -> AppDryRunInfo:
        if isinstance(cfg, SlurmJob):
            self._initialize_tunnel(cfg.tunnel)
            cfg.tunnel = self.tunnel
            cfg.setup_lines = cfg.script_head()
            cfg.env_vars = {name: shlex.quote(value) for name, value in cfg.env_vars.items()}
            for role in app.roles:
                role.env = {name: shlex.quote(value) for name, value in role.env.items()}
                role.args = [with_our_runner(argument) for argument in role.args]
        return super()._submit_dryrun(app, cfg)

    def schedule(self, dryrun_info: AppDryRunInfo) -> str:
        """Submit, as often as the chain is long, and return the id of the last job.

        Raises:
            CptError: sbatch is missing or refused the job; with Slurm's own words. No job is left behind.
        """
        job = dryrun_info.request.executor
        if not isinstance(job, SlurmJob):
            return super().schedule(dryrun_info)
        self._initialize_tunnel(job.tunnel)
        tunnel: Tunnel = self.tunnel
        script = os.path.join(tunnel.job_dir, f"{job.job_name}_sbatch.sh")
        _write_secrets(tunnel, job)
        after = f"{job.dependency_type}:{':'.join(job.parse_deps())}" if job.dependencies else ""
        _check_that_it_can_ever_run(tunnel, script)
        ids: list[str] = []
        try:
            for _ in range(job.chain):
                ids.append(_sbatch(tunnel, script, after, job.may_requeue))
                after = f"afterany:{ids[-1]}"
        except CptError:
            if ids:
                tunnel.run(f"scancel {' '.join(ids)}", warn=True)
            raise
        for job_id in ids:
            _save_job_dir(job_id, job.job_dir, tunnel, job.job_details.ls_term)
        Path(job.job_dir, "slurm_jobs.json").write_text(json.dumps(ids))
        return ids[-1]

    def _cancel_existing(self, app_id: str) -> None:
        known = _get_job_dirs().get(app_id)
        if known is None:
            return
        self._initialize_tunnel(known[1])
        self.tunnel.run(f"scancel {' '.join(_jobs_of_chain(known[0], app_id))}", warn=True)

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Return a job's state: from scontrol, which needs no accounting database, then from sacct, then from its log.

        NeMo-Run asks sacct alone, and cancels a job after 30 failures: every job of a cluster without a database.
        """
        known = _get_job_dirs().get(app_id)
        if known is None:
            return None
        folder, tunnel, _ = known
        self._initialize_tunnel(tunnel)
        found = _from_scontrol(self.tunnel, app_id)
        if found is None and self.tunnel.run("sacct --version && sacct -n -j 1", warn=True).ok:
            return super().describe(app_id)
        state, name = found or (_from_log(self.tunnel, os.path.join(tunnel.job_dir, Path(folder).name), app_id), "")
        role = name.rpartition(".")[2] or Path(folder).name
        return DescribeAppResponse(app_id=app_id, roles=[Role(name=role, image="", num_replicas=1)], state=state)


def create_scheduler(session_name: str, **kwargs: Any) -> SlurmJobScheduler:
    """TorchX's factory of the scheduler."""
    return SlurmJobScheduler(session_name=session_name, experiment=kwargs.pop("experiment", None))


def _sbatch(tunnel: Tunnel, script: str, after: str, may_requeue: bool) -> str:
    command = [SBATCH, "--parsable", "--requeue" if may_requeue else "--no-requeue"]
    command += [f"--dependency={after}"] if after else []
    try:
        return str(tunnel.run(shlex.join([*command, script])).stdout).strip().partition(";")[0]
    except invoke.exceptions.UnexpectedExit as error:
        said = error.result.stderr.strip()
        if error.result.return_code == 127:
            said = f"sbatch not found on {tunnel.host}: submit from a login node, or give slurm(tunnel=ssh(...))"
        raise CptError(f"Slurm did not take the job. {said}") from error


def _check_that_it_can_ever_run(tunnel: Tunnel, script: str) -> None:
    """Slurm queues a job that no node can ever hold, unless the cluster sets EnforcePartLimits."""
    said = tunnel.run(shlex.join([SBATCH, "--test-only", script]), warn=True).stderr.strip()
    if "node configuration is not available" in said:
        raise CptError(f"Slurm could never run the job: more nodes, tasks, GPUs or memory than there are. {said}")


def _write_secrets(tunnel: Tunnel, job: SlurmJob) -> None:
    if not job.secrets:
        return
    path, text = os.path.join(job.folder, "secrets.env"), secrets_file(job.secrets)
    if isinstance(tunnel, SSHTunnel):
        tunnel.run(f"umask 077 && rm -f {shlex.quote(path)} && : > {shlex.quote(path)}")
        tunnel.session.put(io.StringIO(text), remote=path)
        return
    Path(path).unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _jobs_of_chain(folder: str, app_id: str) -> list[str]:
    record = Path(folder, "slurm_jobs.json")
    return json.loads(record.read_text()) if record.is_file() else [app_id]


def _from_scontrol(tunnel: Tunnel, app_id: str) -> tuple[AppState, str] | None:
    """State and name of a job that Slurm remembers; of an array, what is under way counts before what failed."""
    shown = tunnel.run(f"scontrol show job -o {app_id}", warn=True)
    jobs = [dict(pair.partition("=")[::2] for pair in line.split(" ")) for line in shown.stdout.splitlines()]
    states = [_app_state(job.get("JobState", "")) for job in jobs if "JobId" in job]
    if not shown.ok or not states:
        return None
    worst = [state for state in (*UNDERWAY, AppState.FAILED, AppState.CANCELLED) if state in states]
    return (worst or states)[0], jobs[0].get("JobName", "")


def _app_state(slurm_state: str) -> AppState:
    if slurm_state in ("COMPLETING", "CONFIGURING", "STAGE_OUT", "STOPPED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        return AppState.RUNNING
    return SLURM_STATES.get(slurm_state, AppState.UNKNOWN)


def _from_log(tunnel: Tunnel, folder: str, app_id: str) -> AppState:
    """What the batch script said last; Slurm forgets a job some minutes after its end."""
    logs = f"{shlex.quote(folder)}/sbatch_*_{app_id}.out"
    said = tunnel.run(f"grep -h 'job exited with code' {logs} | tail -1", warn=True).stdout.split()
    if not said:
        return AppState.UNKNOWN
    return AppState.SUCCEEDED if said[-1] == "0" else AppState.FAILED
