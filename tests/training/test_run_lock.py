"""One job in a run's folder, whatever became of the one before, and wherever it ran."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_cpt.errors import CptError
from nemo_cpt.training import run_lock
from nemo_cpt.training.run_lock import RunLock, check_free, read_owner, this_job, wait_until_held_by

HOLDER = """
import multiprocessing, signal, sys
from pathlib import Path
from nemo_cpt.training.run_lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
writer = multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True)
writer.start()
print(writer.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run_1"
    for lock in list(run_lock._held.values()):
        lock.release()


def holder(folder: Path) -> tuple[subprocess.Popen, int]:
    """A process that holds the folder until its input is closed, and a writer that it forked."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def owner_elsewhere(folder: Path, **fields: Any) -> Path:
    """Let the folder be held by a process of another machine, and return the file that it touches."""
    elsewhere = dataclasses.replace(run_lock.this_process({}), boot="another", host="node7", **fields)
    path = folder / run_lock.FOLDER / "owner.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(elsewhere)))
    return path


def beat(path: Path, times: Iterator[float]) -> float:
    """In the place of time.sleep: a beat of another machine's holder."""
    os.utime(path, (stamp := next(times), stamp))
    return stamp


def test_a_second_job_is_refused_and_told_by_whom(folder: Path) -> None:
    first, _ = holder(folder)
    for refused in (lambda: RunLock(folder).acquire(), lambda: check_free(folder)):
        with pytest.raises(CptError, match=rf"run_1 is in use by process {first.pid} on .*, since 20"):
            refused()
    first.communicate("")
    assert read_owner(folder) is None
    check_free(folder)
    RunLock(folder).acquire()


def test_a_job_that_is_suspended_still_holds(folder: Path) -> None:
    first, writer = holder(folder)
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(CptError, match="is in use by"):
        RunLock(folder).acquire()
    first.kill()
    first.wait()
    os.kill(writer, signal.SIGKILL)


def test_the_lock_of_a_killed_job_is_taken_over_although_a_writer_lives(folder: Path) -> None:
    first, writer = holder(folder)
    first.kill()
    first.wait()
    assert read_owner(folder) is not None
    check_free(folder)
    RunLock(folder).acquire()
    assert read_owner(folder).pid == os.getpid()
    os.kill(writer, signal.SIGKILL)


def test_what_holds_it_on_another_machine_is_alive_while_it_touches_its_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, now = owner_elsewhere(folder), time.time()
    stamps = iter(now + count for count in range(1000))
    monkeypatch.setattr(time, "sleep", lambda seconds: beat(path, stamps))
    for refused in (lambda: RunLock(folder).acquire(), lambda: check_free(folder)):
        with pytest.raises(CptError, match=r"is in use by process .* on node7"):
            refused()
    assert read_owner(folder).boot == "another"


def test_without_a_beat_it_is_taken_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner_elsewhere(folder)
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.3)
    RunLock(folder).acquire()
    assert read_owner(folder).pid == os.getpid()


def test_one_of_last_week_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(owner_elsewhere(folder), (0, 0))
    monkeypatch.setattr(run_lock, "_beats_within", lambda *args: pytest.fail("it was waited for"))
    RunLock(folder).acquire()


@pytest.mark.parametrize(
    ("held_by", "here", "answer", "free"),
    [
        (("c", "7", 0), {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, "", True),  # requeued
        (("c", "7", 1), {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, "", False),  # another step of this job
        (("c", "7", 0), {"SLURM_JOB_ID": "8"}, "echo COMPLETED", True),  # the one before in a chain
        (("c", "7", 0), {"SLURM_JOB_ID": "8"}, "echo error: Invalid job id specified >&2; exit 1", True),
        (("c", "7", 0), {"SLURM_JOB_ID": "8"}, "echo RUNNING", False),
        # A user's filter hides it, as Slurm's own squeue does.
        (("c", "7", 0), {"SLURM_JOB_ID": "8", "SQUEUE_PARTITION": "cpu"}, "echo ${SQUEUE_PARTITION-RUNNING}", False),
        (("c", "7", 0), {"SLURM_JOB_ID": "8"}, "echo Unable to contact slurm controller >&2; exit 1", False),
        (("other", "7", 0), {"SLURM_JOB_ID": "8"}, "echo COMPLETED", False),  # another cluster's job 7
    ],
)  # fmt: skip
def test_slurm_knows_what_became_of_a_job(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_by: tuple, here: dict, answer: str, free: bool
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n{answer}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in ({"SLURM_CLUSTER_NAME": "c", "SLURM_RESTART_COUNT": "0"} | here).items():
        monkeypatch.setenv(name, value)
    path = owner_elsewhere(folder, slurm=held_by)
    stamps = (time.time() + count for count in itertools.count())  # subprocess sleeps, too, while it waits
    monkeypatch.setattr(time, "sleep", lambda seconds: beat(path, stamps))
    if free:
        RunLock(folder).acquire()
    else:
        with pytest.raises(CptError, match="Slurm job 7"):
            RunLock(folder).acquire()


def test_a_job_that_was_taken_over_writes_no_more(folder: Path) -> None:
    lock = RunLock(folder)
    lock.acquire()
    lock.check()
    owner_elsewhere(folder)
    with pytest.raises(CptError, match=r"was taken over by process .* on node7"):
        run_lock.check_held(folder)
    lock.release()
    assert read_owner(folder).boot == "another"  # it is not ours to remove


def test_the_other_ranks_wait_for_rank_0(folder: Path) -> None:
    RunLock(folder).acquire()
    wait_until_held_by(this_job(), folder)
    with pytest.raises(CptError, match="rank 0 did not take"):
        wait_until_held_by("another job", folder, patience=0)


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file")
    with pytest.raises(CptError, match=r"cannot be written: .* Give the run another directory"):
        RunLock(folder).acquire()
