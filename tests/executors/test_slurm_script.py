"""The ends of a Slurm job, by its script alone: scripts stand for Slurm's commands, and say what Slurm would."""

import os
import subprocess
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest

from nemo_cpt.executors.runner import UNTRAINED
from nemo_cpt.executors.slurm_job import ENDING, HEAD_ADDRESS

COMMANDS = {
    "srun": 'sh -c "$TASKS"',
    "scontrol": 'echo "$*" >> asked; case "$1 $SLURM_TIME_FORMAT" in "show standard") echo "$FACTS" ;; requeue*) '
    "exit $REFUSES ;; esac",
    "squeue": "for job in ${SQUEUE_STATES-$OTHER_JOBS}; do echo $job; done",
}
SAVED = "touch $marker"
BEFORE_TRAINING = f"echo '{UNTRAINED}' > $marker"


def facts(state="RUNNING", restarts=0, reason="None", preempted="None", ends_in=3600):
    end = (datetime.now() + timedelta(seconds=ends_in)).isoformat(timespec="seconds")
    return (
        f"JobId=7 JobName=cpt.t JobState={state} Reason={reason} Requeue=1 Restarts={restarts} ExitCode=0:0 "
        f"TimeLimit=01:00:00 EndTime={end} PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime={preempted} X=1"
    )


RUNS, CANCELLED = facts(), facts("COMPLETING")
PREEMPTED, REQUEUED = facts(preempted="2026-01-01T00:00:00"), facts("COMPLETING", restarts=1)
AHEAD_OF_LIMIT, AT_LIMIT = facts(ends_in=100), facts("COMPLETING", reason="TimeLimit")
NO_CONTROLLER = ""


@pytest.fixture
def ended(tmp_path):
    """Run the script to its end; of a job that is told nothing, comes back, and may restart twice unless said else."""
    for name, script in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    def run(slurm, tasks, **changes):
        (tmp_path / "secrets.env").touch()
        (tmp_path / "asked").write_text("")
        values = {"comes_back": 1, "max_restarts": 2, "preempt_seconds": 60, "jobs_behind": 0} | changes
        environ = {"FACTS": slurm, "TASKS": tasks, "REFUSES": "0", "OTHER_JOBS": "", "SLURM_JOB_ID": "7"}
        environ |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "marker": str(tmp_path / "marker")}
        environ |= {"refusal": str(tmp_path / "refusal")} | values.pop("environ", {})
        lines = [f"job={tmp_path}", *(f"{name}={value}" for name, value in values.items()), ENDING]
        # As NeMo-Run's script has it around ours.
        lines += ['srun task; exitcode=$?; set -e; echo "job exited with code $exitcode"; exit $exitcode']
        done = subprocess.run(
            ["bash", "-c", "\n".join(lines)], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120
        )
        asked = (tmp_path / "asked").read_text().splitlines()
        return SimpleNamespace(
            code=done.returncode,
            said=done.stdout,
            requeued=asked.count("requeue 7"),
            files={path.name for path in tmp_path.iterdir()} - {*COMMANDS, "asked", "marker", "refusal"},
        )

    return run


@pytest.mark.parametrize(
    ("slurm", "tasks", "code", "requeued", "left"),
    [
        # finished
        (RUNS, "true", 0, 0, {"finished"}),
        (AHEAD_OF_LIMIT, "true", 0, 0, {"finished"}),
        (CANCELLED, "true", 0, 0, {"finished"}),
        # refused
        (RUNS, "touch $refusal; exit 2", 2, 0, {"failed"}),
        (PREEMPTED, "touch $refusal; exit 2", 2, 0, {"failed"}),
        (RUNS, f"touch $refusal; {BEFORE_TRAINING}; exit 2", 2, 0, {"failed"}),  # one task; srun ends others
        # told to stop, and saved
        (RUNS, SAVED, 75, 1, {"secrets.env"}),  # by hand
        (AHEAD_OF_LIMIT, SAVED, 75, 1, {"secrets.env"}),
        (AHEAD_OF_LIMIT, f"{SAVED}; exit 137", 75, 1, {"secrets.env"}),  # killed after it saved
        (PREEMPTED, SAVED, 75, 1, {"secrets.env"}),
        (AT_LIMIT, SAVED, 75, 1, {"secrets.env"}),
        (REQUEUED, SAVED, 75, 0, {"secrets.env"}),  # Slurm brings it back
        (CANCELLED, SAVED, 75, 0, set()),
        (NO_CONTROLLER, SAVED, 75, 1, {"secrets.env"}),
        # told to stop before there was anything to save
        (RUNS, BEFORE_TRAINING, 75, 1, {"secrets.env"}),
        (PREEMPTED, BEFORE_TRAINING, 75, 1, {"secrets.env"}),
        (AHEAD_OF_LIMIT, BEFORE_TRAINING, 75, 1, {"secrets.env", "unsaved-7"}),
        (CANCELLED, BEFORE_TRAINING, 75, 0, set()),
        # told to stop, and unsaved: by a task that died of it, or was killed
        (PREEMPTED, "exit 143", 143, 1, {"secrets.env"}),
        (PREEMPTED, "exit 1", 1, 1, {"secrets.env"}),
        (REQUEUED, "exit 137", 137, 0, {"secrets.env"}),
        (AHEAD_OF_LIMIT, "exit 1", 1, 1, {"secrets.env", "unsaved-7"}),
        (AT_LIMIT, "exit 137", 137, 1, {"secrets.env", "unsaved-7"}),
        (CANCELLED, "exit 137", 137, 0, set()),
        # crashed
        (RUNS, "exit 1", 1, 1, {"secrets.env", "crashes-7"}),
        (RUNS, "exit 137", 137, 1, {"secrets.env", "crashes-7"}),
        (RUNS, f"{BEFORE_TRAINING}; exit 1", 1, 1, {"secrets.env", "crashes-7"}),  # srun ended those that were starting
        (facts(restarts=5), "exit 1", 1, 1, {"secrets.env", "crashes-7"}),  # preemptions are not counted
    ],
)
def test_ends(ended, slurm, tasks, code, requeued, left):
    restarts = {"SLURM_RESTART_COUNT": "5"} if "Restarts=5" in slurm else {}
    end = ended(slurm, tasks, environ=restarts)
    assert (end.code, end.requeued, end.files) == (code, requeued, left)
    assert f"job exited with code {code}\n" in end.said


def test_the_last_restart_of_those_allowed(ended):
    assert [ended(RUNS, "exit 1").requeued for _ in range(3)] == [1, 1, 0]
    end = ended(RUNS, "exit 1", max_restarts=0)
    assert (end.requeued, end.files) == (0, {"failed", "crashes-7"})


def test_a_job_that_never_saves_in_time_gives_up_at_the_third_limit(ended):
    assert [ended(AHEAD_OF_LIMIT, "exit 1").requeued for _ in range(2)] == [1, 1]
    end = ended(AHEAD_OF_LIMIT, "exit 1")
    assert (end.requeued, "failed" in end.files, "secrets.env" in end.files) == (0, True, False)
    assert "no checkpoint was written before 3 time limits in a row" in end.said


def test_a_save_in_time_begins_the_count_of_limits_anew(ended):
    for tasks in ("exit 1", "exit 1", SAVED, "exit 1", BEFORE_TRAINING):
        assert ended(AHEAD_OF_LIMIT, tasks).requeued == 1
    assert ended(AHEAD_OF_LIMIT, BEFORE_TRAINING).requeued == 0


def test_a_job_that_must_not_come_back(ended):
    for slurm in (RUNS, AHEAD_OF_LIMIT, PREEMPTED, AT_LIMIT):
        end = ended(slurm, SAVED, comes_back=0)
        assert (end.code, end.requeued, end.files) == (75, 0, set())
    assert ended(AHEAD_OF_LIMIT, "exit 1", comes_back=0).requeued == 0
    assert "secrets.env" in ended(RUNS, SAVED, comes_back=0, jobs_behind=2).files  # for the next job of the chain
    assert "secrets.env" not in ended(RUNS, "true", comes_back=0, jobs_behind=2).files


def test_slurm_does_not_take_it_back(ended):
    end = ended(RUNS, SAVED, environ={"REFUSES": "1"})
    assert (end.code, end.files) == (75, set())
    assert "Slurm does not take the job back; submit it again" in end.said
    assert ended(RUNS, "exit 1", environ={"REFUSES": "1"}).files == {"failed", "crashes-7"}


def test_a_task_of_an_array_is_asked_for_by_its_own_number_and_the_last_removes_the_secrets(ended, tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    others = {"OTHER_JOBS": "7_0 7_1", "SQUEUE_STATES": ""}  # the latter is a user's, and hides them
    assert "secrets.env" in ended(RUNS, "true", environ=array | others).files
    assert "secrets.env" not in ended(RUNS, "true", environ=array | {"OTHER_JOBS": "7_1"}).files
    ended(RUNS, SAVED, environ=array)
    assert set((tmp_path / "asked").read_text().splitlines()) == {"show job -o 7_1", "requeue 7_1"}


TELL = "kill -TERM $(ps -o ppid= -p $PPID)"  # the script, as Slurm does, while its tasks run


@pytest.mark.parametrize(
    ("addresses", "shown", "met_at"),
    [
        ("10.0.0.5 192.168.0.5", "NodeAddr=gpu1", "10.0.0.5"),
        ("fe80::1%eth0 10.0.0.5", "NodeAddr=gpu1", "10.0.0.5"),
        ("127.0.1.1", "NodeAddr=172.16.0.1 NodeHostName=gpu1 Port=0", "172.16.0.1"),  # as Debian's installer has it
        ("::1 127.0.0.1", "", "gpu1"),
    ],
)
def test_tasks_meet_where_other_nodes_can_reach(tmp_path, addresses, shown, met_at):
    (tmp_path / "scontrol").write_text(
        f"#!/bin/sh\n[ -z '{shown}' ] || echo NodeName=gpu1 Arch=x86_64 {shown} Version=23\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "head_node": "gpu1", "head_node_ip": addresses}
    script = f"{HEAD_ADDRESS}\nprintenv MASTER_ADDR"
    assert subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True).stdout == f"{met_at}\n"


def test_at_its_limit_a_job_is_brought_back_before_its_tasks_end(ended, tmp_path):
    end = ended(AT_LIMIT, f"{TELL}; until grep -q requeue asked; do sleep 0.02; done; exit 137")
    assert (end.code, (tmp_path / "unsaved-7").read_text()) == (137, "1\n")


def test_a_cancelled_jobs_secrets_are_gone_before_its_tasks_end(ended):
    assert ended(CANCELLED, f"{TELL}; while [ -e secrets.env ]; do sleep 0.02; done; exit 5").code == 5
