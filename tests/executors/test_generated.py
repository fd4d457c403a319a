"""Executors whose engine is not here: what they would ask for, compared word by word."""

import ast
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import nemo_run as run
import numpy as np
import pytest
import yaml
from docker.errors import APIError
from docker.models.containers import _create_container_args
from nemo_run.core.execution.docker import DockerContainer

from nemo_cpt import CptError
from nemo_cpt.executors import docker, environment, kubernetes, skypilot, slurm, slurm_job, ssh, stopping, window
from nemo_cpt.executors.code import CodeSnapshot
from nemo_cpt.executors.environment import checked_setup
from nemo_cpt.launching.task import nodes_of_its_job
from nemo_cpt.signals import Given
from tests.support.executor_jobs import git, wait_until
from tests.support.sky_stand_in import install


def prepared(executor, name="t"):
    """What the executor's scheduler made of a task, before it is sent."""
    import tasks

    with run.Experiment("t", executor=executor, enable_goodbye_message=False) as experiment:
        experiment.add(run.Partial(tasks.report, path="seen"), name=name)
        experiment.dryrun(log=False, delete_exp_dir=False)
    return experiment, experiment.jobs[0]._dryrun_info.request


class Engine:
    """Takes what NeMo-Run would send to Docker's engine."""

    def __init__(self):
        self.containers = self

    def run(self, image, command, **kwargs):
        kwargs.pop("remove")
        self.created = _create_container_args({"image": image, "command": command, "version": "1.43", **kwargs})


def test_docker_has_the_tutorials_flags(project, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    _, request = prepared(docker(gpus=2, mounts=[".:/work:ro"], env={"A": "b c"}, max_restarts=3))
    engine = Engine()
    request.containers[0].run(engine, id="1")
    created = engine.created
    host = created["host_config"]
    assert created["image"] == "localhost/nemo-cpt"
    assert created["user"] == f"{os.getuid()}:{os.getgid()}"
    assert created["working_dir"] == "/nemo_run/code"
    assert host["ShmSize"] == 16 * 2**30
    assert [dict(limit) for limit in host["Ulimits"]] == [
        {"Name": "memlock", "Soft": -1, "Hard": -1},
        {"Name": "stack", "Soft": 67108864, "Hard": 67108864},
    ]
    assert host["NetworkMode"] == "host"
    assert host["DeviceRequests"][0]["Count"] == 2
    (secrets,) = (project.parent / "home" / "secrets").iterdir()
    assert host["Binds"] == [
        f"{project}:/work:ro", f"{project}:/nemo_run/code", f"{secrets}:/run/secrets/nemo_cpt.env:ro"
    ]  # fmt: skip
    assert created["environment"]["A"] == "b c"
    assert created["environment"]["BASH_ENV"] == "/run/secrets/nemo_cpt.env"
    command = created["command"]
    assert command.startswith(
        "bash -c \"trap '' TERM; python -m nemo_cpt.executors.supervisor --marker /nemo_run/preempted-t "
        "--max-restarts 3 -- torchrun --rdzv-backend c10d --rdzv-endpoint localhost:0 --rdzv-id "
    )
    assert "--nnodes 1 --nproc-per-node 2 --node-rank 0" in command
    assert "-m nemo_cpt.executors.runner -n t /nemo_run/configs/t_fn_or_script 2>&1 | tee" in command
    assert host["Init"]
    assert "RestartPolicy" not in host  # Docker refuses one beside AutoRemove
    assert created["environment"]["TINI_KILL_PROCESS_GROUP"] == "1"
    assert created["environment"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "planted-secret" not in str(created)
    assert secrets.read_text() == "export HF_TOKEN=planted-secret\n"
    assert secrets.stat().st_mode & 0o777 == 0o600


def started_as_in_a_container(task, executor):
    """What the container would start, in a process group of its own, as Docker's init signals it on `docker stop`."""
    with run.Experiment("t", executor=executor, enable_goodbye_message=False) as experiment:
        experiment.add(task, name="t")
        experiment.dryrun(log=False, delete_exp_dir=False)
    job = Path(experiment._exp_dir, "t")
    engine = Engine()
    experiment.jobs[0]._dryrun_info.request.containers[0].run(engine, id="1")
    command = [word.replace("/nemo_run/", f"{job}/") for word in shlex.split(engine.created["command"])]
    environ = engine.created["environment"] | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    environ["PYTHONPATH"] = str(Path(__file__).parents[2])  # this checkout, which the image would have installed
    return job, subprocess.Popen(command, env=environ, start_new_session=True)


def log_of(job):
    return "".join(log.read_text() for log in job.glob("log_*.out"))


def test_a_container_that_is_stopped_saves(project, tmp_path):
    import tasks

    task = run.Partial(tasks.count, path=str(tmp_path / "counter"), until=1000)
    job, container = started_as_in_a_container(task, docker(gpus=2))
    wait_until(lambda: log_of(job).count("starting at") == 2)
    os.killpg(container.pid, signal.SIGTERM)
    assert container.wait(60) == 75
    assert log_of(job).count("stopped at") == 2
    assert "nemo_cpt: stopped ahead of the end, saved" in log_of(job)
    (status,) = job.glob("status_*.out")
    assert json.loads(status.read_text())["exit_code"] == "75"


def test_a_container_that_is_stopped_while_it_imports_says_that_nothing_is_lost(project, tmp_path):
    import tasks

    importing = tmp_path / "importing"
    executor = docker(gpus=2, env={"NEVER_IMPORTED_AT_FIRST": str(importing)})
    job, container = started_as_in_a_container(run.Partial(tasks.report, path=str(tmp_path / "seen")), executor)
    wait_until(importing.exists)
    os.killpg(container.pid, signal.SIGTERM)
    assert container.wait(60) == 75
    assert "stopped ahead of the end, nothing was trained yet" in log_of(job)


class Container:
    """A container of the engine's that is a process group here."""

    attrs: ClassVar = {"Config": {"Env": ["NEMO_CPT_SECONDS_TO_SAVE=61"]}}

    def __init__(self, process):
        self.process = process

    def kill(self, **named):
        os.killpg(self.process.pid, signal.Signals[named["signal"]])

    def stop(self, timeout):
        assert timeout == 61
        self.kill(signal="SIGTERM")
        self.process.wait(timeout)

    def remove(self, force):
        self.process.kill()


def test_a_container_that_is_cancelled_saves_before_nemo_run_removes_it(project, tmp_path, monkeypatch):
    """By `nemo-cpt cancel`, and when the launcher ends, on Ctrl-C or of an error."""
    import tasks

    task = run.Partial(tasks.count, path=str(tmp_path / "counter"), until=1000)
    job, process = started_as_in_a_container(task, docker(gpus=1))
    wait_until(lambda: "starting at" in log_of(job))
    monkeypatch.setattr(DockerContainer, "get_container", lambda *args, **kwargs: Container(process))
    DockerContainer(name="t", command=[], executor=docker(), extra_env={}).delete(client=None, id="1")
    assert process.wait() == 75
    assert "stopped at" in log_of(job)


def test_a_signal_to_the_launcher_reaches_its_containers(project, tmp_path):
    import tasks

    task = run.Partial(tasks.count, path=str(tmp_path / "counter"), until=1000)
    job, process = started_as_in_a_container(task, docker(gpus=1))
    wait_until(lambda: "starting at" in log_of(job))
    request = SimpleNamespace(get_containers=lambda client: [Container(process)])
    scheduler = SimpleNamespace(_scheduled_reqs=[request], _docker_client=None)
    runner = SimpleNamespace(_scheduler_instances={"docker_persistent": scheduler})
    stopping._pass_on(SimpleNamespace(_runner=runner), signal.SIGTERM, Given())
    assert process.wait(60) == 75


def test_a_container_whose_torchrun_hides_that_the_user_must_change_something(project):
    import tasks

    task = run.Partial(tasks.refuse, message="planted refusal")
    job, container = started_as_in_a_container(task, docker(gpus=2, max_restarts=2))
    assert container.wait(60) == 2
    assert "nemo_cpt: planted refusal" in log_of(job)
    assert "restart 1 of" not in log_of(job)


def test_a_shell_that_docker_starts_gets_the_secret(project, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted 'secret'")
    docker()
    (file,) = (project.parent / "home" / "secrets").iterdir()
    shell = ["bash", "-c", "python3 -c 'import os; print(os.environ[\"HF_TOKEN\"])'"]
    environ = {"BASH_ENV": str(file), "PATH": "/usr/bin:/bin"}
    assert subprocess.run(shell, env=environ, capture_output=True, text=True).stdout.strip() == "planted 'secret'"
    monkeypatch.setenv("OTHER", "another")
    docker(secrets=["OTHER"])  # of the same process, which leaves the first its own
    assert subprocess.run(shell, env=environ, capture_output=True, text=True).stdout.strip() == "planted 'secret'"


def test_a_half_written_secret_goes_when_the_process_ends(project, monkeypatch):
    def interrupted(names):
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "secrets_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        environment.keep_secrets("docker", ["HF_TOKEN"])
    environment.forget_secrets()
    assert not list((project.parent / "home" / "secrets").iterdir())


def test_slurm_with_a_container(project, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    executor = slurm(
        "llm", "gpu", nodes=2, gpus_per_node=8, time="4:00:00", container_image="nvcr.io#nvidia/nemo:25.07",
        mem="0", exclusive=True, dependency="afterok:7", max_restarts=2, begin="now+1hour",
    )  # fmt: skip
    experiment, request = prepared(executor)
    script = request.materialize()
    directives = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {
        "account=llm", "partition=gpu", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "time=4:00:00",
        "signal=TERM@600", "mem=0", "exclusive", "dependency=afterok:7", "job-name=cpt.t", "begin=now+1hour",
    } <= directives  # fmt: skip
    assert "comes_back=1\nmax_restarts=2 preempt_seconds=600\n" in script
    assert "planted-secret" not in script
    (srun,) = [line for line in script.splitlines() if line.startswith("srun --output")]
    job = f"{experiment._exp_dir}/t"
    assert f"--container-mounts {project}:{project},{job}:/nemo_run " in srun
    assert "--container-image nvcr.io#nvidia/nemo:25.07" in srun
    assert f"--mpi=pmix --container-workdir={project} python -m nemo_cpt.executors.runner -n t" in srun
    assert 'export PYTHONSAFEPATH=1 PYTHONPATH="$(echo /nemo_run/code:/nemo_run/code/src:' in script
    assert '. "$job/secrets.env"' in script
    assert f"job={job} " in script


def test_slurms_containers_must_hold_the_folder_that_the_tasks_run_in(project, tmp_path):
    (tmp_path / "data").mkdir()
    given = {"container_image": "img", "mounts": [f"{tmp_path}/data:/data"]}
    with pytest.raises(CptError, match=f"the tasks run in the current folder, {project}, which these do not hold"):
        slurm("llm", "gpu", **given)
    assert slurm("llm", "gpu", **given, workdir="/data").srun_args[-1] == "--container-workdir=/data"
    slurm("llm", "gpu", container_image="img", mounts=[f"{tmp_path}"])  # at its own path, and the project within


def test_the_current_folder_is_not_before_the_standard_library(project):
    """Python takes an empty entry of PYTHONPATH, as in `code:$PYTHONPATH` where that is not set, for it."""
    _, request = prepared(slurm(tasks_per_node=1))
    (line,) = [line for line in request.materialize().splitlines() if line.startswith("export PYTHONSAFEPATH")]
    show = f"{line}; {sys.executable} -c 'import sys; print(sys.path)'"
    for before in ({}, {"PYTHONPATH": ""}, {"PYTHONPATH": ":"}, {"PYTHONPATH": ":/a b::/c:"}):
        done = subprocess.run(["bash", "-c", show], env={"PATH": os.environ["PATH"]} | before, capture_output=True)
        shipped, sources, *others = ast.literal_eval(done.stdout.decode())
        assert (Path(shipped).name, Path(sources).name) == ("code", "src")
        assert not {"", str(project)} & set(others), before
        if "/a b" in before.get("PYTHONPATH", ""):
            assert others[:2] == ["/a b", "/c"]


def test_a_jobs_variables_are_what_was_given(project):
    """NeMo-Run alone writes their names in upper case, `$` for `$$`, and no quotes."""
    given = {"no_proxy": "a b", "Mixed": "a$$b $HOME `x` 'q' \"", "LINES_": "one\ntwo", "RUNS": "/home/me/nemo_runs/x"}
    executor = slurm(tasks_per_node=1, env=given)
    executor.setup_lines = "export AFTERWARDS=1"  # NeMo-Run's own, set on the executor
    _, request = prepared(executor)
    assert request.materialize() == request.materialize()
    head = request.materialize().partition("/dev/null\n")[2].partition("job=")[0]
    show = f"{head}\n{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    done = subprocess.run(["bash", "-c", show], env={"PATH": os.environ["PATH"]}, capture_output=True, check=True)
    assert given.items() <= json.loads(done.stdout).items()
    assert "\nexport AFTERWARDS=1\n" in request.materialize()


def test_the_jobs_folder_stands_for_nemo_runs_name_of_it_alone(project, tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path / "nemo_run"))
    experiment, request = prepared(slurm(tasks_per_node=1, workdir="/home/me/nemo_run/x"))
    script, job = request.materialize(), f"{experiment._exp_dir}/t"
    assert f"#SBATCH --output={job}/sbatch_cpt.t_%j.out" in script
    assert f"-n t {job}/configs/t_fn_or_script" in script
    assert "--chdir=/home/me/nemo_run/x" in script
    inline = run.Script(inline="cat /nemo_run/a /home/me/nemo_run/b /nemo_runs")
    inline.to_command(filename=str(tmp_path / "t.sh"), substitute_rundir_path="/there")
    assert (tmp_path / "t.sh").read_text().splitlines()[-1] == "cat /there/a /home/me/nemo_run/b /nemo_runs"


def test_a_job_submitted_from_within_a_job_is_its_own(monkeypatch):
    """Else srun takes the outer one's memory, its array's number and its run of W&B's for the new one's."""
    here = {"SLURM_JOB_ID": "3", "SLURM_MEM_PER_CPU": "100", "SLURM_ARRAY_TASK_ID": "1", "SRUN_CPUS_PER_TASK": "7"}
    ours = {"NEMO_CPT_EXPERIMENT": "t_1", "WANDB_RUN_ID": "t_1"}
    for name, value in (here | ours | {"SLURM_CONF": "/etc/slurm.conf"}).items():
        monkeypatch.setenv(name, value)
    left_out = {word.removeprefix("--unset=") for word in slurm_job.outside_jobs(run.LocalTunnel(job_dir=""))[1:]}
    assert here.keys() | ours.keys() <= left_out
    assert "SLURM_CONF" not in left_out
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert "--unset=WANDB_RUN_ID" not in slurm_job.outside_jobs(run.LocalTunnel(job_dir=""))
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm_job.outside_jobs(run.LocalTunnel(job_dir="")) == []


def test_a_local_job_in_somebodys_allocation_has_its_own_nodes(monkeypatch):
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.delenv("NEMO_CPT_EXPERIMENT", raising=False)
    assert nodes_of_its_job() is None
    monkeypatch.setenv("NEMO_CPT_EXPERIMENT", "t_1")  # as the script of `slurm` has it
    assert nodes_of_its_job() == 2


def answers(stdout="", stderr="", code=0):
    result = SimpleNamespace(stdout=stdout, stderr=stderr, return_code=code)
    return SimpleNamespace(run=lambda *command, **how: result)


def test_a_controller_that_does_not_answer_says_nothing_of_a_jobs_end():
    """Not even where an earlier start of the job has left its end in the log."""
    silent = answers(stderr="slurm_load_jobs error: Unable to contact slurm controller (connect failure)", code=1)
    assert slurm_job._from_scontrol(silent, "7")[0].name == "UNKNOWN"
    assert (
        slurm_job._from_scontrol(answers(stderr="slurm_load_jobs error: Invalid job id specified", code=1), "7") is None
    )


def test_the_state_of_an_array_that_slurm_has_forgotten(tmp_path, project):
    for number, codes in enumerate(([75, 0], [0], [3])):
        lines = "".join(f"job exited with code {code}\n" for code in codes)
        (tmp_path / f"sbatch_cpt.t_7_{number}.out").write_text(lines)
    here = run.LocalTunnel(job_dir="")
    assert slurm_job._from_log(here, str(tmp_path), "7")[::2] == (slurm_job.AppState.FAILED, 3)
    (tmp_path / "sbatch_cpt.t_7_2.out").unlink()
    assert slurm_job._from_log(here, str(tmp_path), "7")[::2] == (slurm_job.AppState.SUCCEEDED, 0)


@pytest.mark.parametrize(
    ("logs", "state"),
    [
        ([], "CANCELLED"),  # before it began
        (["begun"], "FAILED"),  # killed with its script
        (["job exited with code 75\nnemo_cpt: stopped ahead of the end (cancelled), saved"], "CANCELLED"),
        (["slurmstepd: error: *** JOB 7 ON cpt1 CANCELLED AT 2026-01-01T00:00:00 ***"], "CANCELLED"),
        (["slurmstepd: error: *** JOB 7 ON cpt1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***"], "FAILED"),
        (["nemo_cpt: told to stop (cancelled)\njob exited with code 0"], "SUCCEEDED"),
        (["job exited with code 0", "begun"], "FAILED"),
    ],
)
def test_a_job_that_slurm_has_forgotten_has_ended(tmp_path, project, monkeypatch, logs, state):
    """A launcher would wait for ever for one whose state is unknown; where there is no Slurm to ask it stays so."""
    path, job = os.environ["PATH"], tmp_path / "job's"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").touch(0o755)
    job.mkdir()
    for number, text in enumerate(logs):
        (job / f"sbatch_cpt.t_7_{number}.out").write_text(text + "\n")
    here = run.LocalTunnel(job_dir="")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{path}")
    assert slurm_job._from_log(here, str(job), "7")[0].name == state
    assert slurm_job._from_log(here, str(tmp_path / "gone"), "7")[0].name == "UNKNOWN"
    only = [folder for folder in path.split(":") if not Path(folder, "scontrol").exists()]
    tools = tmp_path / "tools"  # scontrol lies beside grep and tail
    tools.mkdir()
    for name in ("bash", "sh", "grep", "tail"):
        (tools / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", ":".join([str(tools), *only]))
    unasked = slurm_job._from_log(here, str(job), "7")[0].name
    assert unasked == ("SUCCEEDED" if state == "SUCCEEDED" else "UNKNOWN")


def test_paths_of_this_machine_are_made_whole(project):
    executor = slurm(venv="~/venv", workdir="runs")
    assert executor.python_folder == str(Path.home() / "venv/bin")
    assert executor.srun_args[-1] == f"--chdir={project}/runs"


def test_slurm_without_an_account_gpus_or_time_names_none(project):
    _, request = prepared(slurm(tasks_per_node=1))
    script = request.materialize()
    assert not [word for word in ("account", "gpu", "time=", "partition", "mpi") if f"--{word}" in script]


@pytest.fixture(scope="module")
def headline():
    """The recipe for 8 GPUs, and the seconds that a step and its checkpoint take on the slowest GPU that holds it."""
    from nemo_cpt import planning
    from nemo_cpt.planning.save_window import saving
    from nemo_cpt.recipes import llama31_8b

    recipe = llama31_8b.continual_pretrain()
    return recipe, saving(planning.read(recipe))


def window_of(recipe, executor):
    with run.Experiment("t", executor=executor, enable_goodbye_message=False) as experiment:
        experiment.add(recipe, name="t")
        return experiment.jobs[0].executor


def test_a_recipes_plan_says_how_early_its_job_is_told_to_stop(project, headline, capfd):
    """Of the headline recipe a step took 144 s, and its checkpoint of 112 GB 80 s and more."""
    recipe, needed = headline
    assert needed.window >= 2 * needed.seconds > 2 * (144 + 80)
    for limit in (None, "4:00:00"):
        assert window_of(recipe, slurm(gpus_per_node=8, time=limit)).preempt_seconds == needed.window
    assert "warning" not in capfd.readouterr().err
    short = window_of(recipe, slurm(gpus_per_node=8, time="10"))
    assert short.preempt_seconds == 300  # half of it: the rest is for training
    assert f"the job may take {needed.window} s to save" in capfd.readouterr().err
    for given in (0, 60):
        assert window_of(recipe, slurm(gpus_per_node=8, time="10", preempt_seconds=given)).preempt_seconds == given


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("30", 1800), ("4:0", 240), ("90:90", 5490), ("4:0:0", 14400), ("1-4", 100_800), ("1-4:0", 100_800),
        ("1-30:0:5", 194_405), ("2-00", 172_800), ("0", None), ("0:0", None), ("0-0", None), ("infinite", None),
    ],
)  # fmt: skip
def test_times_are_those_that_sbatch_takes(limit, seconds):
    assert slurm(tasks_per_node=1, time=limit, preempt_seconds=60).time == limit
    assert window.seconds_of(limit) == seconds


def test_without_a_signal_ahead_of_the_limit_none_is_asked_for(project):
    _, request = prepared(slurm(tasks_per_node=1, time="10", preempt_seconds=0))
    assert "--signal" not in request.materialize()
    _, request = prepared(slurm(tasks_per_node=1, time="10"))  # no recipe: 600 s, or half of the limit
    assert "#SBATCH --signal=TERM@300" in request.materialize()


def test_slurm_gres_stands_for_the_gpus(project):
    _, request = prepared(slurm(gpus_per_node=8, gres="gpu:h100:8"))
    script = request.materialize()
    assert "#SBATCH --gres=gpu:h100:8" in script
    assert "#SBATCH --ntasks-per-node=8" in script
    assert "--gpus-per-node" not in script


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"nodes": 0}, r"slurm\(nodes=0\)"),
        ({"gpus_per_node": 0}, "leave it out"),
        ({"time": "four hours"}, "write minutes"),
        ({"time": "4:0:0:0"}, "write minutes"),
        ({"time": "1-2-3"}, "write minutes"),
        ({"time": ":30"}, "write minutes"),
        ({"chain": 0}, "chain"),
        ({"partitoin": "gpu"}, "no such directive; near: partition"),
        ({"mem": "12GBB"}, r"slurm\(mem='12GBB'\): give a size as sbatch takes it: .*such as '64G'"),
        ({"mem_per_gpu": "1.5G"}, "give a size"),
        ({"tmp": True}, "give a size"),
        ({"cpus_per_task": "8x"}, r"slurm\(cpus_per_task='8x'\): give a whole number"),
        ({"time_min": "1:00:0O"}, r"slurm\(time_min='1:00:0O'\): write minutes, M:SS"),
        ({"container_image": "x", "mounts": ["/no/such:/data"]}, "/no/such does not exist"),
        ({"secrets": ["NOT_SET_ANYWHERE"]}, "NOT_SET_ANYWHERE is not set"),
        ({"env": {"WANDB_API_KEY": "x"}}, "looks like a secret"),
        ({"tunnel": "login1"}, "give 'local' or ssh"),
        ({"workdir": "/nemo_run/x"}, "name of the job.s folder"),
        ({"workdir": "scratch", "tunnel": ssh("login1", "me", "/jobs")}, "give the whole path, from / on, as the job"),
        ({"venv": "~/venv", "container_image": "x"}, "give the whole path, from / on, as the job sees it"),
        ({"tunnel": ssh("login1", "me", "~/jobs")}, "give the whole path there, from / on"),
        ({"tunnel": ssh("login1", "me", "/home/my jobs")}, "which would not take ' ' as it is; give ssh"),
        ({"no_requeue": True}, "give requeue=False"),
        ({"chdir": "/scratch"}, "give workdir"),
        ({"test_only": True}, "for sbatch on a command line"),
        ({"ntasks_per_node": 4}, "give tasks_per_node"),
        ({"array": "0-3", "chain": 2}, "would end the chain of all"),
        ({"max_restarts": -1}, r"slurm\(max_restarts=-1\): 0 or more"),
        ({"time": timedelta(0)}, "more than nothing"),
        ({"time": "10", "preempt_seconds": 600}, r"told to stop at their start; give more than 10 minutes"),
        ({"preempt_seconds": -1}, r"slurm\(preempt_seconds=-1\): 0 to 65535"),
        ({"requeue": False, "max_restarts": 2}, "Slurm restarts a job by requeueing it"),
        ({"setup": ["pip install nemo_cpt"]}, "takes nemo_cpt from PyPI, where it is not"),
    ],
)
def test_slurm_refuses(arguments, says):
    with pytest.raises(CptError, match=says):
        slurm(**arguments)


def test_uncommitted_changes_are_refused_on_demand(project):
    (project / "tasks.py").write_text((project / "tasks.py").read_text() + "\n")
    with pytest.raises(CptError, match=r"not committed(.|\n)*M tasks.py"):
        prepared(slurm(tasks_per_node=1, code="committed"))


def test_code_that_cannot_be_listed_is_not_left_out_without_a_word(project, tmp_path):
    (project / ".git" / "HEAD").write_text("damaged")
    with pytest.raises(CptError, match=r"git cannot list the code of .*: fatal: "):
        prepared(slurm(tasks_per_node=1))
    outside = tmp_path / "outside"
    outside.mkdir()
    with pytest.raises(CptError, match="is in no git repository, where nothing is committed"):
        CodeSnapshot(refuse_uncommitted=True).package(outside, str(tmp_path), "t")


def test_what_can_be_imported_here_can_be_in_the_job(project, monkeypatch):
    """Modules beside a script in a folder of the repository, and in the folder that it was started from."""
    for name in ("started", "script", "env"):
        (project / name).mkdir()
    (project / "env" / "pyvenv.cfg").touch()
    (project / os.fsdecode(b"caf\xe9.py")).touch()  # no UTF-8
    monkeypatch.chdir(project / "started")
    monkeypatch.syspath_prepend(str(project / "env"))
    monkeypatch.syspath_prepend(str(project / "script"))
    experiment, request = prepared(slurm(tasks_per_node=1))
    code = f"{experiment._exp_dir}/t/code"
    assert f'"$(echo {code}:{code}/src:{code}/started:{code}/script:"$PYTHONPATH"' in request.materialize()
    assert os.fsdecode(b"caf\xe9.py") in os.listdir(code)


def test_what_is_set_on_an_executor_afterwards_counts():
    def fitted(gpus, **variables):
        executor = slurm()
        executor.gpus_per_node = gpus
        executor.env_vars |= variables
        executor.fit(SimpleNamespace(trainer=run.Config(dict, devices=4, accelerator="gpu", num_nodes=1)))
        return executor.ntasks_per_node, executor.gpus_per_node

    assert fitted(None) == fitted(4) == (4, 4)
    with pytest.raises(CptError, match="trainer has devices=4, and the job 8 tasks"):
        fitted(8)
    with pytest.raises(CptError, match="HF_TOKEN looks like a secret"):
        fitted(4, HF_TOKEN="x")


def test_an_engine_that_does_not_take_a_job_is_one_sentence(project, monkeypatch):
    import tasks

    def refuse(*args, **kwargs):
        raise APIError('could not select device driver "" with capabilities: [[gpu]]')

    monkeypatch.setattr(DockerContainer, "run", refuse)
    monkeypatch.setattr("nemo_cpt.doctor.containers.check_engine", lambda image: None)
    monkeypatch.setattr("docker.from_env", lambda: SimpleNamespace(images=SimpleNamespace(pull=lambda image: None)))
    with pytest.raises(CptError, match=r"^Docker did not take the job: could not select device driver"):
        run.run(run.Partial(tasks.report, path="seen"), executor=docker(), name="t")


def test_names_that_a_shell_would_take_apart_are_refused(project, tmp_path, monkeypatch):
    with pytest.raises(CptError, match=r"/my task: .*name the task and its experiment otherwise"):
        prepared(slurm(tasks_per_node=1), name="my task")
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(project / "tasks.py" / "home"))
    with pytest.raises(CptError, match=r"cannot be written .*NEMORUN_HOME names another place"):
        prepared(slurm(tasks_per_node=1))


def test_what_a_launchers_caller_has_on_stdin_is_left_to_it(project, monkeypatch):
    """As the rest of the list of `while read name; do nemo-cpt run ...; done`."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("next\n"))
    slurm(tasks_per_node=1)
    run.LocalTunnel(job_dir="").run("sleep 0.1")
    assert sys.stdin.read() == "next\n"


def test_submodules_are_shipped_as_they_are_on_disk(project, tmp_path):
    """One within another; with a file that is not committed, without an ignored one."""
    for name in ("outer", "inner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_module.py").touch()
        (tmp_path / name / ".gitignore").write_text("*.log\n")
        git(tmp_path / name, "init", "-q")
        git(tmp_path / name, "add", ".")
        git(tmp_path / name, "commit", "-qm", "first")
    allowed = ("-c", "protocol.file.allow=always", "submodule", "--quiet", "add")
    git(tmp_path / "outer", *allowed, str(tmp_path / "inner"), "inner")
    git(tmp_path / "outer", "commit", "-qm", "second")
    git(project, *allowed, str(tmp_path / "outer"), "libraries/outer")
    git(project, "-c", "protocol.file.allow=always", "submodule", "--quiet", "update", "--init", "--recursive")
    for name in ("new.py", "run.log"):
        (project / "libraries" / "outer" / "inner" / name).touch()
    with tarfile.open(CodeSnapshot().package(project, str(tmp_path), "code")) as packed:
        names = set(packed.getnames())
    here = {"tasks.py", "waiting.py", ".gitmodules"}
    outer = {f"libraries/outer/{name}" for name in ("outer_module.py", ".gitignore", ".gitmodules")}
    inner = {f"libraries/outer/inner/{name}" for name in ("inner_module.py", ".gitignore", "new.py")}
    assert names == here | outer | inner


def test_secrets_that_are_not_tracked_are_not_shipped(project, capfd):
    names = (".env", "keys/host.pem", "id_rsa", ".netrc", ".aws/config", "credentials.json", "run/secrets.env", "a.key")
    for name in (*names, ".env.example", "secrets.py", "keys/README.md", "tokenizer.json"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).touch()
    with tarfile.open(CodeSnapshot().package(project, str(project.parent), "code")) as packed:
        shipped = set(packed.getnames()) - {"tasks.py", "waiting.py"}
    assert shipped == {".env.example", "secrets.py", "keys/README.md", "tokenizer.json"}
    said = capfd.readouterr().err
    assert "not shipped with the code, secrets by their names: " in said
    assert all(name in said for name in names)
    git(project, "add", ".env")  # what is tracked is there on purpose
    with tarfile.open(CodeSnapshot().package(project, str(project.parent), "code")) as packed:
        assert ".env" in packed.getnames()


def test_large_untracked_files_are_not_shipped_unseen(project):
    with (project / "data.bin").open("wb") as file:
        file.truncate(60 * 2**20)
    with pytest.raises(CptError, match="60 MiB"):
        prepared(slurm(tasks_per_node=1))


def test_nemo_runs_own_folder_is_not_shipped(project, monkeypatch):
    """In a project: the code of every job would hold that of the jobs before."""
    import nemo_run.config

    monkeypatch.setattr(nemo_run.config, "_NEMORUN_HOME", str(project / "jobs"))
    folder = project / "jobs/experiments/t"
    folder.mkdir(parents=True)
    (project / "beside.txt").touch()
    with (folder / "data.tar.gz").open("wb") as file:
        file.truncate(60 * 2**20)
    with tarfile.open(CodeSnapshot().package(project, str(folder), "code")) as packed:
        assert set(packed.getnames()) == {"beside.txt", "tasks.py", "waiting.py"}


@pytest.mark.parametrize("home", [".", ".."])
def test_code_within_nemo_runs_own_folder_is_shipped(home, project, monkeypatch):
    import nemo_run.config

    monkeypatch.setattr(nemo_run.config, "_NEMORUN_HOME", str(project / home))
    folder = project / "experiments/t"
    folder.mkdir(parents=True)
    (folder / "old.tar.gz").touch()
    (project / "beside.txt").touch()
    with tarfile.open(CodeSnapshot().package(project, str(project.parent), "code")) as packed:
        theirs = {"experiments/t/old.tar.gz"} if home == ".." else set()  # a folder of the user's own
        assert set(packed.getnames()) == {"beside.txt", "tasks.py", "waiting.py"} | theirs


def test_outside_git_a_folder_of_many_python_files_is_refused(project, tmp_path, monkeypatch):
    many = tmp_path / "many"
    many.mkdir()
    for number in range(1001):
        (many / f"m{number}.py").touch()
    monkeypatch.chdir(many)
    with pytest.raises(CptError, match="in no git repository"):
        prepared(slurm(tasks_per_node=1))


@pytest.mark.parametrize(
    "directives",
    [
        {"mem": "64GiB", "mem_per_cpu": "4g", "tmp": 500},
        {"mem_per_gpu": "100GB", "cpus_per_gpu": np.int64(8)},
        {"sockets_per_node": "1-2", "threads_per_core": "*", "time_min": "1:00:00"},
    ],
)
def test_slurm_takes_what_sbatch_does(directives):
    assert slurm(**directives).additional_parameters.items() >= directives.items()


@pytest.mark.parametrize("size", ["16g", "1.5GB", ".5g", "16 g", "1024", "512M"])
def test_docker_takes_what_docker_reads(size):
    assert docker(shm_size=size).shm_size == size


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"ulimits": ["memlock"]}, "name=soft"),
        ({"mounts": ["/no/such"]}, "does not exist"),
        ({"gpus": -2}, "-1 or more"),
        ({"shm_size": "16Gi"}, r"docker\(shm_size='16Gi'\): give a size as Docker takes it"),
        ({"processes": 0}, "1 or more"),
    ],
)
def test_docker_refuses(arguments, says):
    with pytest.raises(CptError, match=says):
        docker(**arguments)


@pytest.fixture
def kube_config(tmp_path, monkeypatch):
    pytest.importorskip("kubernetes", reason="the kubernetes package is not installed")
    cluster = {"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    file = tmp_path / "kubeconfig"
    parts = {"clusters": [cluster], "contexts": [context], "users": [{"name": "u", "user": {}}], "current-context": "c"}
    file.write_text(yaml.safe_dump(parts))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))


@pytest.mark.parametrize("size", ["16Gi", ".5Gi", "1.5G", "1e9", "1E+9", "500M"])
def test_kubernetes_takes_quantities(size, kube_config):
    assert kubernetes("img", 8, "work", memory=size, shm_size=size)


def test_kubernetes_train_job(project, kube_config):
    executor = kubernetes(
        "img", 8, "work", nodes=2, secret="tokens", claims={"/data": "corpus"}, memory="900Gi", max_restarts=2,
        env={"WORDS": "a 'b' $c"},
    )  # fmt: skip
    _, request = prepared(executor)
    executor = request.executor
    body = executor.get_job_body("t-1", request.cmd)
    trainer = body["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 8, "img")
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8", "memory": "900Gi"}
    variables = {variable.pop("name"): variable for variable in trainer["env"]}
    secret = {"secretKeyRef": {"name": "tokens", "key": "HF_TOKEN", "optional": True}}
    assert variables["HF_TOKEN"] == {"valueFrom": secret}
    assert variables["PYTORCH_CUDA_ALLOC_CONF"] == {"value": "expandable_segments:True"}
    pod = body["spec"]["podTemplateOverrides"][0]["spec"]
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == {"/dev/shm", "/data"}
    script = (project.parent / "home").rglob("launch.sh")
    launched = next(script).read_text()
    assert f"{executor.code_dir}/configs/t_fn_or_script" in launched  # not the path on this machine
    assert "--nproc-per-node 8" in launched
    assert pod["terminationGracePeriodSeconds"] == 600
    assert f'PYTHONPATH="$(echo {executor.code_dir}/code:' in launched
    assert variables["WORDS"] == {"value": "a 'b' $c"}
    assert f"export WORDS={shlex.quote(variables['WORDS']['value'])}\n" in launched
    assert "; exec python -m nemo_cpt.executors.supervisor" in launched  # the first process is signalled
    assert "--max-restarts 2 -- torchrun" in launched


def test_a_dry_run_shows_the_train_job_and_its_script(project, kube_config, capsys):
    import tasks

    run.run(run.Partial(tasks.report, path="seen"), executor=kubernetes("img", 8, "work"), dryrun=True, name="t")
    manifest, _, script = capsys.readouterr().out.partition("apiVersion: ")[2].partition("# launch.sh\n")
    trainer = yaml.safe_load(f"apiVersion: {manifest}")["spec"]["trainer"]
    assert (trainer["image"], trainer["command"][0]) == ("img", "/bin/bash")
    assert "; exec python -m nemo_cpt.executors.supervisor" in script


def test_a_pod_has_the_time_that_its_recipe_needs_to_save(project, kube_config, headline):
    recipe, needed = headline
    pod = window_of(recipe, kubernetes("img", 8, "work")).pod_spec_overrides
    assert pod["terminationGracePeriodSeconds"] == needed.window
    given = window_of(recipe, kubernetes("img", 8, "work", preempt_seconds=120)).pod_spec_overrides
    assert given["terminationGracePeriodSeconds"] == 120


def test_kubernetes_ships_what_is_not_committed(project, kube_config, monkeypatch):
    from nemo_run.core.execution.kubeflow import KubeflowExecutor

    sent = []
    monkeypatch.setattr(
        KubeflowExecutor, "copy_to_workspace", lambda executor, folder, *args, **how: sent.append(folder)
    )
    (project / "tasks.py").write_text((project / "tasks.py").read_text() + "\n# changed\n")
    (project / "corpus").symlink_to("/srv/corpus")  # of no use in a pod
    (project / "same.py").symlink_to("tasks.py")
    _, request = prepared(kubernetes("img", 8, "work"))
    request.executor.package(request.executor.packager, job_name="t")
    assert Path(sent[0], "code", "same.py").read_text().endswith("# changed\n")
    assert "corpus" not in os.listdir(Path(sent[0], "code"))
    (project / "corpus").unlink()
    _, request = prepared(kubernetes("img", 8, "work", code="committed"))
    with pytest.raises(CptError, match="not committed"):
        request.executor.package(request.executor.packager, job_name="t")
    assert len(sent) == 1


def test_kubernetes_needs_a_gpu_and_a_cluster(tmp_path, monkeypatch):
    with pytest.raises(CptError, match="at least 1"):
        kubernetes("img", 0, "work")
    with pytest.raises(CptError, match=r"secrets=\['MY_KEY'\]\): they are keys of a Kubernetes Secret"):
        kubernetes("img", 8, "work", secrets=["MY_KEY"])
    with pytest.raises(CptError, match="max_restarts=-1"):
        kubernetes("img", 8, "work", max_restarts=-1)
    with pytest.raises(CptError, match=r"kubernetes\(memory='900gb'\): give a quantity as Kubernetes writes it"):
        kubernetes("img", 8, "work", memory="900gb")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(CptError, match="no cluster is configured here"):
        kubernetes("img", 8, "work")


@pytest.mark.parametrize(
    ("package", "executor", "says"),
    [
        ("kubernetes", "kubernetes('img', 8, 'work')", "pip install kubernetes"),
        ("sky", "skypilot('H100')", "Skypilot is not installed"),
    ],
)
def test_an_executor_says_which_package_is_missing(package, executor, says):
    """In a process of its own, because NeMo-Run looks for it when it is imported."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from nemo_cpt import CptError\n"
        "from nemo_cpt.executors import kubernetes, skypilot\n"
        f"try: {executor}\n"
        "except CptError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert says in done.stdout, done.stderr


@pytest.fixture
def sky(monkeypatch):
    """SkyPilot, or what stands for it where it is not installed."""
    install(monkeypatch)


def test_skypilot(project, monkeypatch, sky):
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    executor = skypilot(
        "H100", 8, nodes=2, infra="aws", setup=["pip install ./wheels/*.whl"], max_restarts=2, env={"PRICE": "5$$"}
    )
    assert executor.packager.check_uncommitted_changes
    _, request = prepared(executor)
    task = request.task.to_yaml_config()
    assert task["num_nodes"] == 2
    assert task["envs"]["PRICE"] == "5$$"
    assert task["resources"]["accelerators"] == {"H100": 8}
    assert task["setup"].startswith("pip install ./wheels/*.whl\n")
    assert task["setup"].endswith(">> ~/.bashrc")
    assert "python -m nemo_cpt.executors.supervisor" in task["run"]
    assert "--max-restarts 2 -- torchrun" in task["run"]
    assert "--nnodes 2 --nproc-per-node 8 --node-rank $SKYPILOT_NODE_RANK" in task["run"]
    assert "-m nemo_cpt.executors.runner -n t /nemo_run/configs/t_fn_or_script" in task["run"]
    assert "planted-secret" not in str(task)
    assert "planted-secret" in Path(task["file_mounts"]["~/.nemo_cpt_secrets.env"]).read_text()


@pytest.mark.parametrize(
    ("image", "installed"),
    [
        (
            None,
            ["conda deactivate", "python -m pip install -c /nemo_run/code/constraints.txt -e '/nemo_run/code[gpu]'"],
        ),
        ("docker:registry.example/nemo-cpt:1-root", ["python -m pip install --no-deps -e /nemo_run/code"]),
    ],
)
def test_skypilot_installs_the_checkout_that_it_ships(project, sky, image, installed):
    (project / "pyproject.toml").write_text('[project]\nname = "nemo_cpt"\n')
    git(project, "add", ".")
    git(project, "commit", "-qm", "a checkout of nemo_cpt")
    _, request = prepared(skypilot("H100", container_image=image, setup=["nvidia-smi"]))
    assert request.task.to_yaml_config()["setup"].splitlines() == ["nvidia-smi", *installed]


def test_skypilot_needs_something_that_brings_nemo_cpt(project, sky):
    with pytest.raises(CptError, match="nothing installs nemo_cpt on the machines"):
        skypilot("H100")
    assert skypilot("H100", container_image="docker:registry.example/nemo-cpt:1-root").setup == ""


@pytest.mark.parametrize(
    "line",
    [
        "pip install nemo_cpt", "pip3 install -U nemo-cpt", "uv pip install 'nemo_cpt[gpu]>=0.1'",
        "cd /x && python -m pip install torch nemo.cpt==0.1.0",
    ],
)  # fmt: skip
def test_nothing_is_taken_from_an_index_where_nemo_cpt_is_not(line):
    with pytest.raises(CptError, match="takes nemo_cpt from PyPI, where it is not"):
        checked_setup([line])


@pytest.mark.parametrize(
    "line",
    [
        "pip install -e /src/nemo_cpt", "pip install ./nemo_cpt", "pip install nemo_cpt-0.1.0-py3-none-any.whl",
        "pip install 'nemo_cpt[gpu] @ git+https://git.example/nemo_cpt'", "pip install nemo_cpt --index-url https://mine",
        "module load cuda", "pip install nemo_cpt_tools",
    ],
)  # fmt: skip
def test_ones_own_nemo_cpt_is_installed(line):
    assert checked_setup([line]) == [line]


def test_skypilot_refuses_uncommitted_changes(project, sky):
    (project / "tasks.py").write_text((project / "tasks.py").read_text() + "\n")
    executor = skypilot("H100", setup=["true"])
    executor.assign("t_1", str(project.parent), "t", "t")
    with pytest.raises(RuntimeError, match="uncommitted changes"):
        executor.package(executor.packager, "t")
