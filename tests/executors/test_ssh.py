"""Submitting over SSH: a real sshd on this machine's loopback stands for the login node."""

import contextlib
import dataclasses
import getpass
import os
import shutil
import socket
import subprocess
from pathlib import Path

import nemo_run as run
import pytest

from nemo_cpt import CptError
from nemo_cpt.executors import slurm, ssh
from tests.support.executor_jobs import wait_until


@pytest.fixture(scope="module")
def login_node(cluster, tmp_path_factory):
    """An sshd with its own keys; returns its port and the private key that it takes."""
    from tests.support.slurm_cluster import free_port

    sshd = shutil.which("sshd")
    if not sshd or not shutil.which("rsync"):
        pytest.skip("sshd or rsync not installed (apt-get install openssh-server rsync)")
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"PermitRootLogin yes\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile {folder}/pid\n"
        f"SetEnv SLURM_CONF={cluster.environ['SLURM_CONF']}\nSubsystem sftp internal-sftp\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    daemon = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "config")], stderr=subprocess.DEVNULL)
    client = folder / "bin" / "ssh"  # rsync's ssh must know the host without the user's own known_hosts
    client.parent.mkdir()
    options = f"-o UserKnownHostsFile={folder}/known -o StrictHostKeyChecking=accept-new"
    client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    client.chmod(0o755)
    wait_until(lambda: _answers(port))
    yield port, folder / "user", client.parent
    daemon.terminate()
    daemon.wait()


def _answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
        return connection.recv(4) == b"SSH-"
    return False


@pytest.fixture
def reach(login_node, tmp_path, monkeypatch):
    port, key, bin_folder = login_node
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    return ssh("127.0.0.1", getpass.getuser(), str(tmp_path / "remote"), identity=str(key), port=port)


def test_over_ssh_code_and_secret_travel_and_the_log_comes_back(project, reach, cluster, tmp_path, monkeypatch, capfd):
    import sys

    import tasks

    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    executor = slurm(tasks_per_node=1, time="5", tunnel=reach, venv=str(Path(sys.executable).parents[1]))
    run.run(run.Partial(tasks.report, path=str(tmp_path / "seen")), executor=executor, name="t")
    seen = (tmp_path / "seen.0").read_text()
    assert "planted-secret" in seen
    assert f'"file": "{tmp_path}/remote/t/' in seen
    assert "reported rank 0" in capfd.readouterr().out
    assert not [path for path in (tmp_path / "remote").rglob("*") if path.is_file() and b"planted" in path.read_bytes()]


def submit(tunnel):
    import tasks

    with run.Experiment("t", executor=slurm(tasks_per_node=1, tunnel=tunnel)) as experiment:
        experiment.add(run.Partial(tasks.report, path="x"), name="t")
        experiment.run(detach=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"port": 1}, "SSH to .*port 1: .*(refused|Unable to connect)"), ({"identity": "/no/key"}, "no such key file")],
)
def test_ssh_refused(project, reach, change, says):
    with pytest.raises(CptError, match=says):
        submit(dataclasses.replace(reach, **change))


def test_a_key_that_is_not_taken(project, reach, tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    with pytest.raises(CptError, match="neither the key"):
        submit(dataclasses.replace(reach, identity=str(tmp_path / "other")))
