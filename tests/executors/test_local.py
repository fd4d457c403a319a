import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import nemo_run as run
import pytest

from nemo_cpt import CptError
from nemo_cpt.errors import StoppedEarlyError
from nemo_cpt.executors import local, nemo_run_patches, supervisor
from nemo_cpt.executors.environment import GPU_VARIABLES
from nemo_cpt.launching import experiments, jobs
from nemo_cpt.launching.description import place
from tests.support.executor_jobs import assert_no_secret, wait_until


def test_import_takes_neither_torch_nor_nemo():
    code = "import sys, nemo_cpt.executors; print([m for m in ('torch', 'nemo', 'nemo_run') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_one_process_inherits_the_secret_and_the_interpreter(project, tmp_path, monkeypatch):
    import tasks

    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    run.run(
        run.Partial(tasks.report, path=str(tmp_path / "seen")),
        executor=local(env={"COLOUR": "dark red", "PRICE": "$$5 ${app_id} $HOME"}),
        name="t",
    )
    seen = json.loads((tmp_path / "seen.0").read_text())
    assert seen["env"]["HF_TOKEN"] == "planted-secret"
    assert seen["env"]["COLOUR"] == "dark red"
    assert seen["env"]["PRICE"] == "$$5 ${app_id} $HOME"  # of which TorchX would make something
    assert seen["env"]["PATH"].startswith(str(Path(sys.executable).parent))
    assert "LOCAL_RANK" not in seen["env"]
    assert seen["collects"]  # which NeMo's import does without
    assert seen["cwd"] == str(project)


def test_a_secret_is_in_no_file_and_in_no_command_line(project, tmp_path, monkeypatch):
    import tasks

    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    task = run.Partial(tasks.report, path=str(tmp_path / "seen"), commands=True)
    run.run(task, executor=local(), name="t")
    seen = json.loads((tmp_path / "seen.0").read_text())
    assert seen["env"]["WANDB_API_KEY"] == "planted-secret"
    assert "nemo_cpt.executors.supervisor" in seen["commands"]
    assert "planted" not in seen["commands"]
    assert_no_secret(tmp_path, b"planted-secret", allowed="seen.")


def test_a_crash_is_restarted_as_often_as_asked(project, tmp_path):
    import tasks

    run.run(run.Partial(tasks.crash_once, path=str(tmp_path / "mark")), executor=local(max_restarts=1), name="t")
    (log,) = (tmp_path / "home").rglob("combined.log")
    assert "nemo_cpt: exit code 3; restart 1 of 1" in log.read_text()


def supervised(marker, code, *options):
    command = [sys.executable, "-m", "nemo_cpt.executors.supervisor", "--marker", str(marker), *options, "--"]
    return subprocess.Popen([*command, sys.executable, "-uc", code], stdout=subprocess.PIPE, text=True)


def test_the_exit_code_is_the_last_tries(tmp_path):
    job = supervised(tmp_path / "m", "import os; print('tried'); os.kill(os.getpid(), 11)", "--max-restarts", "2")
    assert job.communicate()[0].count("tried") == 3
    assert job.returncode == 128 + signal.SIGSEGV


def test_what_the_user_must_change_is_not_tried_again(tmp_path):
    job = supervised(tmp_path / "m", "import sys; print('tried'); sys.exit(2)", "--max-restarts", "3")
    assert (job.communicate()[0], job.returncode) == ("tried\n", 2)


def test_nor_is_it_where_torchrun_makes_1_of_its_exit_code(project, tmp_path):
    import tasks

    with pytest.raises(CptError, match=r"lines of .*:\n +\[default.\]:nemo_cpt: planted refusal$"):
        run.run(
            run.Partial(tasks.refuse, message="planted refusal"), executor=local(processes=2, max_restarts=2), name="t"
        )
    (log,) = (tmp_path / "home").rglob("combined.log")
    assert log.read_text().count("tried") <= 2  # once a process; torchrun may end the second before it says so
    assert "restart 1 of" not in log.read_text()


def test_a_worker_that_ends_while_the_workers_are_signalled(tmp_path, monkeypatch):
    """Between the list of workers and its signals; the others are signalled all the same."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    torchrun = tmp_path / "torchrun"
    torchrun.write_text("#!/bin/sh\nsleep infinity & sleep infinity & wait\n")
    torchrun.chmod(0o755)
    job = supervisor.Supervisor([str(torchrun)], tmp_path / "m")
    job.child = subprocess.Popen(job.command, start_new_session=True)
    wait_until(lambda: len(supervisor.children(job.child.pid)) == 2)
    listed = supervisor.children
    monkeypatch.setattr(supervisor, "children", lambda pid: [gone.pid, *listed(pid)])
    job._signal_job()
    assert job.child.wait(60) == 0
    supervisor._end(job.child.pid)  # which has ended, too


SAVES = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: (Path({marker!r}).touch(), sys.exit(0)))
print("started")
signal.pause()
"""
SAVES_WHEN_LET = """
import signal, sys, time
from pathlib import Path
def save(*_):
    while not Path({go!r}).exists():
        time.sleep(0.05)
    Path({marker!r}).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("started")
signal.pause()
"""
STUBBORN = """
import os, signal
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"told\\n"))
print("started")
while True:
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_job_that_saved_is_neither_finished_nor_restarted(tmp_path, number):
    marker = tmp_path / "marker"
    job = supervised(marker, SAVES.format(marker=str(marker)), "--max-restarts", "1")
    assert job.stdout.readline() == "started\n"
    job.send_signal(number)
    assert job.communicate(timeout=60)[0].startswith("nemo_cpt: stopped ahead of the end, saved")
    assert job.returncode == 75
    assert marker.exists()


def test_signals_of_several_kinds_are_one_stop(tmp_path):
    """As of a session that ends, or of a service that is stopped, whose every process is signalled."""
    marker, go = tmp_path / "m", tmp_path / "go"
    job = supervised(marker, SAVES_WHEN_LET.format(marker=str(marker), go=str(go)))
    assert job.stdout.readline() == "started\n"
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGHUP, supervisor.FROM_LAUNCHER):
        job.send_signal(number)
    go.touch()
    assert job.wait(60) == 75


def test_a_second_signal_ends_a_job_that_does_not_listen(tmp_path):
    job = supervised(tmp_path / "m", STUBBORN, "--max-restarts", "1")
    assert job.stdout.readline() == "started\n"
    job.terminate()
    assert job.stdout.readline() == "told\n"
    assert job.poll() is None
    while job.poll() is None:  # what comes within a second of the first is its echo
        job.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(0.2)
    assert job.returncode == 128 + signal.SIGKILL


def test_a_signal_before_the_supervisor_listens_is_not_lost(tmp_path):
    """Nor does it end it: who starts it holds signals back until it does, and nothing is started then."""
    with supervisor.held(supervisor.STOP_SIGNALS):
        job = supervised(tmp_path / "m", "print('started')")
    job.terminate()
    printed, _ = job.communicate(timeout=60)
    assert (printed.count("started"), job.returncode) == (0, 75)
    assert "stopped ahead of the end, nothing was trained yet" in printed


@pytest.mark.parametrize(("began", "printed", "code"), [(False, "nothing was trained yet", 75), (True, "saved\n", 0)])
def test_a_signal_ends_a_task_until_its_training_begins_and_not_behind_it(tmp_path, began, printed, code):
    told = (
        "import os, signal; from nemo_cpt import signals; from nemo_cpt.executors import runner; "
        f"signals.listen(runner._end_untrained, [signal.SIGTERM]); signals.training_began = {began}; "
        "os.kill(os.getpid(), signal.SIGTERM); print('saved')"
    )
    job = supervised(tmp_path / "m", told)
    assert printed in job.communicate(timeout=60)[0]
    assert job.returncode == code


@pytest.mark.parametrize(("trained", "said"), [(True, "saved"), (False, "nothing was trained yet")])
def test_a_task_that_was_told_to_stop_says_whether_there_was_something_to_save(tmp_path, trained, said):
    task = (
        "from nemo_cpt.errors import StoppedEarlyError; from nemo_cpt.executors import runner\n"
        f"def task(): raise StoppedEarlyError('told to stop', trained={trained})\n"
        "runner._run_task = task\nrunner.main()"
    )
    job = supervised(tmp_path / "m", task)
    assert f"stopped ahead of the end, {said};" in job.communicate(timeout=60)[0]
    assert job.returncode == 75


def test_torchrun_that_has_no_workers_yet_is_ended(tmp_path):
    """Told to stop by its own signal, it would end them 30 s after they came."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexec sleep infinity\n")
    torchrun.chmod(0o755)
    command = [sys.executable, "-m", "nemo_cpt.executors.supervisor", "--marker", str(tmp_path / "m"), "--"]
    job = subprocess.Popen([*command, str(torchrun)], stdout=subprocess.PIPE, text=True)
    wait_until((tmp_path / "started").exists)
    job.terminate()
    assert "nothing was trained yet" in job.communicate(timeout=60)[0]
    assert job.returncode == 75


def test_workers_that_torchrun_ends_because_of_another_ones_crash_were_not_told_to_stop(tmp_path):
    marker = tmp_path / "m"
    crash = f"import sys; open({str(marker)!r}, 'w').write({supervisor.UNTRAINED!r}); sys.exit(1)"
    job = supervised(marker, crash, "--max-restarts", "1")
    assert "restart 1 of 1" in job.communicate(timeout=60)[0]
    assert (job.returncode, marker.exists()) == (1, False)


def test_a_job_whose_launcher_is_gone_saves(tmp_path):
    """Also one that was gone before anyone looked."""
    marker = tmp_path / "m"
    gone = subprocess.Popen(["true"])
    gone.wait()
    job = supervised(marker, SAVES.format(marker=str(marker)), "--launcher", str(gone.pid))
    assert job.communicate(timeout=60)[0].endswith("the same command goes on from there\n")
    assert job.returncode == 75


LAUNCHER = """
import nemo_run as run, os, tasks
from nemo_cpt.executors import local
if __name__ == "__main__":
    task = run.Partial(tasks.count, path="counter", until=30, go="go")
    run.run(task, executor=local(processes=int(os.environ["PROCESSES"])), name="t", tail_logs=True)
"""


@pytest.fixture
def launch(project, tmp_path):
    """Start a launcher with a terminal of its own, by default of two processes under torchrun; wait until they count.

    Its last number waits for a file `go` in the project.
    """
    (project / "launch.py").write_text(LAUNCHER)
    started = []

    def start(wait=True, processes=2, **options):
        terminal, its = os.openpty()
        environ = os.environ | {"NEMORUN_HOME": str(tmp_path / "home"), "PROCESSES": str(processes)}
        command = [sys.executable, "-c", WITH_TERMINAL, sys.executable, "launch.py"]
        printed = (tmp_path / f"printed-{len(started)}").open("w+")
        launcher = subprocess.Popen(
            command, env=environ, stdin=its, stdout=printed, stderr=printed, start_new_session=True, **options
        )
        os.close(its)
        started.append(launcher)
        if wait:
            wait_until(lambda: log_of(tmp_path).count("starting at") == processes)
        return launcher, terminal, printed

    yield start
    for launcher in started:
        launcher.kill()
        launcher.wait()
    wait_until(lambda: not list(experiments.processes_of(str(tmp_path))))


WITH_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # make stdin the controlling terminal, whose end is a SIGHUP
os.execv(sys.argv[1], sys.argv[1:])
"""


def log_of(folder):
    """What the tasks printed, over all launches; torchrun keeps logs of its own beside."""
    return "".join(log.read_text() for log in folder.rglob("t/0/stdout.log"))


def test_a_launcher_that_is_stopped_lets_its_job_save_and_goes_on_when_started_again(project, tmp_path, launch):
    """torchrun is between: by itself it would end the workers, and NeMo-Run would leave them behind."""
    stopped = 0
    for times, number in enumerate((signal.SIGTERM, signal.SIGINT), start=1):
        launcher, _, printed = launch(wait=False)
        wait_until(lambda: log_of(tmp_path).count("starting at") == 2 * times)  # noqa: B023
        launcher.send_signal(number)
        assert launcher.wait(240) == 75
        printed.seek(0)
        said = printed.read()
        assert said.endswith(
            "\nnemo_cpt: task t: stopped ahead of the end, saved; the same command goes on from there\n"
        )
        assert f"starting at {stopped}" in said
        assert "Traceback" not in said
        stopped = int((project / "counter").read_text())
        assert str(tmp_path) not in subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    (project / "go").touch()
    again, _, printed = launch(wait=False)
    assert again.wait(240) == 0
    printed.seek(0)
    assert f"starting at {stopped}" in printed.read()


def test_a_terminal_that_is_closed_and_a_launcher_that_is_killed_let_the_job_save(project, tmp_path, launch):
    launcher, terminal, _ = launch()
    os.close(terminal)  # the window, or the connection
    assert launcher.wait(240) == 75
    assert log_of(tmp_path).count("stopped at") == 2
    assert [task["status"] for task in jobs.status(None)["tasks"]] == ["STOPPED"]
    launcher, _, _ = launch(wait=False)
    wait_until(lambda: log_of(tmp_path).count("starting at") == 4)
    os.killpg(launcher.pid, signal.SIGKILL)
    wait_until(lambda: log_of(tmp_path).count("stopped at") == 4)
    wait_until(lambda: [task["status"] for task in jobs.status(None)["tasks"]] == ["STOPPED"])


def test_logs_are_followed_until_the_job_has_ended(project, tmp_path, launch):
    launcher, _, _ = launch(processes=1)
    environ = os.environ | {"NEMORUN_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "nemo_cpt.cli", "logs", "-f"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout.readline().startswith("The last lines of ")
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(240) == 75
        assert "stopped at" in follower.stdout.read()
    assert follower.returncode == 0


def test_under_nohup_a_job_outlives_its_terminal(project, tmp_path, launch):
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    launcher, terminal, _ = launch(processes=1, **ignored)
    os.close(terminal)
    launcher.send_signal(signal.SIGHUP)
    (project / "go").touch()
    assert launcher.wait(240) == 0
    assert log_of(tmp_path).count("counted to 30") == 1


def test_told_to_stop_while_it_imports_nothing_is_lost(project, tmp_path):
    """In one process and under torchrun; the same command starts again."""
    import tasks

    for processes in (1, 2):
        importing = tmp_path / f"importing-{processes}"
        executor = local(processes=processes, env={"NEVER_IMPORTED_AT_FIRST": str(importing)})
        seen = tmp_path / f"seen-{processes}"
        stop = threading.Thread(
            target=lambda path: (wait_until(path.exists), os.kill(os.getpid(), 15)), args=[importing]
        )
        stop.start()
        with pytest.raises(StoppedEarlyError, match="nothing was trained yet"):
            run.run(run.Partial(tasks.report, path=str(seen)), executor=executor, name="t")
        stop.join()
        assert [task["status"] for task in jobs.status(None)["tasks"]] == ["STOPPED"]
        run.run(run.Partial(tasks.report, path=str(seen)), executor=executor, name="t")
        assert len(list(tmp_path.glob(f"seen-{processes}.*"))) == processes
    worlds = [json.loads(Path(f"{seen}.{rank}").read_text())["env"]["WORLD_SIZE"] for rank in (0, 1)]
    assert worlds == ["2", "2"]


def test_a_failed_task_raises_with_its_last_lines_and_path(project):
    import tasks

    with pytest.raises(CptError, match="planted failure") as raised:
        run.run(run.Partial(tasks.fail, message="planted failure"), executor=local(2), name="t")
    path = str(raised.value).partition("last lines of ")[2].partition(":\n")[0]
    assert "planted failure" in Path(path).read_text()


WITHIN = """
import nemo_run as run
from nemo_cpt.executors import local
{imports}
if __name__ == "__main__":
    {ahead}
    with run.Experiment("t", enable_goodbye_message=False) as experiment:
        experiment.add(run.Script(inline="exit 3"), executor=local())
        experiment.run()
"""


@pytest.mark.parametrize(
    ("imports", "ahead", "says"),
    [
        ("", "pass", "the experiment t began before an executor of nemo_cpt was made or a recipe imported"),
        ("", "executor = local()", "task exit_3 ended as FAILED"),
        ("from nemo_cpt.recipes import tiny", "pass", "task exit_3 ended as FAILED"),
    ],
)
def test_no_script_ends_well_although_a_task_failed(imports, ahead, says, tmp_path):
    """Wherever the first executor is made: Python looks up what ends a block when the block begins."""
    script = tmp_path / "launch.py"
    script.write_text(WITHIN.format(imports=imports, ahead=ahead))
    environment = os.environ | {"NEMORUN_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr


@pytest.mark.parametrize(("first", "kind"), [("exit 3", CptError), ('touch "$NEMO_CPT_PREEMPTED"', StoppedEarlyError)])
def test_nothing_is_started_behind_a_task_that_did_not_succeed(project, tmp_path, first, kind, capsys):
    """NeMo-Run alone starts it, on whatever the other has left."""

    def launch() -> None:
        with run.Experiment("t", executor=local()) as experiment:
            before = experiment.add(run.Script(inline=first), name="before")
            beside = experiment.add(run.Script(inline=f"touch {tmp_path}/beside"), name="beside")
            for name, needed in (("behind", [before]), ("further", ["behind"]), ("after", [beside])):
                experiment.add(run.Script(inline=f"touch {tmp_path}/{name}"), name=name, dependencies=needed)
            experiment.run()

    with pytest.raises(kind, match="task behind was not started") as raised:
        launch()
    assert type(raised.value) is kind
    assert {path.name for path in tmp_path.iterdir()} & {"behind", "further", "after", "beside"} == {"after", "beside"}
    assert "task further is not started: it waits for behind" in capsys.readouterr().out
    assert list(experiments.follow(experiments.experiment(None))) == []  # which ends


def test_a_group_of_which_one_task_failed_is_no_success(project):
    scripts = [run.Script(inline=each) for each in ("true", "exit 3", "true")]

    def launch() -> None:
        with run.Experiment("t", executor=local()) as experiment:
            experiment.add(scripts, executor=local(), name="t")
            experiment.run()

    with pytest.raises(CptError, match="task t ended as FAILED"):
        launch()


def test_a_launcher_that_is_killed_leaves_the_list_of_jobs_whole(project, monkeypatch):
    from nemo_run.run.torchx_backend.schedulers import local as scheduler

    local()
    first, second = (scheduler._LocalAppDef(id=name, log_dir=f"/{name}") for name in ("first", "second"))
    scheduler._save_job_dir({"first": first})
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", lambda *paths: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            scheduler._save_job_dir({"second": second})
    assert list(scheduler._get_job_dirs()) == ["first"]
    scheduler._save_job_dir({"second": second})
    assert list(scheduler._get_job_dirs()) == ["first", "second"]


def test_upstream_still_ends_quietly_after_a_failure(project, monkeypatch):
    """The patch `raise_when_a_task_failed` can go once this fails."""
    import tasks

    executor = local()
    monkeypatch.setattr(nemo_run_patches, "raise_for_states", lambda experiment: None)
    run.run(run.Partial(tasks.fail, message="x"), executor=executor, name="t")


def test_gpu_variables_are_the_measured_ones_unless_set(monkeypatch):
    for name in GPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert GPU_VARIABLES.items() <= local().env_vars.items()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "garbage_collection_threshold:0.8")
    assert local().env_vars["PYTORCH_CUDA_ALLOC_CONF"] == "garbage_collection_threshold:0.8"
    assert local(env={"CUDA_DEVICE_MAX_CONNECTIONS": "32"}).env_vars["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"


def test_gpus_are_the_first_of_the_visible_ones(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    assert local(gpus=2).env_vars["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert local(gpus=2).ntasks_per_node == 2
    assert local(gpus=0).env_vars["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in local().env_vars
    with pytest.raises(CptError, match="shows 3; unset it"):
        local(gpus=4)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_were_hidden_stay_hidden(monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert local(gpus=0).env_vars["CUDA_VISIBLE_DEVICES"] == ""
    with pytest.raises(CptError, match="shows 0; unset it"):
        local(gpus=2)
    with pytest.raises(CptError, match="shows 0; unset it"):
        place("local", ["gpus=2"])


def test_two_nodes_by_hand_meet_at_the_master(project, monkeypatch):
    import tasks

    for name, value in {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with run.Experiment("t", executor=local(processes=4, nodes=2)) as experiment:
        experiment.add(run.Partial(tasks.report, path="seen"), name="t")
        experiment.dryrun(log=False, delete_exp_dir=False)
        (command,) = experiment.jobs[0]._dryrun_info.request.role_params["t"]
    flags = dict(zip(command.args, command.args[1:], strict=False))
    assert flags["--rdzv-endpoint"] == "10.0.0.1:29400"
    assert (flags["--nnodes"], flags["--nproc-per-node"], flags["--node-rank"]) == ("2", "4", "1")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"processes": 0}, "at least one process"),
        ({"nodes": 0}, "at least one node"),
        ({"gpus": -1}, "0 to hide"),
        ({"max_restarts": -1}, "0 or more"),
        ({"env": {"HF_TOKEN": "x"}}, "HF_TOKEN looks like a secret"),
        ({"env": {"MY_API_KEY": "x"}}, "looks like a secret"),
        ({"env": {"A B": "x"}}, "not the name"),
        ({"nodes": 2}, "MASTER_ADDR, MASTER_PORT, NODE_RANK"),
    ],
)
def test_bad_input(arguments, says, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CptError, match=says):
        local(**arguments)
