"""How runner, supervisor and launcher end where nobody reads what they print, and of Ctrl-C at any point."""

import os
import signal
import subprocess
import sys

import nemo_run as run
import pytest
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from nemo_cpt.constants import MARKER
from nemo_cpt.executors import local, nemo_run_patches, supervisor
from nemo_cpt.executors.runner import REFUSAL
from nemo_cpt.output import WithoutReaders, send_nowhere
from tests.support.executor_jobs import wait_until


@pytest.fixture
def unread():
    """The end to write to of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def ran(kind, folder, unread=None):
    """The exit code of a task that raises that in its runner, the files that it left, and what it printed."""
    import tasks

    task = run.Partial(tasks.raises, kind=kind)
    (folder / "task").write_text(ZlibJSONSerializer().serialize(task))
    files = {"marker": folder / "marker", "refusal": folder / "refusal"}
    command = [sys.executable, "-m", "nemo_cpt.executors.runner", "-n", "t", str(folder / "task")]
    environ = os.environ | {MARKER: str(files["marker"]), REFUSAL: str(files["refusal"])}
    output = subprocess.PIPE if unread is None else unread
    done = subprocess.run(command, env=environ, stdout=output, stderr=output, text=True)
    return done.returncode, [name for name, path in files.items() if path.exists()], done.stderr


@pytest.mark.parametrize(
    ("kind", "code", "left"), [("StoppedEarlyError", 0, ["marker"]), ("CptError", 2, ["refusal"]), ("None", 0, [])]
)
def test_a_task_that_nobody_reads_goes_on_and_tells_its_supervisor_how_it_ended(
    project, tmp_path, unread, kind, code, left
):
    assert ran(kind, tmp_path, unread)[:2] == (code, left)


@pytest.mark.parametrize(("kind", "code"), [("BrokenPipeError", 1), ("KeyboardInterrupt", -signal.SIGINT)])
def test_what_typer_would_make_a_quiet_end_of_is_a_failure(project, tmp_path, kind, code):
    """A broken pipe to a child process of the task's, and a Ctrl-C that something made an exception of."""
    found, left, printed = ran(kind, tmp_path)
    assert (found, left) == (code, [])
    assert kind in printed.splitlines()[-1]


def test_a_terminal_that_is_gone_is_no_error_and_a_full_disk_is():
    controller, terminal = os.openpty()
    os.close(controller)
    with os.fdopen(terminal, "w") as closed:
        for _ in range(2):
            print("gone", file=WithoutReaders(closed), flush=True)
    with open("/dev/full", "w") as full:
        with pytest.raises(OSError, match="No space left"):
            print("full", file=WithoutReaders(full), flush=True)
        send_nowhere(full.fileno())  # what is left to flush


def supervised(folder, code, *options, **how):
    command = [sys.executable, "-m", "nemo_cpt.executors.supervisor", "--marker", str(folder / "preempted-t"), *options]
    return subprocess.Popen([*command, "--", sys.executable, "-uc", code], **how)


SAVES = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({folder!r}, "preempted-t").touch(), sys.exit(0)))
pathlib.Path({folder!r}, "started").touch()
signal.pause()
"""


def test_a_supervisor_that_nobody_reads_ends_as_its_job_did(tmp_path, unread):
    crashes = supervised(tmp_path, "import sys; sys.exit(5)", "--max-restarts", "1", stdout=unread, stderr=unread)
    assert crashes.wait(60) == 5
    saves = supervised(tmp_path, SAVES.format(folder=str(tmp_path)), stdout=unread, stderr=unread)
    wait_until((tmp_path / "started").exists)
    saves.terminate()
    assert saves.wait(60) == 75


LAUNCHER = """
import nemo_run as run, tasks
from nemo_cpt.executors import local
if __name__ == "__main__":
    run.run(run.Partial(tasks.{task}), executor=local(), name="t", tail_logs=True)
"""


@pytest.mark.parametrize(
    ("task", "code"), [("count, path='counter', until=9, go='go'", 0), ("fail, message='planted'", 2)]
)
def test_a_launcher_whose_output_nobody_reads_any_more_sees_its_job_to_the_end(project, tmp_path, task, code):
    """As behind `| head`: it reads up to where the job begins."""
    (project / "launch.py").write_text(LAUNCHER.format(task=task))
    environ = os.environ | {"NEMORUN_HOME": str(tmp_path / "home")}
    launcher = subprocess.Popen(
        [sys.executable, "launch.py"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    launcher.stdout.readline()
    launcher.stdout.close()
    (project / "go").touch()
    said = launcher.stderr.read()
    assert launcher.wait(240) == code
    assert "BrokenPipeError" not in said
    assert ("planted" in said) == (code == 2)
    if code == 0:
        assert int((project / "counter").read_text()) == 9


INTERRUPTED = """
import os, signal
import nemo_run as run, tasks
from nemo_cpt.executors import local
from nemo_run.run.experiment import Experiment

def interrupted(function):
    def interrupt(*given, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return function(*given, **named)
    return interrupt

if __name__ == "__main__":
    executor = local()
    Experiment.{point} = interrupted(Experiment.{point})
    run.run(run.Partial(tasks.count, path="counter", until=1000), executor=executor, name="t", tail_logs=True)
"""


@pytest.mark.parametrize(("point", "code"), [("_prepare", -signal.SIGINT), ("_wait_for_jobs", 75), ("status", 75)])
def test_ctrl_c_in_the_launcher_before_and_behind_the_jobs_start(project, tmp_path, point, code):
    """Before, there is no job to stop; behind, the job ends, and nothing is left running."""
    (project / "launch.py").write_text(INTERRUPTED.format(point=point))
    environ = os.environ | {"NEMORUN_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "launch.py"],
        env=environ,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert done.returncode == code, done.stderr
    from nemo_cpt.launching import experiments

    assert not list(experiments.processes_of(str(tmp_path)))
    if code == 75:
        assert done.stderr.splitlines()[-1].startswith("nemo_cpt: task t: ")


@pytest.mark.parametrize(
    ("needed", "given", "seconds"), [(900, {}, 900), (None, {}, 600), (900, {supervisor.TIME_TO_SAVE: "60"}, 60)]
)
def test_a_jobs_environment_says_how_long_it_may_take_to_save(needed, given, seconds):
    """The plan's window, or what the user gives; who cancels it reads that from the supervisor."""
    executor = local(env=given)
    nemo_run_patches.give_time_to_save(executor, lambda: needed)
    environ = os.environ | executor.env_vars
    with subprocess.Popen(["cat"], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdin.write("started\n")
        process.stdin.flush()
        process.stdout.readline()
        assert supervisor.seconds_to_save(process.pid) == seconds
        process.stdin.close()
    assert supervisor.seconds_to_save(process.pid) == supervisor.DEFAULT_TIME_TO_SAVE
