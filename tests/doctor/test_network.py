"""Ranks that join and ranks that do not, in real processes; addresses, ports and interfaces of this machine."""

import socket
import subprocess
import sys
import threading

import pytest

from nemo_cpt.doctor import Examination, Job, Place, network
from nemo_cpt.doctor.network import chosen_interfaces

PRESENT = ["lo", "eth0", "eth1", "ib0", "docker0"]


def test_two_ranks_join():
    found = network.ranks(Examination(ranks=2))
    assert found.state == "ok"
    assert found.found.startswith("2 ranks over gloo: joined in ")


def test_two_nodes_join(monkeypatch):
    """Two examinations at once, as on two machines; one rank each."""
    port = network._free_port()
    found = {}

    def node(rank: int) -> None:
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": str(rank), "PATH": "/usr/bin"}
        found[rank] = network.ranks(Examination(ranks=1, nodes=2, environ=environ))

    threads = [threading.Thread(target=node, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].found.startswith("2 ranks on 2 nodes over gloo")
    assert (found[1].state, found[1].found) == ("ok", "2 ranks on 2 nodes joined (the first node has the figures)")


def test_a_rank_that_fails_is_quoted(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('planted failure')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = network.ranks(Examination(ranks=2))
    assert found.state == "error"
    assert "failed: ImportError: planted failure" in found.found


def test_a_rank_that_is_missing_is_waited_for_no_longer_than_asked():
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(network._free_port()), "NODE_RANK": "0", "PATH": "/bin"}
    answer, problem = network.join(1, 2, environ, seconds=1.5)
    assert answer is None
    assert problem == "ranks 0 still waited for the others after 1.5 s"


def test_one_process_needs_nobody():
    assert network.ranks(Examination()).state == "skipped"
    assert network.ranks(Examination(Job("r", gpus_per_node=8))).state == "skipped"  # there are no 8 GPUs here


@pytest.mark.parametrize(
    ("value", "exact", "chosen"),
    [
        ("eth", False, ["eth0", "eth1"]),
        ("eth", True, []),
        ("=eth0", False, ["eth0"]),
        ("=eth", False, []),
        ("^docker,lo", False, ["eth0", "eth1", "ib0"]),
        ("^=eth0", False, ["lo", "eth1", "ib0", "docker0"]),
        ("ib,eth1", False, ["eth1", "ib0"]),
        ("bond0", False, []),
    ],
)
def test_interfaces_are_chosen_as_nccl_does(value, exact, chosen):
    assert chosen_interfaces(value, PRESENT, exact) == chosen


def test_interfaces_of_this_machine():
    assert network.interfaces(Examination(environ={})).state == "ok"
    assert network.interfaces(Examination(environ={"NCCL_SOCKET_IFNAME": "lo"})).state == "ok"
    found = network.interfaces(Examination(environ={"NCCL_SOCKET_IFNAME": "bond7"}))
    assert (found.state, found.found) == ("error", "NCCL_SOCKET_IFNAME=bond7 matches none here")
    assert "lo" in found.cure
    away = Job("r", place=Place("slurm", here=False))
    assert network.interfaces(Examination(away, environ={"NCCL_SOCKET_IFNAME": "bond7"})).state == "ok"


def meet(**environ):
    return network.rendezvous(Examination(Job("r", place=Place(nodes=2)), environ=environ))


def test_rendezvous():
    assert network.rendezvous(Examination(Job("r"))).state == "skipped"
    assert "NODE_RANK not set" in meet(MASTER_ADDR="127.0.0.1", MASTER_PORT="1").found
    assert "does not resolve" in meet(MASTER_ADDR="no.such.host.invalid", MASTER_PORT="1", NODE_RANK="1").found
    assert meet(MASTER_ADDR="127.0.0.1", MASTER_PORT="first", NODE_RANK="0").state == "error"
    assert meet(MASTER_ADDR="127.0.0.1", MASTER_PORT="99999", NODE_RANK="0").state == "error"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        taken = meet(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK="0")
        assert (taken.state, "another MASTER_PORT" in taken.cure) == ("error", True)
        assert meet(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK="1").found.endswith("is reached")
    assert meet(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK="0").state == "ok"
    assert "does not listen" in meet(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK="1").found


def test_the_rank_is_a_program_of_its_own():
    done = subprocess.run([sys.executable, "-m", "nemo_cpt.doctor.allreduce"], capture_output=True, text=True)
    assert "KeyError: 'RANK'" in done.stderr
