"""Submitting over SSH: a real sshd on this machine's loopback stands for the login node."""

import dataclasses
import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nemo_run as run
import pytest

from nemo_cpt import CptError
from nemo_cpt.executors import slurm, ssh
from nemo_cpt.executors.supervisor import REACHED_FILE
from nemo_cpt.training.metrics import END_FILE, METRICS_FILE, append_metrics
from tests.support import run_folders
from tests.support.ssh_server import SshServer, missing
from tests.support.terminals import Terminal


@pytest.fixture(scope="module")
def login_node(cluster, tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    server = SshServer(tmp_path_factory.mktemp("sshd"), cluster.environ)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def reach(login_node, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{login_node.bin}:{os.environ['PATH']}")
    remote, user = str(tmp_path / "remote"), getpass.getuser()
    return ssh("127.0.0.1", user, remote, identity=str(login_node.key), port=login_node.port)


def test_over_ssh_code_and_secret_travel_and_the_log_comes_back(project, reach, cluster, tmp_path, monkeypatch, capfd):
    import tasks

    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    (project / "linked.py").symlink_to("tasks.py")
    executor = slurm(tasks_per_node=1, time="5", tunnel=reach, venv=str(Path(sys.executable).parents[1]))
    run.run(run.Partial(tasks.report, path=str(tmp_path / "seen")), executor=executor, name="t")
    seen = (tmp_path / "seen.0").read_text()
    assert "planted-secret" in seen
    assert f'"file": "{tmp_path}/remote/t/' in seen
    assert "reported rank 0" in capfd.readouterr().out
    (linked,) = (tmp_path / "remote").rglob("code/linked.py")
    assert linked.read_text() == (project / "tasks.py").read_text()
    assert not [path for path in (tmp_path / "remote").rglob("*") if path.is_file() and b"planted" in path.read_bytes()]


def submit(tunnel):
    import tasks

    with run.Experiment("t", executor=slurm(tasks_per_node=1, tunnel=tunnel)) as experiment:
        experiment.add(run.Partial(tasks.report, path="x"), name="t")
        experiment.run(detach=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"job_dir": "/dev/null/jobs"}, "cannot be copied to 127.0.0.1, into /dev/null/jobs/.*: mkdir: "),
        ({"port": 1}, "SSH to .*port 1: .*(refused|Unable to connect)"),
        ({"identity": "/no/key"}, "no such key file"),
    ],
)
def test_ssh_refused(project, reach, change, says):
    with pytest.raises(CptError, match=says):
        submit(dataclasses.replace(reach, **change))


def test_a_key_that_is_not_taken(project, reach, tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    with pytest.raises(CptError, match="neither the key"):
        submit(dataclasses.replace(reach, identity=str(tmp_path / "other")))


def submit_a_recipe(project, reach):
    """A held job of the tiny recipe's: Slurm has it, and it never starts. Returns its folders here and there."""
    from nemo_cpt import catalog
    from nemo_cpt.launching import jobs

    executor = slurm(tasks_per_node=1, time="5", tunnel=reach, hold=True)
    arguments = {"base": "base", "tokenizer": "hf", "max_steps": 100, "name": "far"}
    found = jobs.submit(catalog.recipe("tiny"), arguments, [], executor, detach=True)
    (here,) = (project.parent / "home").glob(f"experiments/*/{found['experiment']}/*/{REACHED_FILE}")
    return here, Path(json.loads(here.read_text())["runs_in"]) / "results/far"


def test_a_run_over_ssh_is_watched_and_outlives_a_broken_connection(
    project, reach, login_node, cluster, tmp_path, monkeypatch
):
    """Its files are made up: what is to be shown is how they come here, and what Slurm says of the job."""
    record, far = submit_a_recipe(project, reach)
    (job,) = json.loads(record.read_text())["jobs"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    counted = login_node.bin / "rsync"
    counted.write_text(f'#!/bin/sh\nsaid=$({shutil.which("rsync")} --stats "$@"); code=$?\n'
                       f'echo "$said" >> {tmp_path}/transfers; exit $code\n')  # fmt: skip
    counted.chmod(0o755)
    command = [sys.executable, "-m", "nemo_cpt.cli", "watch", "far"]
    terminal = Terminal(command, cwd=tmp_path, columns=110, NEMORUN_HOME=str(project.parent / "home"))
    terminal.until("far queued")
    # A job that runs in its place: the test's own is not to import NeMo.
    runs = cluster.run("sbatch", "--parsable", "--wrap", "sleep 600", "--output", "/dev/null")
    cluster.wait_for(runs, "RUNNING")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"jobs": [runs]}))
    terminal.press("q")
    assert terminal.ends() == 0
    terminal.close()
    terminal = Terminal(command, cwd=tmp_path, columns=110, NEMORUN_HOME=str(project.parent / "home"))
    terminal.until("far starting")
    run_folders.describe(far, started=time.strftime("%Y-%m-%d %H:%M:%S+00:00", time.gmtime()))
    run_folders.measure(far, 60)
    (far / "checkpoints/a/weights").mkdir(parents=True)
    (far / "checkpoints/a/weights/shard").write_bytes(bytes(10_000_000))
    terminal.until(r"far running +step 60 of 100[\s\S]*saved 1, the newest a")
    login_node.stop()
    terminal.until(r"not heard of for \d+ s \([^)]*(refused|closed|reset)")
    append_metrics(far, {"step": 61, "time": time.time()})
    login_node.start()
    shown = terminal.until("step 61 of 100")
    assert "not heard of" in shown
    cluster.run("scancel", runs, job)
    (far / END_FILE).write_text(json.dumps({"state": "finished", "step": 61, "time": time.time(), "message": ""}))
    terminal.until("far finished")
    assert terminal.ends() == 0
    terminal.close()
    fetched = (tmp_path / "cache/nemo_cpt/watched").rglob("*")
    assert sum(path.stat().st_size for path in fetched if path.is_file()) < 100_000  # no weights
    sent = re.findall(r"Literal data: ([\d,]+) bytes", (tmp_path / "transfers").read_text())
    assert sum(int(each.replace(",", "")) for each in sent) < 1.5 * (far / METRICS_FILE).stat().st_size
