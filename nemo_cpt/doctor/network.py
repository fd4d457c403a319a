"""Whether the ranks of a job reach each other."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemo_cpt.doctor.allreduce import MARK
from nemo_cpt.doctor.examination import Examination, Finding, alongside

RANK_SECONDS = 90  # importing torch on several ranks of a slow file system takes most of it
CONNECT_SECONDS = 3
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
MEETING = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


def interfaces(examination: Examination) -> Finding:
    """Whether NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name interfaces that this machine has."""
    given = {name: examination.environ[name] for name in INTERFACES if examination.environ.get(name)}
    present = [name for _, name in socket.if_nameindex()]
    if not given or not examination.place.here:
        return Finding("network interfaces", "ok", f"chosen by NCCL and gloo among {', '.join(present)}")
    for variable, value in given.items():
        # NCCL takes beginnings of names, gloo whole ones.
        if not chosen_interfaces(value, present, exact=variable.startswith("GLOO")):
            cure = f"set {variable} to one of {', '.join(present)}, or unset it"
            return Finding("network interfaces", "error", f"{variable}={value} matches none here", cure)
    return Finding("network interfaces", "ok", ", ".join(f"{name}={value}" for name, value in given.items()))


def chosen_interfaces(value: str, present: list[str], exact: bool = False) -> list[str]:
    """The interfaces that a value of NCCL_SOCKET_IFNAME takes, as NCCL's documentation has it.

    Args:
        value: beginnings of names, separated by commas; `^` in front excludes them, `=` takes whole names.
        present: the machine's interfaces.
        exact: whether names are always whole, as for gloo.
    """
    # `eth` takes eth0 and eth1, `=eth0` that one alone, `^docker` all but those.
    excludes = value.startswith("^")
    names = value.removeprefix("^")
    exact = exact or names.startswith("=")
    wanted = [name for name in names.removeprefix("=").split(",") if name]

    def listed(name: str) -> bool:
        return any(name == each if exact else name.startswith(each) for each in wanted)

    return [name for name in present if listed(name) != excludes]


def rendezvous(examination: Examination) -> Finding:
    """Whether the first node's address resolves, and its port can be bound there or reached from the others."""
    name, job = "rendezvous", examination.job
    nodes = max(examination.nodes, job.nodes if job and job.place.here else 1)
    if nodes == 1:
        return Finding(name, "skipped", "one machine")
    missing = [each for each in MEETING if not examination.environ.get(each)]
    if missing:
        cure = "set them on every node: the first node's address, a free port of it, and 0, 1, ... as NODE_RANK"
        return Finding(name, "error", f"{nodes} nodes, and {', '.join(missing)} not set", cure)
    address, port, rank = (examination.environ[each] for each in MEETING)
    if not (port.isdecimal() and rank.isdecimal() and 0 < int(port) < 2**16):
        return Finding(name, "error", f"MASTER_PORT={port}, NODE_RANK={rank}", "give a port below 65536 and 0, 1, ...")
    try:
        resolved = str(socket.getaddrinfo(address, int(port), type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        cure = "give the first node's IP address, or a name that every node resolves (/etc/hosts, DNS)"
        return Finding(name, "error", f"MASTER_ADDR={address} does not resolve ({error})", cure)
    # The first node listens, the others connect: each tries what it will have to do.
    return _bind(name, address, resolved, int(port)) if rank == "0" else _connect(name, address, resolved, int(port))


def _bind(name: str, address: str, resolved: str, port: int) -> Finding:
    try:
        with socket.create_server((resolved, port), family=_family(resolved)):
            return Finding(name, "ok", f"{address}:{port} ({resolved}) is free on this machine, the first node")
    except OSError as error:
        cure = f"choose another MASTER_PORT, or an address of this machine (is {address} the first node's?)"
        return Finding(name, "error", f"{address}:{port} ({resolved}) cannot be bound ({error.strerror})", cure)


def _connect(name: str, address: str, resolved: str, port: int) -> Finding:
    try:
        socket.create_connection((resolved, port), CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        # The machine answers, and nobody listens yet: as it should be before the first node has started.
        return Finding(name, "ok", f"{address} ({resolved}) answers; the first node does not listen on {port} yet")
    except OSError as error:
        cure = f"open port {port} (and those above 1024 that NCCL takes) between the nodes, or mend the route"
        return Finding(name, "error", f"{address}:{port} ({resolved}) cannot be reached ({error})", cure)
    return Finding(name, "ok", f"{address}:{port} ({resolved}) is reached")


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@alongside
def ranks(examination: Examination) -> Finding:
    """Whether the ranks join and add up: an all-reduce over NCCL, or over gloo where there are no GPUs."""
    name, job = "ranks", examination.job
    wanted = job.gpus_here if job else 0
    count = examination.ranks or (wanted if 1 < wanted <= len(examination.visible_gpus) else 0)
    if count * examination.nodes < 2:
        return Finding(name, "skipped", "one process; --ranks N joins N of them")
    missing = [each for each in MEETING if examination.nodes > 1 and not examination.environ.get(each)]
    if missing:
        return Finding(name, "skipped", f"{', '.join(missing)} not set (see rendezvous)")
    answer, problem = join(count, examination.nodes, examination.environ)
    if answer is None:
        cure = "set NCCL_DEBUG=INFO and run again; often: NCCL_SOCKET_IFNAME, a firewall, /dev/shm, another's GPU"
        return Finding(name, "error", problem, cure)
    world = f"{count * examination.nodes} ranks" + (f" on {examination.nodes} nodes" if examination.nodes > 1 else "")
    if not answer:
        return Finding(name, "ok", f"{world} joined (the first node has the figures)")
    figures = f"joined in {answer['joined']:.1f} s, {answer['gb_per_second']:.3g} GB/s in a sum of 64 MiB"
    return Finding(name, "ok", f"{world} over {answer['backend']}: {figures}")


def join(
    count: int, nodes: int, environ: Mapping[str, str], seconds: float = RANK_SECONDS
) -> tuple[dict[str, Any] | None, str]:
    """Start `count` ranks here and wait for their all-reduce.

    Returns:
        What rank 0 printed (empty on other nodes than the first) and "", or None and what went wrong.
    """
    node = int(environ["NODE_RANK"]) if nodes > 1 else 0
    # Of several nodes the user's own, which every node must have alike.
    meeting = {} if nodes > 1 else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    shared = {"WORLD_SIZE": str(count * nodes), "LOCAL_WORLD_SIZE": str(count), "DOCTOR_SECONDS": str(seconds)}
    shared |= {"NCCL_DEBUG": environ.get("NCCL_DEBUG", "WARN"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    # Files, not pipes: a rank that prints much must not wait for a reader.
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank{local}") for local in range(count)]
        started = [
            _start({**environ, **shared, **meeting, "RANK": str(node * count + local), "LOCAL_RANK": str(local)}, log)
            for local, log in enumerate(logs)
        ]
        # Within the folder's life: a rank that is killed must not write into a folder that is gone.
        codes = _wait(started, seconds)
        texts = [log.read_text(errors="replace") for log in logs]
    return _judged(codes, texts, seconds)


def _start(environ: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "nemo_cpt.doctor.allreduce"]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env=environ, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
        )


def _wait(started: "list[subprocess.Popen[bytes]]", seconds: float) -> list[int | None]:
    """Exit codes; once one rank has failed, or the time is up, the others are ended and have None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = [each.poll() for each in started]
        if all(code == 0 for code in codes) or any(codes):
            break
        time.sleep(0.05)
    time.sleep(0.3 if any(each.poll() for each in started) else 0)  # the others' own messages
    codes = [each.poll() for each in started]
    for each in started:
        with suppress(ProcessLookupError):
            # Each leads a session of its own: what it started ends with it.
            os.killpg(each.pid, signal.SIGKILL)
        each.wait()
    return codes


def _judged(codes: list[int | None], texts: list[str], seconds: float) -> tuple[dict[str, Any] | None, str]:
    if all(code == 0 for code in codes):
        printed = [line.removeprefix(MARK) for line in texts[0].splitlines() if line.startswith(MARK)]
        return (json.loads(printed[-1]) if printed else {}), ""
    # The first that failed by itself; those that were ended here have no code.
    failed = next((rank for rank, code in enumerate(codes) if code), None)
    if failed is None:
        waiting = [str(rank) for rank, code in enumerate(codes) if code is None]
        return None, f"ranks {', '.join(waiting)} still waited for the others after {seconds:g} s"
    lines = [line.strip() for line in texts[failed].splitlines() if line.strip()]
    return None, f"rank {failed} failed: {lines[-1] if lines else f'exit code {codes[failed]}'}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
