"""What a job starts lives through the signals that stop the job, and ends with it."""

import subprocess
import sys

import psutil
import pytest

from nemo_cpt import signals
from tests.support.executor_jobs import wait_until

STARTS = """
import multiprocessing, os, signal, subprocess, sys
from nemo_cpt.signals import STOP_SIGNALS, shield_children

def child(pipe):
    grandchild = multiprocessing.get_context("fork").Process(target=signal.pause)
    grandchild.start()
    pipe.send((os.getpid(), grandchild.pid))
    signal.pause()

if __name__ == "__main__":
    os.setsid()
    if "shielded" in sys.argv:
        shield_children()
    pids, manager = [], None
    for method in ("fork", "spawn"):
        ours, theirs = multiprocessing.get_context(method).Pipe()
        multiprocessing.get_context(method).Process(target=child, args=(theirs,)).start()
        pids += ours.recv()
    manager = multiprocessing.get_context("spawn").Manager()
    queue, command = manager.Queue(), subprocess.Popen(["sleep", "infinity"])
    pids += [manager._process.pid, command.pid]
    caught = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: caught.append(number))
        os.killpg(0, number)
    assert caught == list(STOP_SIGNALS)
    print(*pids, flush=True)
    sys.stdin.readline()
    if "shielded" in sys.argv:
        queue.put(1)
        assert queue.get() == 1
    command.terminate()
    print(command.wait(), flush=True)
    sys.stdin.readline()
"""


def started(tmp_path, *arguments):
    script = tmp_path / "starts.py"
    script.write_text(STARTS)
    job = subprocess.Popen(
        [sys.executable, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return job, [int(pid) for pid in job.stdout.readline().split()]


def go_on(job):
    job.stdin.write("\n")
    job.stdin.flush()


def test_every_kind_of_child_lives_through_the_signals_and_dies_with_the_job(tmp_path):
    job, pids = started(tmp_path, "shielded")
    assert len(pids) == 6
    processes = [psutil.Process(pid) for pid in pids]
    assert all(each.status() != psutil.STATUS_ZOMBIE for each in processes)
    go_on(job)
    assert job.stdout.readline() == "-9\n"  # who ends a child on purpose ends it: it does not hear SIGTERM
    job.kill()
    job.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []


def test_without_the_shield_they_die_of_them(tmp_path):
    job, pids = started(tmp_path)
    wait_until(lambda: not any(map(lives, pids[2:])))
    job.kill()
    job.wait()


def lives(pid):
    """Whether it has not ended; its parent, which is to reap it, does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_echo_is_not_a_second_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `timeout` sends them: to its command, and at once to the command's group."""
    clock = iter((0.0, 0.01, 5.0, 5.0, 5.02))
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))
    given = signals.Given()
    assert not given
    assert [given.add(number) for number in (15, 15, 15, 2, 2)] == [1, 0, 2, 1, 0]
    assert given
