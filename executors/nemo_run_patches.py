"""Patches of NeMo-Run's defects, each a function named for what it mends; `apply` puts all of them in place.

Seen in nemo_run 0.11.1. Each has a test that fails when NeMo-Run no longer needs it.
"""

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from enum import Enum, EnumType
from functools import cache, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from nemo_cpt.corpus.atomic_files import write_whole
from nemo_cpt.errors import CptError, StoppedEarlyError, exit_with_the_message
from nemo_cpt.executors import examination, pods, stopping, window
from nemo_cpt.executors.environment import check_for_shells
from nemo_cpt.executors.supervisor import MARKER_PREFIX, TIME_TO_SAVE
from nemo_cpt.output import say
from nemo_cpt.planning.save_window import window_within

LOG_LINES = 25
# By name, since importing every engine's exceptions takes seconds, and not all are installed.
ENGINES = ("docker", "kubernetes", "requests", "sky", "urllib3")  # packages whose exceptions are an engine's refusal
_RECIPE = re.compile(r" for <(Partial|Config)\[.*", re.DOTALL)  # over many lines
_MESSAGE = re.compile(r"(\[default\d+\]:)?nemo_cpt: ")  # how a CptError ends a task, also under torchrun


@cache
def apply() -> None:
    """Put every patch in place, once a process.

    Raises:
        CptError: within a `with run.Experiment(...)` block that began without them.
    """
    surround_experiments()
    _check_that_none_began_before()
    exit_with_the_message()
    examination.examine_before_launch()
    stopping.supervise_local_jobs()
    stopping.supervise_containers()
    stopping.supervise_cloud_jobs()
    stopping.wait_until_saved()
    stopping.let_containers_save()
    admit_slurm_job()
    keep_the_list_of_local_jobs_whole()
    say_why_ssh_fails()
    say_why_nothing_is_written()
    say_why_a_job_is_not_taken()
    say_why_a_job_is_not_cancelled()
    copy_links_over_ssh()
    leave_stdin_alone()
    print_dry_runs_as_they_are()
    pods.find_configs()
    pods.ship_code()
    pods.quote_variables()
    pods.supervise_jobs()
    pods.show_manifests()


@cache
def surround_experiments() -> None:
    """Put in place what begins and ends with an experiment: Python looks both up when its block begins."""
    # Each is put around what is there, so that the first stands innermost.
    stopping.pass_signals_on()
    stopping.print_on_without_readers()
    start_nothing_behind_a_failure()
    count_every_task_of_a_group()
    raise_when_a_task_failed()


def _check_that_none_began_before() -> None:
    from nemo_run.run.experiment import _current_experiment

    began = _current_experiment.get(None)
    # Without a token it did not begin, but was asked for its status.
    if began is not None and began._current_experiment_token and not stopping.is_surrounded(began):
        raise CptError(
            f"the experiment {began._title} began before an executor of nemo_cpt was made or a recipe imported, and "
            "would end well although a task fails: make one ahead of the block, executor = local(), then "
            "`with run.Experiment(...)`"
        )


def give_time_to_save(executor: Any, needed: Callable[[], int | None]) -> None:
    """Let jobs be told early enough ahead of their end, and be killed late enough when cancelled.

    What the user said of it stands.

    Args:
        executor: any; Slurm and Kubernetes end jobs by themselves, local ones and containers are cancelled from here.
        needed: called where it is wanted; returns the seconds, None where they are not known.
    """
    from nemo_run import DockerExecutor, LocalExecutor
    from nemo_run.core.execution.kubeflow import KubeflowExecutor

    from nemo_cpt.executors.slurm_job import SlurmJob  # imports NeMo-Run

    if isinstance(executor, LocalExecutor | DockerExecutor) and TIME_TO_SAVE not in executor.env_vars:
        seconds = needed()
        executor.env_vars |= {TIME_TO_SAVE: str(seconds)} if seconds else {}
    elif isinstance(executor, SlurmJob) and executor.preempt_seconds is None:
        executor.give_time_to_save(needed())
    elif isinstance(executor, KubeflowExecutor) and executor.pod_spec_overrides.get(stopping.GRACE) is None:
        executor.pod_spec_overrides = executor.pod_spec_overrides | {stopping.GRACE: window_within(None, needed())}


def raise_when_a_task_failed() -> None:
    """Make an experiment whose task failed raise CptError on exit.

    NeMo-Run prints the state and goes on, so that scripts end with exit code 0
    (https://github.com/NVIDIA-NeMo/Run/issues/289).
    """
    from nemo_run.run.experiment import Experiment

    leave: Callable[..., Any] = Experiment.__exit__

    @wraps(leave)
    def leave_and_raise(experiment: Any, kind: Any, error: Any, trace: Any) -> None:
        leave(experiment, kind, error, trace)
        # An exception of the block's own is on its way already; a detached job is nobody's to wait for.
        if kind is None and experiment._launched and not getattr(experiment, "detach", False):
            raise_for_states(experiment)

    Experiment.__exit__ = leave_and_raise


def start_nothing_behind_a_failure() -> None:
    """Leave alone what depends on a task that did not succeed; NeMo-Run starts it on whatever that one has left.

    Slurm itself has such jobs end; elsewhere NeMo-Run waits for a task's end, however that was, and starts the next.
    """
    from nemo_run.run.experiment import Experiment

    run_in_order: Callable[..., None] = Experiment._run_dag

    @wraps(run_in_order)
    def run_what_may_start(experiment: Any, detach: bool, tail_logs: bool, executors: set[Any]) -> None:
        if not executors <= set(experiment._DEPENDENCY_SUPPORTED_EXECUTORS):
            for job in experiment.jobs:
                needed = [each for each in experiment.jobs if each.id in job.dependencies]
                job.launch = _unless_one_failed(job, needed, job.launch)
        run_in_order(experiment, detach, tail_logs, executors)

    Experiment._run_dag = run_what_may_start


def _unless_one_failed(job: Any, needed: list[Any], launch: Callable[..., None]) -> Callable[..., None]:
    def launch_behind(*args: Any, **kwargs: Any) -> None:
        # By now each of them has ended, or was left alone itself.
        if failed := [each.id for each in needed if each.state.name != "SUCCEEDED"]:
            return print(f"nemo_cpt: task {job.id} is not started: it waits for {', '.join(failed)}", flush=True)
        launch(*args, **kwargs)

    return launch_behind


def count_every_task_of_a_group() -> None:
    """Let a group that one task of failed have failed.

    NeMo-Run takes the first one's state for the group's, and of a local group the last one's for everybody's.
    """
    from nemo_run.run.job import JobGroup
    from nemo_run.run.torchx_backend.schedulers.local import PersistentLocalScheduler
    from torchx.schedulers.local_scheduler import LocalScheduler

    describe: Callable[..., Any] = PersistentLocalScheduler.describe
    of_the_first: Any = JobGroup.state

    def state(group: Any) -> Any:
        first = of_the_first.fget(group)
        return next((each for each in group.states if each.name != "SUCCEEDED"), first) if group.handles else first

    @wraps(describe)
    def describe_itself(scheduler: Any, app_id: str) -> Any:
        found = describe(scheduler, app_id)  # which ends a group with the first task that ends
        return LocalScheduler.describe(scheduler, app_id) or found

    JobGroup.state, PersistentLocalScheduler.describe = property(state), describe_itself


def keep_the_list_of_local_jobs_whole() -> None:
    """Let a launcher that is killed leave NeMo-Run's list of all local jobs, which it empties before it writes it."""
    from nemo_run.run.torchx_backend.schedulers import local

    def save(apps: dict[str, Any]) -> None:
        path = Path(local.LOCAL_JOB_DIRS)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file of its own: the list is replaced, and a lock on the old one would keep nobody out.
        with open(f"{path}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                known = json.loads(path.read_bytes())
            except (OSError, ValueError):
                known = {}
            own = {key: (app.state.name, app.id, app.log_dir, list(app.role_replicas)) for key, app in apps.items()}
            write_whole(path, json.dumps(known | own).encode())

    local._save_job_dir = save


def admit_slurm_job() -> None:
    """Let NeMo-Run run our extension of its SlurmExecutor, which it looks up by exact class, and fit tasks to it.

    The extension mends: jobs cancelled on clusters without an accounting database, jobs that do not come back after
    preemption, `--requeue` that cannot be turned off, secrets and unquoted values in the script.
    """
    import nemo_run as run
    from nemo_run.run.experiment import Experiment
    from nemo_run.run.torchx_backend.schedulers import slurm as scheduler
    from nemo_run.run.torchx_backend.schedulers.api import EXECUTOR_MAPPING

    from nemo_cpt.executors.slurm_job import SlurmJob, create_scheduler, write_as_given

    write_as_given()
    # NeMo-Run looks up `type(executor)`: a subclass is unknown to it.
    EXECUTOR_MAPPING[SlurmJob] = "slurm_tunnel"
    scheduler.create_scheduler = create_scheduler
    for kind in ("PARALLEL", "DETACH", "DEPENDENCY"):
        name = f"_{kind}_SUPPORTED_EXECUTORS"
        setattr(Experiment, name, (*getattr(Experiment, name), SlurmJob))
    add: Callable[..., str] = Experiment._add_single_job

    @wraps(add)
    def fit_and_add(experiment: Any, task: Any, executor: Any, name: str = "", *args: Any, **kwargs: Any) -> str:
        if not isinstance(executor, run.LocalExecutor):
            where = os.path.join(experiment._exp_dir, name)
            check_for_shells(where, "name the task and its experiment otherwise, or set NEMORUN_HOME to another folder")
        if hasattr(task, "clone"):
            # The caller's own may be launched again, or printed: it stays as it was written.
            task, executor = task.clone(), executor.clone()
            stopping.save_on_sigterm(task)
        if isinstance(executor, SlurmJob):
            executor.fit(task)
        give_time_to_save(executor, lambda: window.seconds_to_save(task))
        return add(experiment, task, executor, name, *args, **kwargs)

    Experiment._add_single_job = fit_and_add


def say_why_ssh_fails() -> None:
    """Raise CptError where NeMo-Run's SSH tunnel ends the process without a word, or with a traceback."""
    import paramiko
    from nemo_run.core.tunnel.client import SSHTunnel

    authenticate: Callable[..., None] = SSHTunnel._authenticate

    @wraps(authenticate)
    def authenticate_or_say(tunnel: Any) -> None:
        where = f"SSH to {tunnel.user}@{tunnel.host}, port {tunnel.port or 22}"
        try:
            authenticate(tunnel)
        # NeMo-Run calls exit(1) where no authentication succeeds.
        except SystemExit as error:
            raise CptError(f"{where}: neither the key {tunnel.identity} nor a password was accepted") from error
        except (OSError, paramiko.SSHException) as error:
            raise CptError(f"{where}: {error}") from error

    SSHTunnel._authenticate = authenticate_or_say


def say_why_nothing_is_written() -> None:
    """Raise CptError where NeMo-Run's folder cannot be written, which ends in a traceback."""
    from nemo_run.run.experiment import Experiment

    prepare: Callable[..., None] = Experiment._prepare

    @wraps(prepare)
    def prepare_or_say(experiment: Any, *args: Any, **kwargs: Any) -> None:
        try:
            prepare(experiment, *args, **kwargs)
        except OSError as error:
            if isinstance(error, FileExistsError):
                raise
            raise CptError(
                f"{experiment._exp_dir}, where NeMo-Run writes what a job needs, cannot be written ({error}); "
                "NEMORUN_HOME names another place"
            ) from error

    Experiment._prepare = prepare_or_say


def say_why_a_job_is_not_taken() -> None:
    """Raise CptError with an engine's own words where it refuses a job, which ends in a traceback."""
    from nemo_run.run.torchx_backend.schedulers.docker import PersistentDockerScheduler
    from nemo_run.run.torchx_backend.schedulers.kubeflow import KubeflowScheduler
    from nemo_run.run.torchx_backend.schedulers.skypilot import SkypilotScheduler

    def saying(engine: str, schedule: Callable[..., str]) -> Callable[..., str]:
        @wraps(schedule)
        def schedule_or_say(*args: Any, **kwargs: Any) -> str:
            try:
                return schedule(*args, **kwargs)
            except Exception as error:
                of_engine = type(error).__module__.partition(".")[0] in ENGINES
                if not of_engine and not isinstance(error, OSError | RuntimeError | subprocess.CalledProcessError):
                    raise
                # Engines break their lines for terminals; a message is one.
                raise CptError(f"{engine} did not take the job: {' '.join(str(error).split())}") from error

        return schedule_or_say

    schedulers: tuple[Any, ...] = (PersistentDockerScheduler, KubeflowScheduler, SkypilotScheduler)
    for scheduler, engine in zip(schedulers, ("Docker", "Kubernetes", "SkyPilot"), strict=True):
        scheduler.schedule = saying(engine, scheduler.schedule)


def say_why_a_job_is_not_cancelled() -> None:
    """Raise CptError where a job could not be cancelled, of which NeMo-Run prints a traceback, and ends well."""
    from nemo_run.run.experiment import Experiment

    cancel: Callable[..., None] = Experiment.cancel

    def noting(refusals: list[Exception], cancel_job: Callable[..., None]) -> Callable[..., None]:
        @wraps(cancel_job)
        def cancel_or_note(*args: Any, **kwargs: Any) -> None:
            try:
                cancel_job(*args, **kwargs)
            except Exception as error:
                refusals.append(error)

        return cancel_or_note

    @wraps(cancel)
    def cancel_or_say(experiment: Any, job_id: str) -> None:
        refusals: list[Exception] = []
        for job in experiment.jobs:
            if job.id == job_id:
                job.cancel = noting(refusals, job.cancel)
        cancel(experiment, job_id)
        for error in refusals:
            said = error.message if isinstance(error, CptError) else f"{type(error).__name__}: {error}"
            raise CptError(f"{job_id} was not cancelled: {said}") from error

    Experiment.cancel = cancel_or_say


def copy_links_over_ssh() -> None:
    """Let links of the shipped code reach a cluster, which rsync leaves out without a word; say why it fails."""
    import invoke
    from nemo_run.run import experiment as module

    copy: Callable[..., None] = module.rsync

    @wraps(copy)
    def copy_or_say(session: Any, source: str, target: str, **how: Any) -> None:
        try:
            copy(session, source, target, **({"rsync_opts": "--links"} | how))
        except invoke.exceptions.UnexpectedExit as error:
            said = error.result.stderr.strip()
            raise CptError(
                f"the job cannot be copied to {session.host}, into {target}: {said}. rsync and ssh are needed on both "
                "machines, and ssh(job_dir=...) names a folder that can be written there"
            ) from error

    module.rsync = copy_or_say


def leave_stdin_alone() -> None:
    """Let the commands that NeMo-Run starts not read what is its caller's: the rest of a `while read` loop's list."""
    import invoke

    contexts: Any = invoke.Context
    start: Callable[..., Any] = contexts._run

    @wraps(start)
    def start_without_stdin(context: Any, runner: Any, command: str, **named: Any) -> Any:
        return start(context, runner, command, **({"in_stream": False} | named))

    contexts._run = start_without_stdin


def print_dry_runs_as_they_are() -> None:
    """Print what a dry run would submit as it would be submitted.

    NeMo-Run's console indents the batch script and breaks its lines to the terminal's width, 80 columns without one.
    """
    from nemo_run.run.torchx_backend import launcher  # which writes nothing else to it

    launcher.CONSOLE = SimpleNamespace(log=print)


@cache
def parse_what_fields_hold() -> None:
    """Let NeMo-Run's command line take values of annotations that it does not know ("Unsupported type").

    - `str | None`; it knows Optional[str] only. Where a parameter takes text and numbers, such as a trainer's devices,
      text that is a whole number becomes one: NeMo-Run tries the kinds in their order, and everything is text.
    - An enum's members and PyTorch's dtypes by their names: `model.config.attention_backend=fused`.
    - Annotations that are text, as those of NeMo's LoRA are: `peft.alpha=64`.
    - Lists of words without quotes, as recipes' parameters take them: `peft.target_modules=[linear_qkv]`.
    """
    import typing
    from types import UnionType

    from nemo_run.cli.cli_parser import ParseError, TypeParser, type_parser

    parse: Callable[..., Any] = TypeParser.parse_union
    parse_items: Callable[..., Any] = TypeParser.parse_list
    refuse: Callable[..., Any] = TypeParser.parse_unknown

    @wraps(parse)
    def parse_union(parser: Any, text: str, annotation: Any) -> Any:
        if {str, int} <= set(get_args(annotation)):
            with contextlib.suppress(ParseError):
                return parser.parse(text, int)
        return parse(parser, text, annotation)

    @wraps(parse_items)
    def parse_list(parser: Any, text: str, annotation: Any) -> Any:
        if words := re.fullmatch(r"\[\s*([\w.*]+(?:\s*,\s*[\w.*]+)*)\s*\]", text):
            text = repr([each.strip() for each in words[1].split(",")])
        return parse_items(parser, text, annotation)

    @wraps(refuse)
    def parse_unknown(parser: Any, text: str, annotation: Any) -> Any:
        torch = sys.modules.get("torch")  # there by now, if anything is annotated with what it has
        if isinstance(annotation, str):
            with contextlib.suppress(NameError):
                return parser.parse(text, eval(annotation, vars(typing) | {"torch": torch}))
        name = text.rpartition(".")[2]  # as a config is printed: AttnBackend.fused, torch.bfloat16
        if isinstance(annotation, EnumType):
            if name not in annotation.__members__:
                raise ParseError(text, annotation, f"give one of {', '.join(annotation.__members__)}")
            return annotation[name]
        if torch and annotation is torch.dtype and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return refuse(parser, text, annotation)

    TypeParser.parse_union, TypeParser.parse_list, TypeParser.parse_unknown = parse_union, parse_list, parse_unknown
    type_parser.parsers[UnionType] = type_parser.parse_union


def write_what_fields_hold() -> None:
    """Let NeMo-Run's YAML hold an enum's member, by the name that `parse_what_fields_hold` reads.

    NeMo-Run ends with "cannot represent an object" at `model.config.attention_backend`.
    """
    import yaml

    yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_str(member.name))


@cache
def say_which_argument_is_wrong() -> None:
    """Let `nemo llm ...` say which argument it refuses, and why; NeMo-Run prints the whole recipe around that, twice.

    Of a value of a wrong type it also takes the argument for the type: it raises such errors a second time with the
    arguments of another constructor.
    """
    from nemo_run.cli.cli_parser import CLIException, ParseError

    make_parse_error: Callable[..., None] = ParseError.__init__

    def make(error: Any, message: str, argument: str, context: dict[str, Any]) -> None:
        error.arg, error.context = argument, context
        Exception.__init__(error, f"{argument}: {re.sub(_RECIPE, '', message)}")

    def make_again(error: Any, value: str, expected: Any, reason: Any) -> None:
        if isinstance(reason, dict):  # value: what was said the first time
            make(error, value, expected, reason)
        else:
            make_parse_error(error, value, expected, reason)

    CLIException.__init__, ParseError.__init__ = make, make_again


@cache
def examine_dry_runs() -> None:
    """Let `nemo llm ... --dryrun` end with what would refuse the launch; NeMo-Run prints the config, and ends well."""
    import nemo_run
    from nemo_run.cli.api import RunContext

    execute: Callable[..., None] = RunContext._execute_task
    show: Callable[..., None] = nemo_run.dryrun_fn

    @wraps(execute)
    def execute_and_examine(context: Any, *args: Any) -> None:
        shown: list[tuple[Any, Any]] = []

        def show_and_note(task: Any, executor: Any = None, build: bool = False) -> None:
            show(task, executor, build)
            shown.append((task, executor))

        # There alone is the task known, after its arguments were read.
        nemo_run.dryrun_fn = show_and_note
        try:
            execute(context, *args)
        finally:
            nemo_run.dryrun_fn = show
        for task, executor in shown if context.dryrun else ():  # a launch is examined when it starts
            examination.examine_task(task, examination.place_of(executor))

    RunContext._execute_task = execute_and_examine


@cache
def end_with_our_exit_codes() -> None:
    """Let `nemo ...` end with a CptError's words and its exit code; NeMo-Run calls it unexpected, and ends with 1."""
    from nemo_run.cli.api import RunContext

    execute: Callable[..., None] = RunContext.cli_execute

    @wraps(execute)
    def execute_and_end(*args: Any, **named: Any) -> None:
        try:
            execute(*args, **named)
        except CptError as error:
            say(f"nemo_cpt: {error.message}", sys.stderr)
            sys.exit(error.exit_code)  # no Exception, which NeMo-Run would catch

    RunContext.cli_execute = execute_and_end


def raise_for_states(experiment: Any) -> None:
    """Raise CptError for the tasks of a finished experiment that did not succeed, with their logs' last lines.

    StoppedEarlyError where all that were started were told to stop, and saved.
    """
    unfinished = [job for job in experiment.jobs if job.state.name != "SUCCEEDED"]
    failed = [job for job in unfinished if job.launched]
    behind = [f"task {job.id} was not started" for job in unfinished if not job.launched]
    if failed and all(stopped_early(job.executor.job_dir) for job in failed):
        said = [f"task {job.id}: {last_word(job.executor.job_dir)}" for job in failed]
        raise StoppedEarlyError("\n".join(said + behind))
    if failed:
        said = [f"task {job.id} ended as {job.state.name}. {log_tail(job.executor.job_dir)}" for job in failed]
        raise CptError("\n".join(behind + said))


def stopped_early(job_dir: str) -> bool:
    """Return whether a job was told to stop, and saved, by what its supervisor left in its folder."""
    return any(Path(job_dir).rglob(f"{MARKER_PREFIX}*"))


def last_word(job_dir: str) -> str:
    """Return what a job that was stopped said of its end, as its newest log has it."""
    log = newest_log(Path(job_dir))
    said = [line for line in log.read_text(errors="replace").splitlines() if _MESSAGE.match(line)] if log else []
    return _MESSAGE.sub("", said[-1]) if said else "stopped ahead of the end, and nothing is lost"


def log_tail(job_dir: str, lines: int = LOG_LINES) -> str:
    """Return the last lines of a job's newest log under `job_dir`, headed by its path."""
    log = newest_log(Path(job_dir))
    return f"It left no log in {job_dir}" if log is None else last_lines(log, lines)


def last_lines(log: Path, lines: int = LOG_LINES) -> str:
    """Return the last lines of a log, headed by its path; of one that ends with our message, that alone."""
    printed = log.read_text(errors="replace").rstrip().splitlines()
    last = (_of_workers(printed) or printed)[-lines:]
    if last and _MESSAGE.match(last[-1]):  # it says what is wrong; what came before adds nothing
        last = last[-1:]
    return "\n".join([f"The last lines of {log}:", *(f"    {line}" for line in last)])


def _of_workers(printed: list[str]) -> list[str]:
    """The workers' lines, which torchrun prefixes, and ours: its summary comes last and hides what they said."""
    if not any(line.startswith("[default") for line in printed):
        return []
    return [line for line in printed if line.startswith(("[default", "nemo_cpt:"))]


def newest_log(job_dir: Path) -> Path | None:
    """Return the log file of a job that was written last and is not empty, or None.

    Local tasks leave `combined.log`, Slurm's `log-*.out` (the tasks) and `sbatch_*.out` (the batch script).
    """
    for pattern in ("**/combined.log", "**/log[-_]*.out", "**/sbatch_*.out", "**/std*.log"):
        logs = [path for path in job_dir.glob(pattern) if path.stat().st_size]
        if logs:
            # Patterns in order of what says most; of one pattern the newest, after restarts.
            return max(logs, key=lambda path: path.stat().st_mtime)
    return None
