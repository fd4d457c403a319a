"""Against a real cluster of two nodes; skipped, with the reason, where Slurm is not installed."""

import errno
import json
import re
import subprocess
import threading
from pathlib import Path

import nemo_run as run
import pytest

from nemo_cpt import CptError
from nemo_cpt.errors import StoppedEarlyError
from nemo_cpt.executors import slurm
from nemo_cpt.launching import jobs
from tests.support.executor_jobs import assert_no_secret, wait_until
from tests.support.slurm_cluster import SlurmCluster, missing


def submit(task, executor):
    """Submit without waiting; returns the experiment and its job's id."""
    with run.Experiment("t", executor=executor, enable_goodbye_message=False) as experiment:
        experiment.add(task, name="t")
        experiment.run(detach=True)
    return experiment, experiment.jobs[0].handle.rpartition("/")[2]


def log_of(experiment):
    """Everything the tasks printed, over all starts; empty before the first."""
    return "".join(log.read_text() for log in Path(experiment._exp_dir).glob("t/log-*.out"))


def test_two_nodes_run_the_code_on_disk_and_the_log_is_followed(slurm_here, project, tmp_path, monkeypatch, capfd):
    """Uncommitted changes travel; the tasks run in the folder they were submitted from; the secret is in no file."""
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    (project / "extra.py").write_text("VALUE = 1\n")
    (project / "tasks.py").write_text((project / "tasks.py").read_text() + "\nimport extra\n")
    import tasks

    # Slurm lets these win over what stands in a script.
    for name, value in {"PARTITION": "urgent", "TIMELIMIT": "1", "SIGNAL": "B:KILL@10", "OUTPUT": "/dev/null"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    executor = slurm(partition="cpu", nodes=2, tasks_per_node=1, time="30", env={"COLOUR": "dark red"})
    run.run(run.Partial(tasks.report, path=str(tmp_path / "seen")), executor=executor, name="t")
    seen = [json.loads((tmp_path / f"seen.{rank}").read_text()) for rank in (0, 1)]
    assert {each["env"]["SLURMD_NODENAME"] for each in seen} == {"cpt1", "cpt2"}
    assert {each["env"]["HF_TOKEN"] for each in seen} == {"planted-secret"}
    assert {each["env"]["COLOUR"] for each in seen} == {"dark red"}
    assert {each["cwd"] for each in seen} == {str(project)}
    assert {each["env"]["SLURM_JOB_PARTITION"] for each in seen} == {"cpu"}
    job = seen[0]["env"]["SLURM_JOB_ID"]
    shown = slurm_here.run("scontrol", "show", "job", job)
    assert "TimeLimit=00:30:00" in shown
    assert f"StdOut={tmp_path}" in shown
    assert all(each["file"].endswith("/t/code/tasks.py") for each in seen)
    assert seen[0]["env"]["WANDB_RUN_ID"].startswith("t_")
    assert "reported rank 1" in capfd.readouterr().out
    assert_no_secret(tmp_path, b"planted-secret", allowed="seen.")


def test_secret_stands_in_one_file_of_mode_600_while_the_job_runs(slurm_here, project, tmp_path, monkeypatch):
    import tasks

    monkeypatch.setenv("MY_KEY", "planted 'secret'")
    counter = tmp_path / "counter"
    experiment, job = submit(
        run.Partial(tasks.count, path=str(counter), until=1000), slurm(tasks_per_node=1, time="30", secrets=["MY_KEY"])
    )
    wait_until(counter.exists)
    (file,) = Path(experiment._exp_dir).rglob("secrets.env")
    assert file.stat().st_mode & 0o777 == 0o600
    assert_no_secret(tmp_path, b"planted", allowed="secrets.env")
    assert "planted" not in subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    slurm_here.run("scancel", job)
    assert slurm_here.wait_for(job, "CANCELLED") == "CANCELLED"  # it saved on SIGTERM, and must not come back
    wait_until(lambda: not file.exists())  # Slurm says so while the job's script still clears up


def test_a_preempted_job_comes_back_and_goes_on(slurm_here, project, tmp_path):
    """The signal ahead of the limit is Slurm's own, sent by hand; then an administrator's requeue."""
    import tasks

    counter, go = tmp_path / "counter", tmp_path / "go"
    task = run.Partial(tasks.count, path=str(counter), until=30, go=str(go))
    experiment, job = submit(task, slurm(tasks_per_node=1, time="30", preempt_seconds=60))
    wait_until(lambda: counter.exists() and int(counter.read_text() or 0) > 3)
    slurm_here.run("scancel", "--signal=TERM", job)
    wait_until(lambda: "stopped at" in log_of(experiment) and log_of(experiment).count("starting at") == 2)
    slurm_here.run("scontrol", "requeue", job)
    wait_until(lambda: log_of(experiment).count("stopped at") == 2)
    go.touch()
    slurm_here.wait_for(job, "COMPLETED")
    log = log_of(experiment)
    starts = [int(line.rpartition(" ")[2]) for line in log.splitlines() if line.startswith("starting at")]
    stops = [int(line.rpartition(" ")[2]) for line in log.splitlines() if line.startswith("stopped at")]
    assert starts == [0, *stops]
    assert "counted to 30" in log


def test_stopped_without_requeueing_it_is_neither_finished_nor_failed(slurm_here, project, tmp_path):
    """As at the limit; the launcher, which waits for the job, ends as the job does."""
    import tasks

    counter = tmp_path / "counter"
    stop = threading.Thread(target=stop_the_job, args=(slurm_here, counter), daemon=True)
    stop.start()
    with pytest.raises(StoppedEarlyError, match="task t: told to stop, saved"):
        run.run(
            run.Partial(tasks.count, path=str(counter), until=1000),
            executor=slurm(tasks_per_node=1, time="30", requeue=False),
            name="t",
        )
    stop.join()
    assert [task["status"] for task in jobs.status(None)["tasks"]] == ["STOPPED"]


def stop_the_job(cluster, counter):
    wait_until(lambda: counter.exists() and int(counter.read_text() or 0) > 3)
    (job,) = cluster.jobs()
    cluster.run("scancel", "--signal=TERM", job)


def test_a_failed_task_raises_and_ends_its_chain(slurm_here, project, monkeypatch):
    """Two jobs, one behind the other: the first fails, the second does not repeat it."""
    import tasks

    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    task = run.Partial(tasks.fail, message="planted failure")
    with pytest.raises(CptError, match=r"ended as FAILED(.|\n)*planted failure") as raised:
        run.run(task, executor=slurm(tasks_per_node=1, time="30", chain=2), name="t")
    path = str(raised.value).partition("last lines of ")[2].partition(":\n")[0]
    assert Path(path).read_text().count("planted failure") <= 3  # in one traceback, once started
    assert "an earlier job of the chain failed" in "".join(
        log.read_text() for log in Path(path).parent.glob("sbatch_*.out")
    )
    assert not Path(path).with_name("secrets.env").exists()


def test_a_chain_goes_on_where_the_first_job_stopped(slurm_here, project, tmp_path):
    """The first of three is stopped as at its limit, the second finishes, the third ends at once."""
    import tasks

    counter, go = tmp_path / "counter", tmp_path / "go"
    executor = slurm(tasks_per_node=1, time="30", chain=3)
    experiment, last = submit(run.Partial(tasks.count, path=str(counter), until=25, go=str(go)), executor)
    first = json.loads(Path(experiment._exp_dir, "t", "slurm_jobs.json").read_text())[0]
    assert len(slurm_here.jobs()) == 3
    wait_until(lambda: counter.exists() and int(counter.read_text() or 0) > 3)
    slurm_here.run("scancel", "--signal=TERM", first)
    assert slurm_here.wait_for(first, "FAILED", "COMPLETED") == "FAILED"  # it stopped early, which is no success
    go.touch()
    assert slurm_here.wait_for(last, "COMPLETED") == "COMPLETED"
    log = log_of(experiment)
    assert log.count("starting at") == 2
    assert "counted to 25" in log
    assert run.Experiment.from_id(experiment._id).status(return_dict=True)["t"]["status"].name == "SUCCEEDED"


def test_cancel_ends_every_job_of_a_chain(slurm_here, project, tmp_path, monkeypatch):
    """Also those that have not started, and what they would have needed."""
    import tasks

    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    task = run.Partial(tasks.count, path=str(tmp_path / "counter"), until=1000)
    experiment, _ = submit(task, slurm(tasks_per_node=1, time="30", chain=3))
    (file,) = Path(experiment._exp_dir).rglob("secrets.env")
    with monkeypatch.context() as elsewhere:  # a controller that does not answer
        silent = re.sub("(SlurmctldPort)=.*", r"\1=1", (slurm_here.folder / "slurm.conf").read_text())
        (tmp_path / "slurm.conf").write_text(silent)
        elsewhere.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
        with pytest.raises(
            CptError, match=r"t was not cancelled: Slurm did not cancel it\. scancel: error: .* contact"
        ):
            jobs.cancel(experiment._id)
    assert file.exists()
    assert jobs.cancel(experiment._id)["tasks"] == ["t"]
    wait_until(lambda: slurm_here.jobs() == [])
    assert not file.exists()
    assert [task["status"] for task in jobs.status(experiment._id)["tasks"]] == ["CANCELLED"]
    assert jobs.cancel(experiment._id)["ended"] == {"t": "CANCELLED"}


def test_a_crash_is_restarted_and_a_dependent_task_waits(slurm_here, project, tmp_path):
    import tasks

    held = slurm_here.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true")
    executor = slurm(tasks_per_node=1, time="30", max_restarts=1)
    waits = slurm(tasks_per_node=1, time="30", dependency=f"afterany:{held}")
    with run.Experiment("t", executor=executor, enable_goodbye_message=False) as experiment:
        first = experiment.add(run.Partial(tasks.crash_once, path=str(tmp_path / "mark")), name="first")
        report = run.Partial(tasks.report, path=str(tmp_path / "seen"))
        experiment.add(report, waits, name="second", dependencies=[first])
        experiment.run(detach=True)
    ids = [job.handle.rpartition("/")[2] for job in experiment.jobs]
    (behind,) = [line for line in slurm_here.run("scontrol", "show", "job", ids[1]).split() if "Dependency=" in line]
    assert {f"afterany:{held}", f"afterok:{ids[0]}"} <= set(re.findall(r"after\w+:\d+", behind))
    slurm_here.run("scontrol", "release", held)
    assert slurm_here.wait_for(ids[1], "COMPLETED") == "COMPLETED"
    (log,) = Path(experiment._exp_dir).glob("first/log-*.out")
    assert "second start 1" in log.read_text()
    assert (tmp_path / "seen.0").exists()


def test_what_the_user_must_change_is_not_tried_again(slurm_here, project):
    import tasks

    task = run.Partial(tasks.refuse, message="planted refusal")
    experiment, job = submit(task, slurm(tasks_per_node=2, time="30", max_restarts=2))
    assert slurm_here.wait_for(job, "FAILED") == "FAILED"
    assert "Restarts=0" in slurm_here.run("scontrol", "show", "job", job)
    assert log_of(experiment).count("nemo_cpt: planted refusal") <= 2  # once a task


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"partition": "nope"}, "invalid partition specified: nope"),
        ({"gpus_per_node": 8}, "Requested node configuration is not available"),
        ({"nodes": 5, "tasks_per_node": 1}, "more nodes, tasks, GPUs or memory than there are"),
    ],
)
def test_slurms_own_words_and_no_job_left_behind(slurm_here, project, arguments, says, tmp_path, monkeypatch):
    import tasks

    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    with pytest.raises(CptError, match=says):
        submit(run.Partial(tasks.report, path="seen"), slurm(time="30", **arguments))
    assert slurm_here.jobs() == []
    assert not list(tmp_path.rglob("secrets.env"))


def test_a_job_that_could_not_be_noted_is_not_left_behind(slurm_here, project, monkeypatch):
    import tasks

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nemo_cpt.executors.slurm_job._save_job_dir", full)
    with pytest.raises(OSError, match="No space left"):
        submit(run.Partial(tasks.count, path="counter", until=1000), slurm(tasks_per_node=1, time="30"))
    wait_until(lambda: slurm_here.jobs() == [])  # it may have started before it was cancelled


def test_sbatch_missing(project, monkeypatch):
    import tasks

    monkeypatch.setattr("nemo_cpt.executors.slurm_job.SBATCH", "sbatch-that-is-not-here")
    with pytest.raises(CptError, match="submit from a login node"):
        submit(run.Partial(tasks.report, path="seen"), slurm(tasks_per_node=1))


def test_upstream_still_needs_an_accounting_database(slurm_here, project):
    """The patch in SlurmJobScheduler.describe can go once this fails."""
    assert "accounting storage is disabled" in subprocess.run(["sacct"], capture_output=True, text=True).stderr
    import inspect

    from nemo_run.run.torchx_backend.schedulers.slurm import SlurmTunnelScheduler

    assert "scontrol" not in inspect.getsource(SlurmTunnelScheduler.describe)


@pytest.fixture
def forgetful(tmp_path_factory, project, monkeypatch):
    """A cluster that forgets a job two seconds after its end, as others do some minutes after it."""
    if reason := missing():
        pytest.skip(reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), remembers=2) as cluster:  # sockets' paths must be short
        for name, value in cluster.environ.items():
            monkeypatch.setenv(name, value)
        yield cluster


def test_a_launcher_ends_although_slurm_has_forgotten_its_job(forgetful, tmp_path):
    """A chain that failed, a job that was cancelled before it began, one that was cancelled while it ran."""
    import tasks

    held = forgetful.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true")
    counted = {"path": str(tmp_path / "counter"), "until": 100000}
    given = {
        "fails": (run.Partial(tasks.fail, message="planted failure"), slurm(tasks_per_node=1, time="30", chain=2)),
        "waits": (run.Partial(tasks.count, **counted), slurm(tasks_per_node=1, time="30", dependency=f"after:{held}")),
        "runs": (run.Partial(tasks.count, **counted), slurm(tasks_per_node=1, time="30")),
    }
    started = {name: submit(*each) for name, each in given.items()}
    wait_until(lambda: Path(counted["path"]).exists(), every=0.5)
    forgetful.run("scancel", started["waits"][1], started["runs"][1])
    wait_until(lambda: not any(forgetful.state(job) for _, job in started.values()), every=0.5)
    for name, state in (("fails", "FAILED"), ("waits", "CANCELLED"), ("runs", "CANCELLED")):
        assert jobs.status(started[name][0]._id)["tasks"][0]["status"] == state, name
