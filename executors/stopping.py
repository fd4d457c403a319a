"""Jobs that save when they are told to stop, wherever they run; patches of NeMo-Run's and TorchX's defects there.

The signal's way: launcher, or `docker stop` -> `supervisor` -> the workers, whose PreemptionCallback saves at the end
of the step. Slurm signals the workers itself. A launcher that has ended is a signal, too.
"""

import contextlib
import inspect
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from nemo_cpt.executors.environment import as_literals, forget_secrets
from nemo_cpt.executors.supervisor import (
    DEFAULT_TIME_TO_SAVE,
    FROM_LAUNCHER,
    MARKER_PREFIX,
    RUNNER,
    TIME_TO_SAVE,
    seconds_to_save,
)
from nemo_cpt.output import WithoutReaders, send_nowhere
from nemo_cpt.signals import STOP_SIGNALS, Given, held, listen

GRACE = "terminationGracePeriodSeconds"  # of a pod's spec
STOPPING = "stopping; the job saves a checkpoint if it trains. Once more to end it at once"


def save_on_sigterm(task: Any) -> None:
    """Give a recipe's trainer our SaveWhenStopped, in place of NeMo's PreemptionCallback where it has that."""
    import nemo_run as run

    trainer = getattr(task, "trainer", None)
    if not isinstance(trainer, run.Config) or "callbacks" not in inspect.signature(trainer.__fn_or_cls__).parameters:
        return
    from nemo.lightning.pytorch.callbacks import PreemptionCallback

    from nemo_cpt.training.preemption import SaveWhenStopped

    callbacks = getattr(trainer, "callbacks", None) or []
    classes = [getattr(callback, "__fn_or_cls__", type(callback)) for callback in callbacks]
    if SaveWhenStopped not in classes:
        others = [each for each, kind in zip(callbacks, classes, strict=True) if kind is not PreemptionCallback]
        trainer.callbacks = [*others, run.Config(SaveWhenStopped)]


def supervise_local_jobs() -> None:
    """Start local jobs under `supervisor`: NeMo-Run ignores `retries` here, and torchrun kills a job that saves."""
    from nemo_run.run.torchx_backend.schedulers.local import PersistentLocalScheduler

    request: Callable[..., Any] = PersistentLocalScheduler._to_popen_request
    start: Callable[..., Any] = PersistentLocalScheduler._popen

    @wraps(request)
    def request_supervised(scheduler: Any, app: Any, cfg: Any) -> Any:
        for role in app.roles:
            supervise(role, sys.executable, cfg["log_dir"], cfg["retries"], launcher=os.getpid())
            role.env = as_literals(role.env)
        return request(scheduler, app, cfg)

    @wraps(start)
    def start_listening(*args: Any, **kwargs: Any) -> Any:
        # Held until the child has its own handlers: a signal between fork and exec would be lost or kill it.
        with held((*STOP_SIGNALS, FROM_LAUNCHER)):
            return start(*args, **kwargs)

    PersistentLocalScheduler._to_popen_request = request_supervised
    PersistentLocalScheduler._popen = start_listening


def supervise_containers() -> None:
    """Start Docker's jobs under `supervisor`: `docker stop` reaches only the first process, a shell that ignores it.

    Docker's init sends the signal to the shell's whole process group (TINI_KILL_PROCESS_GROUP); the shell and `tee`
    ignore it, the supervisor does not. Docker refuses its own restart policy beside NeMo-Run's `remove=True`.
    """
    from nemo_run.run.torchx_backend.schedulers.docker import PersistentDockerScheduler

    prepare: Callable[..., Any] = PersistentDockerScheduler._submit_dryrun

    @wraps(prepare)
    def prepare_supervised(scheduler: Any, app: Any, cfg: Any) -> Any:
        for role in app.roles:
            # `tee` inherits that the signal is ignored, and prints on while the job saves; the supervisor listens anew.
            supervise(role, "trap '' TERM; python", "/nemo_run", cfg.retries)
        # The supervisor restarts; Docker must not do it as well.
        cfg.retries = 0
        cfg.additional_kwargs = {"init": True} | cfg.additional_kwargs
        cfg.env_vars = {"TINI_KILL_PROCESS_GROUP": "1"} | cfg.env_vars
        return prepare(scheduler, app, cfg)

    PersistentDockerScheduler._submit_dryrun = prepare_supervised


def supervise_cloud_jobs() -> None:
    """Start SkyPilot's jobs under `supervisor`: NeMo-Run ignores `retries` there."""
    from nemo_run.run.torchx_backend.schedulers.skypilot import SkypilotScheduler

    prepare: Callable[..., Any] = SkypilotScheduler._submit_dryrun

    @wraps(prepare)
    def prepare_supervised(scheduler: Any, app: Any, cfg: Any) -> Any:
        for role in app.roles:
            # The marker is for the supervisor alone, on the same machine.
            supervise(role, "python", "/tmp", cfg.retries)
            role.env = as_literals(role.env)
        return prepare(scheduler, app, cfg)

    SkypilotScheduler._submit_dryrun = prepare_supervised


def supervise(role: Any, python: str, folder: str, max_restarts: int, launcher: int | None = None) -> None:
    """Put `supervisor` before a role's command, with its marker in `folder`, and `runner` in place of NeMo-Run's."""
    marker = f"{folder}/{MARKER_PREFIX}{role.name}"
    own = ["-m", "nemo_cpt.executors.supervisor", "--marker", marker, "--max-restarts", str(max_restarts)]
    own += ["--launcher", str(launcher)] if launcher else []
    role.args = [*own, "--", role.entrypoint, *(with_our_runner(argument) for argument in role.args)]
    role.entrypoint = python


def with_our_runner(argument: str) -> str:
    """Return `runner`'s module in place of NeMo-Run's; any other argument as it is."""
    return RUNNER if argument == "nemo_run.core.runners.fdl_runner" else argument


def pass_signals_on() -> None:
    """Let Ctrl-C, a closed terminal and signals to the launcher stop its jobs on this machine, and wait for them.

    NeMo-Run leaves them running behind a launcher that a signal ended, and on Ctrl-C waits for their end.
    """

    def listen_within(experiment: Any) -> None:
        # Python refuses handlers elsewhere: an experiment in another thread leaves signals to its caller.
        if threading.current_thread() is threading.main_thread():
            experiment._handlers_before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            given = Given()
            listen(lambda number, frame: _pass_on(experiment, number, given), STOP_SIGNALS)

    def restore(experiment: Any) -> None:
        for number, handler in getattr(experiment, "_handlers_before", {}).items():
            signal.signal(number, handler)

    _around_experiments(listen_within, restore)


def _around_experiments(before: Callable[[Any], None], after: Callable[[Any], None]) -> None:
    """Have something done ahead of each `with run.Experiment(...)` block, and something behind it, however it ends."""
    from nemo_run.run.experiment import Experiment

    enter: Callable[..., Any] = Experiment.__enter__
    leave: Callable[..., Any] = Experiment.__exit__

    @wraps(enter)
    def enter_behind(experiment: Any) -> Any:
        before(experiment)
        return enter(experiment)

    @wraps(leave)
    def leave_ahead(experiment: Any, *error: Any) -> None:
        try:
            leave(experiment, *error)
        finally:
            after(experiment)

    Experiment.__enter__, Experiment.__exit__ = enter_behind, leave_ahead


def _pass_on(experiment: Any, number: int, given: Given) -> None:
    """Tell an experiment's jobs on this machine to stop, once more at a signal's second; end where there are none."""
    first, times = not given, given.add(number)
    if number == signal.SIGHUP:
        _leave_terminal()
    if times == 0 or (not first and (times == 1 or number == signal.SIGHUP)):
        return  # a session that ends sends several kinds at once
    # Jobs on this machine: the launcher goes on waiting for them, and ends with their exit.
    if _tell_jobs(experiment):
        with contextlib.suppress(OSError):
            print(STOPPING, flush=True)
        return
    forget_secrets()
    signal.signal(number, experiment._handlers_before[number])
    signal.raise_signal(number)


def _leave_terminal() -> None:
    """Print to nowhere from now on: to write to a terminal that was closed is an error."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            send_nowhere(descriptor)


def print_on_without_readers() -> None:
    """Let a launcher whose output nobody reads any more, as behind `| head`, see its jobs to their end.

    NeMo-Run prints their logs, and ends with a traceback and exit code 1 beside jobs that are well.
    """

    def guard(experiment: Any) -> None:
        experiment._streams_before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(WithoutReaders, experiment._streams_before)

    def restore(experiment: Any) -> None:
        sys.stdout, sys.stderr = experiment._streams_before

    _around_experiments(guard, restore)


def is_surrounded(experiment: Any) -> bool:
    """Whether an experiment that has begun did so behind `print_on_without_readers`."""
    return hasattr(experiment, "_streams_before")


def _tell_jobs(experiment: Any) -> bool:
    """Signal the supervisors of an experiment's jobs on this machine; return whether there are any."""
    schedulers = experiment._runner._scheduler_instances
    local, docker = schedulers.get("local_persistent"), schedulers.get("docker_persistent")
    told = [pid for app in getattr(local, "_apps", {}).values() for pid in _running(app)]
    for pid in told:
        _tell(pid)
    requests = getattr(docker, "_scheduled_reqs", [])
    containers = [each for request in requests for each in request.get_containers(client=docker._docker_client)]
    for container in containers:
        container.kill(signal="SIGTERM")
    return bool(told or containers)


def wait_until_saved() -> None:
    """Wait for local jobs that are cancelled to save; TorchX kills them after 10 s, and not their workers."""
    from torchx.schedulers.local_scheduler import _LocalAppDef

    kill: Callable[..., None] = _LocalAppDef.kill

    @wraps(kill)
    def wait_and_kill(app: Any) -> None:
        # The supervisors alone: each passes the signal on to the workers itself.
        supervisors = list(_running(app))
        for pid in supervisors:
            if pid not in _told:  # a second signal would end it at once
                _tell(pid)
        # As long as the plan says that a checkpoint takes, not TorchX's 10 s.
        deadline = time.monotonic() + max(map(seconds_to_save, supervisors), default=0)
        while any(_running(app)) and time.monotonic() < deadline:
            time.sleep(0.2)
        kill(app)

    _LocalAppDef.kill = wait_and_kill


def let_containers_save() -> None:
    """Stop containers as `docker stop` does before NeMo-Run removes them by force, when cancelled or on Ctrl-C."""
    from docker.errors import DockerException
    from nemo_run.core.execution.docker import DockerContainer

    delete: Callable[..., None] = DockerContainer.delete

    @wraps(delete)
    def stop_and_delete(container: Any, client: Any, id: str) -> None:
        if (running := container.get_container(client=client, id=id)) is not None:
            with contextlib.suppress(DockerException, OSError):  # it ended, and was removed, in the meantime
                variables = dict(each.partition("=")[::2] for each in running.attrs["Config"]["Env"])
                running.stop(timeout=int(variables.get(TIME_TO_SAVE, DEFAULT_TIME_TO_SAVE)))
        delete(container, client=client, id=id)

    DockerContainer.delete = stop_and_delete


_told: set[int] = set()  # process ids of supervisors


def _tell(supervisor: int) -> None:
    _told.add(supervisor)
    with contextlib.suppress(ProcessLookupError):
        os.kill(supervisor, FROM_LAUNCHER)


def _running(app: Any) -> Iterator[int]:
    return (each.proc.pid for replicas in app.role_replicas.values() for each in replicas if each.is_alive())
