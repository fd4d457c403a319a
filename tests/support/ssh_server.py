"""A real sshd on this machine's loopback, which stands for a cluster's login node."""

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.support.executor_jobs import wait_until
from tests.support.slurm_cluster import free_port


def missing() -> str:
    """Return what is not installed, or an empty string."""
    absent = [name for name in ("sshd", "rsync") if not shutil.which(name)]
    return f"{' and '.join(absent)} not installed (apt-get install openssh-server rsync)" if absent else ""


class SshServer:
    """An sshd with keys of its own.

    Attributes:
        port: it listens on.
        key: private key that it takes.
        bin: folder for PATH, whose `ssh` knows the host without the user's own known_hosts.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self._folder, self.port, self.key, self.bin = folder, free_port(), folder / "user", folder / "bin"
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        variables = " ".join(f"{name}={value}" for name, value in environ.items())
        (folder / "config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
            f"PermitRootLogin yes\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile {folder}/pid\n"
            f"SetEnv {variables}\nSubsystem sftp internal-sftp\n"
        )
        self.bin.mkdir()
        options = f"-o UserKnownHostsFile={folder}/known -o StrictHostKeyChecking=accept-new"
        (self.bin / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
        (self.bin / "ssh").chmod(0o755)

    def start(self) -> None:
        """Listen."""
        Path("/run/sshd").mkdir(exist_ok=True)
        command = [str(shutil.which("sshd")), "-D", "-e", "-f", str(self._folder / "config")]
        self._daemon = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(self._answers)

    def stop(self) -> None:
        """End the daemon, and every connection that it holds, if it runs."""
        if self._daemon.poll() is not None:
            return
        for each in (*psutil.Process(self._daemon.pid).children(recursive=True), self._daemon):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.terminate()
        self._daemon.wait()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as connection:
            return connection.recv(4) == b"SSH-"
        return False
