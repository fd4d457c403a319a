"""What a run over SSH is said to be doing, by its files and by Slurm's queue; `executors/test_ssh.py` has the rest."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_cpt.cli.watching import app
from nemo_cpt.training.metrics import END_FILE
from nemo_cpt.watching import remote
from nemo_cpt.watching.remote import Connection, Queued, Reached, RemoteFollower, _in_queue
from tests.support import run_folders

START = 1_800_000_000.0  # of the job


@pytest.mark.parametrize(
    ("printed", "job"),
    [
        ("", Queued("")),
        ("PENDING N/A\n", Queued("PENDING")),
        ("RUNNING 2027-01-15T08:00:00\n", Queued("RUNNING", START)),
        ("PENDING N/A\nRUNNING 2027-01-15T08:00:00\nPENDING 2027-01-16T08:00:00\n", Queued("RUNNING", START)),
    ],
)
def test_what_squeue_prints_of_a_job_or_a_chain(printed: str, job: Queued) -> None:
    assert _in_queue(printed) == job


@pytest.mark.parametrize(
    ("job", "described", "ended", "state"),
    [
        (None, None, None, "starting"),
        (Queued("PENDING"), None, None, "queued"),
        (Queued("PENDING"), -100, -50, "queued"),  # requeued, or to be resumed
        (Queued("RUNNING", START), None, None, "starting"),
        (Queued("RUNNING", START), -100, -50, "starting"),
        (Queued("RUNNING", START), -100, None, "starting"),  # whose last start was killed
        (Queued("RUNNING", START), 30, None, "running"),
        (Queued("COMPLETING", START), 30, 60, "stopped"),
        (Queued(""), 30, 60, "stopped"),
        (Queued(""), 30, None, "killed"),
        (Queued(""), None, None, "killed"),
    ],
)
def test_the_state_by_the_files_and_the_queue(
    tmp_path: Path, job: Queued | None, described: int | None, ended: int | None, state: str
) -> None:
    """Seconds from the job's start."""
    if described is not None:
        run_folders.describe(tmp_path, started=datetime.fromtimestamp(START + described, UTC).isoformat(" "))
    if ended is not None:
        end = {"state": "stopped", "step": 3, "message": "saved", "time": START + ended}
        (tmp_path / END_FILE).write_text(json.dumps(end))
    connection = Connection(Reached("title_1", tmp_path, ["7"], "host", "user", 22, None), tmp_path)
    connection.job = job
    shown = RemoteFollower(connection).snapshot()
    assert (shown.state, shown.trouble) == (state, "")


def test_a_job_is_gone_when_the_queue_has_missed_it_twice_and_its_files_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = Connection(Reached("title_1", tmp_path, ["7"], "host", "user", 22, None), tmp_path)
    runs, known = Queued("RUNNING", START), []
    monkeypatch.setattr(connection, "fetch", lambda: known.append(connection.job))
    for told in (runs, None, Queued(""), runs, Queued(""), Queued("")):
        monkeypatch.setattr(connection, "_queued", lambda told=told: told)
        connection.look()
    assert [*known, connection.job] == [None, runs, runs, runs, runs, runs, Queued("")]


def test_how_old_it_is_is_said_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = Connection(Reached("title_1", tmp_path, ["7"], "host", "user", 22, None), tmp_path)
    connection.trouble = "Connection refused"
    follower = RemoteFollower(connection)
    monkeypatch.setattr(time, "monotonic", lambda: connection.heard + 90.4)
    assert follower.snapshot().trouble == "not heard of for 90 s (Connection refused)"


def test_a_run_whose_job_waits_is_no_misspelt_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tmp_path / "home/experiments/tiny/tiny_1800000000/train"
    (task / "configs").mkdir(parents=True)
    (task.parent / "_TASKS").touch()
    (task / "configs/train_executor.yaml").write_text("_target_: nemo_cpt.executors.slurm_job.SlurmJob\n")
    arguments = {"base": "base", "data": {"train": {"ds": 1.0}}, "name": "mine", "directory": "results"}
    config = {"recipe": "tiny.continual_pretrain", "arguments": arguments, "overrides": []}
    (task / "configs/train_config.yaml").write_text(json.dumps(config))
    monkeypatch.setattr("nemo_cpt.launching.experiments._home", lambda: tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    told = str(CliRunner().invoke(app, ["watch", "mine"]).exception)
    assert "made no folder for it yet: it waits, starts or has failed. nemo-cpt status tiny_1800000000" in told
    assert remote.not_begun("min", Path("results")) is None
    # Where runs are kept elsewhere, it is none of theirs.
    for directory, waits in (("results", "tiny_1800000000"), ("nowhere", "there is no folder nowhere")):
        assert waits in str(CliRunner().invoke(app, ["watch", "-d", directory]).exception)
    (tmp_path / "results/mine").mkdir(parents=True)
    assert remote.not_begun("mine", Path("results")) is None
