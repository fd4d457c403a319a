"""What `slurm(...)` returns, and how it is submitted, followed and cancelled: extensions of NeMo-Run's classes."""

import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import invoke
import nemo_run as run
from nemo_run.config import RUNDIR_NAME
from nemo_run.core.execution.slurm import SlurmBatchRequest, SlurmExecutor, SlurmJobDetails
from nemo_run.core.tunnel.client import SSHTunnel, Tunnel
from nemo_run.run.torchx_backend.schedulers.slurm import SlurmTunnelScheduler, _get_job_dirs, _save_job_dir
from torchx.schedulers.api import DescribeAppResponse
from torchx.schedulers.slurm_scheduler import SLURM_STATES
from torchx.specs import AppDef, AppDryRunInfo, AppState, Role, is_terminal

from nemo_cpt.constants import MARKER
from nemo_cpt.errors import CptError, StoppedEarlyError
from nemo_cpt.executors import window
from nemo_cpt.executors.code import CodeSnapshot, import_folders
from nemo_cpt.executors.environment import as_literals, checked_env, python_path, secrets_file, write_secrets
from nemo_cpt.executors.runner import REFUSAL
from nemo_cpt.executors.stopping import with_our_runner
from nemo_cpt.executors.supervisor import MARKER_PREFIX, REACHED_FILE, REFUSAL_PREFIX
from nemo_cpt.executors.tracking import EXPERIMENT
from nemo_cpt.planning.save_window import window_within

SBATCH = "sbatch"
SECRETS_FILE = "secrets.env"
ENDING = Path(__file__).with_name("slurm_job.sh").read_text()
UNDERWAY = (AppState.PENDING, AppState.RUNNING, AppState.SUBMITTED)
OUTSIDE_JOBS = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_JWT")
"""Variables of Slurm's that people set; every other one describes the job that a process is in."""
HEAD_ADDRESS = """\
MASTER_ADDR=
for address in $head_node_ip; do
    case $address in 127.* | ::1 | fe80:*) ;; *) MASTER_ADDR=$address; break ;; esac
done
address=$(scontrol show node -o "$head_node" 2>/dev/null | sed 's/.* NodeAddr=//; s/ .*//')
export MASTER_ADDR=${MASTER_ADDR:-${address:-$head_node}}"""
"""Where the tasks meet: of the head node's addresses, as the template has them, the first that other nodes can reach;
where its own name leads to itself alone (127.0.1.1 in /etc/hosts), the one that Slurm reaches it by."""
_END = r"^job exited with code [0-9]+$|\(cancelled\)|CANCELLED AT [^ ]+ \*\*\*"
"""What a job's log has of its end: the template's line, the reason that slurm_job.sh gives, or Slurm's own words."""
_NEED_GPUS = ("gpu_bind", "gpu_freq", "gpus_per_socket", "ntasks_per_gpu")  # directives of jobs on GPUs
_OVER = re.compile("Invalid job id|already complet")  # in what scancel says of a job that has ended
_RUNDIR = re.compile(rf"(?<![\w./~}}-])/{RUNDIR_NAME}(?![\w.-])")
"""NeMo-Run's name of the job's folder; the end of `/scratch/nemo_run` and the beginning of `/nemo_runs` are none."""


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
        comes_back: the job requeues itself after its tasks were told to stop.
        may_requeue: Slurm may requeue it (sbatch --requeue or --no-requeue).
        chain: number of jobs, one behind the other.
        secrets: names of environment variables that go into a file of mode 600.
        setup: shell lines of the user.
        python_folder: put first on PATH in the job.
        takes_recipes_size: the number of tasks and GPUs of a node is the one of the task's trainer.
        preempt_seconds: before its time limit Slurm signals the tasks; 0 for no signal, None for what the task needs.
    """

    comes_back: bool = True
    may_requeue: bool = True
    chain: int = 1
    secrets: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    python_folder: str = ""
    takes_recipes_size: bool = False
    preempt_seconds: int | None = None

    def fit(self, task: Any) -> None:
        """Make a task's trainer and this job agree, before either is fixed.

        The trainer gets this job's number of nodes; a job that was given neither GPUs nor tasks gets the trainer's
        devices.

        Raises:
            CptError: the trainer's devices differ from the tasks on a node, or a variable looks like a secret.
        """
        checked_env(self.env_vars)  # those too that were set on the executor since `slurm` looked at them
        trainer = getattr(task, "trainer", None)
        # Any task may be submitted; there is nothing to agree on with one that trains nothing.
        if not isinstance(trainer, run.Config) or not isinstance(getattr(trainer, "devices", None), int):
            return
        # The executor decides: it is what Slurm is asked for.
        trainer.num_nodes = self.nodes
        self.take_size(trainer.devices, trainer.accelerator == "gpu")
        if trainer.devices != self.ntasks_per_node:
            raise CptError(
                f"the recipe's trainer has devices={trainer.devices}, and the job {self.ntasks_per_node} tasks on each "
                "node: give the recipe's gpus_per_node and slurm(gpus_per_node=...) the same number"
            )

    def take_size(self, processes: int, on_gpus: bool) -> None:
        """Take a recipe's processes on a node, with a GPU each, where this job was given neither GPUs nor tasks."""
        size: Any = self  # NeMo-Run's fields have no types for mypy
        if self.takes_recipes_size and size.ntasks_per_node == 1:
            # GPUs that were set on the executor stand, also by another directive.
            otherwise = {"gpus", "gpus_per_task", "gpus_per_socket"} & set(self.additional_parameters or ())
            gpus = size.gpus_per_node or (processes if on_gpus and not otherwise else None)
            size.ntasks_per_node, size.gpus_per_node = size.gpus_per_node or processes, gpus

    def become_one_process(self, gpu: bool) -> None:
        """Take one task on one node, without the GPUs that were asked for, or with one of them.

        Further directives of sbatch stand, `gpus` and `gpus_per_task` too: a partition may take no job without a GPU.

        Args:
            gpu: keep one.
        """
        size: Any = self
        others: dict[str, Any] = dict(size.additional_parameters or {})
        gres = (size.gres or "").split(",")
        of_gpus = [each for each in gres if re.match(r"gpu(:|$)", each)]
        kept = [re.sub(r":\d+$", "", each) + ":1" for each in of_gpus if gpu]
        size.gres = ",".join([*(each for each in gres if each not in of_gpus), *kept]) or None
        size.nodes = size.ntasks_per_node = 1
        size.gpus_per_node = 1 if gpu and size.gpus_per_node else None
        size.takes_recipes_size = False
        if not (size.gpus_per_node or kept or size.gpus_per_task or {"gpus", "gpus_per_task"} & others.keys()):
            for name in _NEED_GPUS:
                others.pop(name, None)
            # What came with each GPU: Slurm counts nothing by GPUs that are not there.
            for by_gpu, plain in (("cpus_per_gpu", "cpus_per_task"), ("mem_per_gpu", "mem")):
                brought = others.pop(by_gpu, None) or getattr(size, by_gpu)
                setattr(size, by_gpu, None)
                if brought and plain not in others and getattr(size, plain) is None:
                    setattr(size, plain, brought)
        size.additional_parameters = others

    @property
    def tasks(self) -> int | None:
        """Tasks on a node; None where they are yet to be the recipe's."""
        size: Any = self
        if self.takes_recipes_size and size.ntasks_per_node == 1:
            return size.gpus_per_node or None
        return int(size.ntasks_per_node)

    def give_time_to_save(self, needed: int | None) -> None:
        """Have Slurm signal the tasks so many seconds ahead of the limit as they need, if that is known."""
        self.preempt_seconds = min(window_within(window.seconds_of(self.time), needed), window.LONGEST_SECONDS)
        if needed and self.preempt_seconds < needed:
            print(
                f"nemo_cpt: warning: the job may take {needed} s to save, and half of its time is "
                f"{self.preempt_seconds} s: give slurm() more time",
                file=sys.stderr,
            )

    @property
    def folder(self) -> str:
        """The job's folder on the cluster."""
        return os.path.join(self.tunnel.job_dir, Path(self.job_dir).name)

    @property
    def runs_in(self) -> str:
        """The folder that the tasks run in, on the cluster."""
        flag = "--container-workdir=" if self.container_image else "--chdir="
        given = [shlex.split(each)[0].removeprefix(flag) for each in self.srun_args or () if each.startswith(flag)]
        return given[-1] if given else f"{self.folder}/code"

    def at_home(self, text: str) -> str:
        """Return a script with the job's folder in place of NeMo-Run's name for it, which containers alone know."""
        return text if self.container_image else _RUNDIR.sub(lambda found: self.folder, text)

    def script_head(self, variables: Mapping[str, str]) -> str:
        """Return the shell lines that run before srun.

        They stand in NeMo-Run's own script as its `setup_lines`. They set the variables that slurm_job.sh reads, which
        ends them: it replaces `srun` by a function of its own and sets the traps, so that what follows in the template
        (srun, its restarts, the exit) is carried out, but decides nothing.

        Args:
            variables: those of the job's environment, by their names.
        """
        inside = f"/{RUNDIR_NAME}" if self.container_image else self.folder  # the job's folder as the tasks see it
        job, code = shlex.quote(inside), f"{inside}/code"
        folders = import_folders(code) if isinstance(self.packager, CodeSnapshot) else [code]
        lines = [
            "{ set +vx; } 2>/dev/null",  # the template's `set -evx` would print the values of secrets
            "unset SLURM_EXPORT_ENV",  # with `export=NONE` srun would hand on nothing of what follows
            *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
            # Two names of one folder: `$job` is where this script finds it, `job` where the tasks do, in a container.
            f"job={shlex.quote(self.folder)} jobs_behind=${{1:-0}}",
            # Of a chain the next job goes on; one that requeued itself would run beside it.
            f"comes_back={int(self.comes_back and self.chain == 1)}",
            f"max_restarts={self.retries} preempt_seconds={self.preempt_seconds}",
            f"marker=$job/{MARKER_PREFIX}$SLURM_JOB_ID refusal=$job/{REFUSAL_PREFIX}$SLURM_JOB_ID",
            *self._chain_lines(),
            # Of sbatch's --cpus-per-task srun makes nothing by itself, since Slurm 22.05.
            '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',
            HEAD_ADDRESS,
            f"export {MARKER}={job}/{MARKER_PREFIX}$SLURM_JOB_ID {REFUSAL}={job}/{REFUSAL_PREFIX}$SLURM_JOB_ID",
            f"export PYTHONSAFEPATH=1 PYTHONPATH={python_path(*folders)}",
            *([f"export PATH={shlex.quote(self.python_folder)}:$PATH"] if self.python_folder else []),
            f"export {EXPERIMENT}={self.experiment_id} WANDB_RESUME=allow",
            f"export WANDB_RUN_ID=${{WANDB_RUN_ID:-{self.experiment_id}}}",
            *(['. "$job/secrets.env"'] if self.secrets else []),
            *self.setup,
            *([self.setup_lines] if self.setup_lines else []),
            ENDING,  # last: the user's lines run before its traps are set
        ]
        return "\n".join(lines)

    def _chain_lines(self) -> list[str]:
        if self.chain == 1:
            return []
        ended = 'echo "job exited with code {0}"; exit {0}'  # as the template says it: `_from_log` reads it
        return [
            f'[ -e "$job/finished" ] && {{ echo "an earlier job of the chain finished the run"; {ended.format(0)}; }}',
            f'[ -e "$job/failed" ] && {{ echo "an earlier job of the chain failed"; {ended.format(1)}; }}',
        ]


class SlurmJobScheduler(SlurmTunnelScheduler):
    """NeMo-Run's scheduler for Slurm; it treats a SlurmJob as described there, and other executors as ever."""

    def _submit_dryrun(self, app: AppDef, cfg: Any) -> AppDryRunInfo:
        # Here and not earlier: only now are the tunnel, the folder and the experiment's id known.
        if isinstance(cfg, SlurmJob):
            self._initialize_tunnel(cfg.tunnel)
            cfg.tunnel = self.tunnel
            if cfg.preempt_seconds is None:
                cfg.give_time_to_save(None)
            # TorchX takes `$` for the beginning of a macro, and makes it of `$$`.
            cfg.env_vars = as_literals(cfg.env_vars)
            roles = [
                replace(role, args=[with_our_runner(each) for each in role.args], env=as_literals(role.env))
                for role in app.roles
            ]
            app = replace(app, roles=roles)
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
        sbatch = [*outside_jobs(tunnel), SBATCH, "--parsable", *_directives(dryrun_info.request.materialize())]
        waits_for = (job.additional_parameters or {}).get("dependency")
        first = [f"{job.dependency_type}:{':'.join(job.parse_deps())}"] if job.dependencies else []
        # Before the secrets are written: nothing is left behind by a job that Slurm could never run.
        _check_that_it_can_ever_run(tunnel, [*sbatch, "--test-only", script])
        ids: list[str] = []
        try:
            _write_secrets(tunnel, job)
            for behind in reversed(range(job.chain)):  # each job is told how many come after it
                # What sbatch is given here stands in place of the script's own.
                after = [*([waits_for] if waits_for else []), *([f"afterany:{ids[-1]}"] if ids else first)]
                requeue = "--requeue" if job.may_requeue else "--no-requeue"
                dependency = [f"--dependency={','.join(after)}"] if after else []
                ids.append(_submit(tunnel, [*sbatch, requeue, *dependency, script, str(behind)]))
            _check_limit(tunnel, ids[0], job.preempt_seconds or 0)
            for job_id in ids:
                _save_job_dir(job_id, job.job_dir, tunnel, job.job_details.ls_term)
            Path(job.job_dir, "slurm_jobs.json").write_text(json.dumps(ids))
            if isinstance(tunnel, SSHTunnel):
                Path(job.job_dir, REACHED_FILE).write_text(json.dumps(_how_reached(tunnel, job, ids)))
        # Also Ctrl-C: neither half a chain nor jobs that nobody knows of must stay in the queue.
        except BaseException:
            if ids:
                tunnel.run(f"scancel {' '.join(ids)}", warn=True)
            _remove_secrets(tunnel, job.folder)
            raise
        return ids[-1]

    def _cancel_existing(self, app_id: str) -> None:
        known = _get_job_dirs().get(app_id)
        if known is None:
            return
        folder, tunnel, _ = known
        self._initialize_tunnel(tunnel)
        done = self.tunnel.run(f"scancel {' '.join(_jobs_of_chain(folder, app_id))}", warn=True)
        if not done.ok and (refused := [line for line in done.stderr.splitlines() if line and not _OVER.search(line)]):
            raise CptError(f"Slurm did not cancel it. {refused[-1]}")
        _remove_secrets(self.tunnel, _folder_there(tunnel, folder))  # a job that has started has read them

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Return a job's state: from scontrol, which needs no accounting database, then from sacct, then from its log.

        NeMo-Run asks sacct alone, and cancels a job after 30 failures: every job of a cluster without a database.
        """
        known = _get_job_dirs().get(app_id)
        if known is None:
            return None
        folder, tunnel, _ = known
        self._initialize_tunnel(tunnel)
        there = _folder_there(tunnel, folder)
        found = _from_scontrol(self.tunnel, app_id)
        # sacct is asked only where a database answers it; without one it fails for every job.
        if found is None and self.tunnel.run("sacct --version && sacct -n -j 1", warn=True).ok:
            return super().describe(app_id)
        state, name, code = found or _from_log(self.tunnel, there, app_id)
        if code == StoppedEarlyError.exit_code:  # over SSH the job's own marker is on another machine
            Path(folder, f"{MARKER_PREFIX}{app_id}").touch()
        if is_terminal(state) and not any(map(self._is_underway, _jobs_of_chain(folder, app_id))):
            _remove_secrets(self.tunnel, there)  # of a job that was cancelled before it started
        role = name.rpartition(".")[2] or Path(folder).name
        return DescribeAppResponse(app_id=app_id, roles=[Role(name=role, image="", num_replicas=1)], state=state)

    def _is_underway(self, app_id: str) -> bool:
        found = _from_scontrol(self.tunnel, app_id)
        return found is not None and found[0] in (*UNDERWAY, AppState.UNKNOWN)


def write_as_given() -> None:
    """Let a SlurmJob's scripts have variables and paths as they were given.

    NeMo-Run writes variables with upper-case names, `$` for `$$` and no quotes, and the job's folder in place of every
    `/nemo_run`, also in `/scratch/nemo_run` and `/nemo_runs`.
    """
    from nemo_run.config import Script
    from nemo_run.core.execution import slurm as upstream

    materialize: Callable[..., str] = SlurmBatchRequest.materialize
    to_command: Callable[..., list[str]] = Script.to_command

    @wraps(materialize)
    def materialize_as_given(request: Any) -> str:
        job = request.executor
        if not isinstance(job, SlurmJob):
            return materialize(request)
        # A copy: whoever has the executor may submit it again. The variables stand in the head.
        plain = replace(request, extra_env={}, executor=copy(job))
        plain.executor.env_vars = {}
        plain.executor.setup_lines = job.script_head(job.env_vars | request.extra_env)
        plain.executor.signal = job.signal or (f"TERM@{job.preempt_seconds}" if job.preempt_seconds else None)
        if job.container_image:
            return materialize(plain)
        upstream.RUNDIR_NAME = "\0"  # which is in no script
        try:
            return job.at_home(materialize(plain))
        finally:
            upstream.RUNDIR_NAME = RUNDIR_NAME

    @wraps(to_command)
    def to_command_as_given(script: Any, *args: Any, substitute_rundir_path: str | None = None, **named: Any) -> Any:
        if script.inline and substitute_rundir_path is not None:
            script = replace(script, inline=_RUNDIR.sub(lambda found: substitute_rundir_path, script.inline))
        return to_command(script, *args, **named)

    SlurmBatchRequest.materialize = materialize_as_given
    Script.to_command = to_command_as_given


def create_scheduler(session_name: str, **kwargs: Any) -> SlurmJobScheduler:
    """TorchX's factory of the scheduler."""
    return SlurmJobScheduler(session_name=session_name, experiment=kwargs.pop("experiment", None))


def outside_jobs(tunnel: Tunnel) -> list[str]:
    """What runs sbatch without the variables of a job that this process is in: they would count for the new one's."""
    if isinstance(tunnel, SSHTunnel) or "SLURM_JOB_ID" not in os.environ:
        return []
    of_slurm = [name for name in os.environ if name.startswith(("SLURM_", "SRUN_")) and name not in OUTSIDE_JOBS]
    # A run of W&B's that its user chose stands; the one of the job that this process is in is not the new job's.
    of_ours = [EXPERIMENT] if EXPERIMENT in os.environ else []
    of_ours += ["WANDB_RUN_ID"] if os.environ.get("WANDB_RUN_ID") == os.environ.get(EXPERIMENT) else []
    return ["env", *(f"--unset={name}" for name in of_slurm + of_ours)]


def _directives(script: str) -> list[str]:
    """A script's directives as sbatch's options: a user's SBATCH_PARTITION and its like win over those in a script."""
    lines = (line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH "))
    return [word for line in lines for word in shlex.split(line)]


def _submit(tunnel: Tunnel, command: list[str]) -> str:
    try:
        # --parsable: the id alone, with the cluster's name behind a semicolon.
        said = tunnel.run(shlex.join(command)).stdout
        return str(said).strip().partition(";")[0]
    except invoke.exceptions.UnexpectedExit as error:
        said = error.result.stderr.strip()
        if error.result.return_code == 127:
            said = f"sbatch not found on {tunnel.host}: submit from a login node, or give slurm(tunnel=ssh(...))"
        raise CptError(f"Slurm did not take the job. {said}") from error


def _check_limit(tunnel: Tunnel, job_id: str, preempt_seconds: int) -> None:
    """Refuse a limit, the partition's own perhaps, within which the tasks would be told to stop at their start."""
    shown = _shown(tunnel, job_id) or [{}]  # Slurm's controller may be busy
    limit = window.seconds_of(shown[0].get("TimeLimit"))
    if limit is not None and limit <= preempt_seconds:
        raise CptError(
            f"the job's time limit is {limit} s, and its tasks would be told to stop {preempt_seconds} s before it: "
            "give slurm() more time, or fewer preempt_seconds"
        )


def _check_that_it_can_ever_run(tunnel: Tunnel, command: list[str]) -> None:
    """Slurm queues a job that no node can ever hold, unless the cluster sets EnforcePartLimits."""
    said = tunnel.run(shlex.join(command), warn=True).stderr.strip()
    # Slurm's words for a job that fits no node; its other refusals may pass, such as that of a partition that is down.
    if "node configuration is not available" in said:
        raise CptError(f"Slurm could never run the job: more nodes, tasks, GPUs or memory than there are. {said}")


def _how_reached(tunnel: SSHTunnel, job: SlurmJob, ids: list[str]) -> dict[str, Any]:
    """For `nemo-cpt watch`, which does not import NeMo-Run."""
    way = {"host": tunnel.host, "user": tunnel.user, "port": tunnel.port or 22, "identity": tunnel.identity}
    return way | {"runs_in": job.runs_in, "jobs": ids}


def _write_secrets(tunnel: Tunnel, job: SlurmJob) -> None:
    if not job.secrets:
        return
    path = os.path.join(job.folder, SECRETS_FILE)
    if not isinstance(tunnel, SSHTunnel):
        return write_secrets(Path(path), job.secrets)
    # The empty file first, with its mode: `put` keeps that of a file that exists.
    tunnel.run(f"umask 077 && rm -f {shlex.quote(path)} && : > {shlex.quote(path)}")
    tunnel.session.put(io.StringIO(secrets_file(job.secrets)), remote=path)


def _remove_secrets(tunnel: Tunnel, folder: str) -> None:
    tunnel.run(f"rm -f {shlex.quote(os.path.join(folder, SECRETS_FILE))}", warn=True)


def _folder_there(tunnel: Tunnel, folder: str) -> str:
    """A job's folder on the cluster, by the one here."""
    return os.path.join(tunnel.job_dir, Path(folder).name)


def _jobs_of_chain(folder: str, app_id: str) -> list[str]:
    record = Path(folder, "slurm_jobs.json")
    return json.loads(record.read_text()) if record.is_file() else [app_id]


def _from_scontrol(tunnel: Tunnel, app_id: str) -> tuple[AppState, str, int] | None:
    """State, name and exit code of a job that Slurm remembers; of an array, what is under way, then what failed."""
    shown = _shown(tunnel, app_id)
    if shown is None:
        # The log would tell of an earlier start's end.
        return AppState.UNKNOWN, "", 0
    jobs = [(_app_state(facts.get("JobState", "")), facts) for facts in shown]
    order = (*UNDERWAY, AppState.FAILED, AppState.CANCELLED)
    # An array has one state for us: running while any of it runs, failed if any failed.
    jobs.sort(key=lambda job: order.index(job[0]) if job[0] in order else len(order))
    if not jobs:
        return None
    # "0:15": the exit code, and behind the colon the signal.
    state, facts = jobs[0]
    return state, facts.get("JobName", ""), int(facts.get("ExitCode", "0").partition(":")[0])


def _shown(tunnel: Tunnel, app_id: str) -> list[dict[str, str]] | None:
    """What `scontrol show job` has, of an array a dict for each task; empty for a job that Slurm has forgotten.

    None where Slurm's controller does not answer, as while it is started again.
    """
    shown = tunnel.run(f"scontrol show job -o {app_id}", warn=True)
    if shown.return_code not in (0, 127) and "Invalid job id" not in shown.stderr:
        return None
    jobs = [dict(pair.partition("=")[::2] for pair in line.split(" ")) for line in shown.stdout.splitlines()]
    return [facts for facts in jobs if "JobId" in facts]


def _app_state(slurm_state: str) -> AppState:
    # TorchX does not know these: the job is there, and may go on.
    if slurm_state in ("COMPLETING", "CONFIGURING", "STAGE_OUT", "STOPPED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        return AppState.RUNNING
    return SLURM_STATES.get(slurm_state, AppState.UNKNOWN)


def _from_log(tunnel: Tunnel, folder: str, app_id: str) -> tuple[AppState, str, int]:
    """What the log says last of a job's end; Slurm forgets a job some minutes after it (MinJobAge)."""
    # A log for each task of an array, of which one that failed counts; the last line of each, over its starts.
    logs = f"{shlex.quote(folder)}/sbatch_*_{app_id}.out {shlex.quote(folder)}/sbatch_*_{app_id}_*.out"
    last = f"""{{ echo "no end"; grep -hE {shlex.quote(_END)} "$log"; }} | tail -1"""
    known = f"[ -d {shlex.quote(folder)} ] && command -v scontrol >/dev/null && echo forgotten"
    said = tunnel.run(f'for log in {logs}; do [ ! -e "$log" ] || {last}; done; {known}', warn=True).stdout.splitlines()
    forgotten = "forgotten" in said  # else nobody asked Slurm, and a job without an end may be under way
    ends = [line for line in said if line != "forgotten"]
    codes = [int(line.split()[-1]) for line in ends if line.startswith("job exited")]
    if any(codes):
        return AppState.FAILED, "", max(codes)
    if ends and len(ends) == len(codes):
        return AppState.SUCCEEDED, "", 0
    if not forgotten:
        return AppState.UNKNOWN, "", 0
    # A cancelled job that had not begun has no log; one that was killed with its script has one without an end.
    return (AppState.FAILED if "no end" in ends else AppState.CANCELLED), "", 0
