"""Jobs that save when they are told to stop, wherever they run; cures of NeMo-Run's and TorchX's defects there.

The signal's way: launcher, or `docker stop` -> `supervisor` -> the workers, whose PreemptionCallback saves at the end
of the step. Slurm signals the workers itself.
"""

import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from nemo_cpt.executors.supervisor import MARKER_PREFIX

SECONDS_TO_SAVE = 600
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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

    @wraps(request)
    def request_supervised(scheduler: Any, app: Any, cfg: Any) -> Any:
        for role in app.roles:
            supervise(role, sys.executable, cfg["log_dir"], cfg["retries"])
        return request(scheduler, app, cfg)

    PersistentLocalScheduler._to_popen_request = request_supervised


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
            supervise(role, "trap '' TERM; python", "/nemo_run", cfg.retries)
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
            supervise(role, "python", "/tmp", cfg.retries)
        return prepare(scheduler, app, cfg)

    SkypilotScheduler._submit_dryrun = prepare_supervised


def supervise(role: Any, python: str, folder: str, max_restarts: int) -> None:
    """Put `supervisor` before a role's command, with its marker in `folder`, and `runner` in place of NeMo-Run's."""
    marker = f"{folder}/{MARKER_PREFIX}{role.name}"
    own = ["-m", "nemo_cpt.executors.supervisor", "--marker", marker, "--max-restarts", str(max_restarts), "--"]
    role.args = [*own, role.entrypoint, *(with_our_runner(argument) for argument in role.args)]
    role.entrypoint = python


def with_our_runner(argument: str) -> str:
    """Return `runner`'s module in place of NeMo-Run's; any other argument as it is."""
    return "nemo_cpt.executors.runner" if argument == "nemo_run.core.runners.fdl_runner" else argument


def pass_signals_on() -> None:
    """Let Ctrl-C, SIGTERM and SIGUSR1 to the launcher stop its local jobs, and wait for them.

    NeMo-Run leaves them running behind a launcher that SIGTERM ended, and on Ctrl-C waits for their end.
    """
    from nemo_run.run.experiment import Experiment

    enter: Callable[..., Any] = Experiment.__enter__
    leave: Callable[..., Any] = Experiment.__exit__

    @wraps(enter)
    def enter_and_listen(experiment: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
            experiment._handlers_before = before
            for number in SIGNALS:
                signal.signal(number, lambda number, frame: _pass_on(experiment, number, before[number]))
        return enter(experiment)

    @wraps(leave)
    def leave_and_restore(experiment: Any, *error: Any) -> None:
        try:
            leave(experiment, *error)
        finally:
            for number, handler in getattr(experiment, "_handlers_before", {}).items():
                signal.signal(number, handler)

    Experiment.__enter__, Experiment.__exit__ = enter_and_listen, leave_and_restore


def _pass_on(experiment: Any, number: int, handler_before: Any) -> None:
    """Signal the supervisors of an experiment's local jobs; without any, do what the signal did before."""
    scheduler = experiment._runner._scheduler_instances.get("local_persistent")
    running = [pid for app in getattr(scheduler, "_apps", {}).values() for pid in _running(app)]
    for pid in running:
        os.kill(pid, signal.SIGTERM)
    if running:
        print("stopping; the job saves a checkpoint if it trains. Once more to end it at once", flush=True)
        return
    signal.signal(number, handler_before)
    signal.raise_signal(number)


def wait_until_saved() -> None:
    """Wait for local jobs that are cancelled to save; TorchX kills them after 10 s, and not their workers."""
    from torchx.schedulers.local_scheduler import _LocalAppDef

    kill: Callable[..., None] = _LocalAppDef.kill

    @wraps(kill)
    def wait_and_kill(app: Any) -> None:
        for pid in _running(app):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS_TO_SAVE
        while any(_running(app)) and time.monotonic() < deadline:
            time.sleep(0.2)
        kill(app)

    _LocalAppDef.kill = wait_and_kill


def _running(app: Any) -> Iterator[int]:
    return (each.proc.pid for replicas in app.role_replicas.values() for each in replicas if each.is_alive())
