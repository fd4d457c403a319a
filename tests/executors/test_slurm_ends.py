"""How Slurm's jobs end and come back, against a real cluster; what their script makes of it: test_slurm_script.py."""

from pathlib import Path

import nemo_run as run
import pytest

from nemo_cpt import CptError
from nemo_cpt.executors import slurm
from tests.executors.test_slurm import submit
from tests.support.executor_jobs import wait_until


def acts(path, *names, **options):
    """Submit a job of one task that does these one after the other, a start each."""
    import tasks

    return submit(run.Partial(tasks.act, path=str(path), acts=list(names)), slurm(tasks_per_node=1, **options))


def started(path, number, name):
    wait_until(Path(f"{path}.{number}.{name}").exists)


def what_the_script_said(experiment):
    """Over all starts."""
    return "".join(log.read_text() for log in Path(experiment._exp_dir).glob("t/sbatch_*.out"))


def secrets_of(experiment):
    return list(Path(experiment._exp_dir).rglob("secrets.env"))


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-secret")


def test_jobs_come_back_whatever_slurm_ends_them_for_unless_they_are_cancelled(slurm_here, project, tmp_path, secret):
    """All at once: on one node they are preempted, with and without a grace period, on the other time is up or ends."""
    import tasks

    preempted, others = {"nodelist": "cpt2", "time": "30"}, {"nodelist": "cpt1", "time": "30"}
    graceful = preempted | {"partition": "patient"}
    plan = {
        "saves": (("save", "end"), graceful),
        "dies": (("die", "crash", "end"), graceful | {"max_restarts": 1}),
        "dies without grace": (("die", "end"), preempted),
        "is killed without grace": (("stay", "crash", "end"), preempted | {"max_restarts": 1}),
        "is told of its limit": (("save", "end"), others | {"preempt_seconds": 60}),
        "is killed at its limit": (("stay", "end"), others | {"preempt_seconds": 0}),
        "is requeued": (("die", "end"), others),
        "is cancelled": (("stay", "end"), others),
    }
    found = {name: acts(tmp_path / name, *names, **options) for name, (names, options) in plan.items()}
    slow_import = slurm(tasks_per_node=1, env={"NEVER_IMPORTED_AT_FIRST": str(tmp_path / "importing")}, **graceful)
    found["imports"] = submit(run.Partial(tasks.report, path=str(tmp_path / "imported")), slow_import)
    wait_until((tmp_path / "importing").exists)
    for name, (names, _) in plan.items():
        started(tmp_path / name, 0, names[0])
    limited = [found[name][1] for name in ("is told of its limit", "is killed at its limit")]
    for job in limited:
        slurm_here.set_minutes_left(job, 1)
    slurm_here.run("scontrol", "requeue", found["is requeued"][1])
    slurm_here.run("scancel", found["is cancelled"][1])
    slurm_here.run(
        "sbatch", "--partition=urgent", "--nodelist=cpt2", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    for job in limited:
        wait_until(lambda job=job: slurm_here.starts(job) > 1, every=0.5)
        slurm_here.set_minutes_left(job, 20)  # it was of one start; the next one must not depend on a minute
    for name, (_, job) in found.items():
        ended = slurm_here.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        assert ended == ("CANCELLED" if name == "is cancelled" else "COMPLETED"), name
    said = {name: what_the_script_said(experiment) for name, (experiment, _) in found.items()}
    assert "stopped ahead of the end (preempted), saved" in said["saves"]
    assert "stopped ahead of the end (preempted), nothing was trained yet" in said["imports"]
    assert "stopped ahead of the end (time limit), saved" in said["is told of its limit"]
    assert "told to stop (preempted), and ended unsaved (exit code 1)" in said["dies"]
    for name in ("dies", "is killed without grace"):  # preemptions are no restarts
        assert "exit code 3; restart 1 of 1" in said[name]
    assert not any(secrets_of(experiment) for experiment, _ in found.values())


def test_a_limit_within_which_the_tasks_would_be_told_at_once_is_refused(slurm_here, project, tmp_path, secret):
    """The partition's own, which is known when Slurm has the job."""
    with pytest.raises(CptError, match="the job's time limit is 60 s, and its tasks would be told to stop 600 s"):
        acts(tmp_path / "t", "end", partition="short")
    wait_until(lambda: slurm_here.jobs() == [])  # it may have started before it was cancelled
    assert not list((tmp_path / "home").rglob("secrets.env"))
