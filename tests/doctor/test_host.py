"""Shared memory, locked memory and variables, and what an examination does with checks that hang or fall ill."""

import os
import resource
import threading
from types import SimpleNamespace

import pytest

from nemo_cpt.doctor import Examination, Finding, Job, Place, examine, host, worst
from nemo_cpt.doctor.examination import alongside
from nemo_cpt.errors import CptError

EIGHT = Job("r", gpus_per_node=8, tensor_model_parallel_size=2)


def shm(gib: float) -> SimpleNamespace:
    return SimpleNamespace(f_frsize=4096, f_blocks=int(gib * 2**18), f_bavail=int(gib * 2**18))


@pytest.mark.parametrize(
    ("job", "gib", "state"),
    [(EIGHT, 16, "ok"), (EIGHT, 8, "warning"), (Job("r"), 8, "ok"), (Job("r"), 0.0625, "warning")],
)
def test_shared_memory(monkeypatch, job, gib, state):
    monkeypatch.setattr(os, "statvfs", lambda path: shm(gib))
    found = host.shared_memory(Examination(job))
    assert (found.state, "--shm-size=16g" in found.cure) == (state, state == "warning")


def test_shared_memory_of_this_machine_is_read():
    status = os.statvfs("/dev/shm")
    size = status.f_blocks * status.f_frsize / 2**30
    assert host.shared_memory(Examination()).found.startswith(f"{size:.1f} GiB, ")
    elsewhere = Job("r", gpus_per_node=8, place=Place("slurm", here=False))
    assert host.shared_memory(Examination(elsewhere)).state == "skipped"


def test_locked_memory():
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if soft == resource.RLIM_INFINITY:
        assert host.locked_memory(Examination(EIGHT)).state == "ok"
        return
    found = host.locked_memory(Examination(EIGHT))
    assert (found.state, found.found) == ("warning", f"{soft / 2**20:g} MiB")
    assert "--ulimit memlock=-1" in found.cure
    assert host.locked_memory(Examination(Job("r"))).state == "skipped"


def test_attention_variables():
    assert host.attention_variables(Examination(EIGHT, environ={})).state == "ok"
    assert host.attention_variables(Examination(EIGHT, environ={"NVTE_FUSED_ATTN": "1"})).found == "NVTE_FUSED_ATTN"
    found = host.attention_variables(Examination(EIGHT, environ={"NVTE_FUSED_ATTN": "0"}))
    assert found.state == "error"
    assert found.found.startswith("NVTE_FUSED_ATTN=0 contradicts attention_backend=auto")
    assert found.cure.startswith("unset NVTE_FLASH_ATTN")
    flash = Job("r", attention_backend="flash")
    assert host.attention_variables(Examination(flash, environ={"NVTE_FUSED_ATTN": "0"})).state == "ok"
    added = Job("r", place=Place(environ={"NVTE_FLASH_ATTN": "0"}))
    assert host.attention_variables(Examination(added, environ={})).state == "error"


@pytest.mark.parametrize(
    ("job", "value", "state"),
    [(EIGHT, "1", "ok"), (EIGHT, None, "warning"), (EIGHT, "32", "warning"), (Job("r"), None, "skipped")],
)
def test_device_connections(job, value, state):
    environ = {} if value is None else {"CUDA_DEVICE_MAX_CONNECTIONS": value}
    assert host.device_connections(Examination(job, environ=environ)).state == state


def test_checks_run_side_by_side_and_none_can_stop_the_others():
    together, end = threading.Barrier(2), threading.Event()

    @alongside
    def hangs(examination):
        end.wait()

    def falls_ill(examination):
        raise ZeroDivisionError("by zero")

    def is_explained(examination):
        raise CptError("the key is 7: give 8")

    @alongside
    def waits(examination):
        together.wait()  # passed only when both of them run at once
        return [Finding("first", "ok", "1"), Finding("second", "ok", "2")]

    findings = examine((waits, hangs, falls_ill, is_explained, waits), Examination(), seconds=3)
    end.set()
    assert [(each.name, each.state) for each in findings] == [
        ("first", "ok"),
        ("second", "ok"),
        ("hangs", "warning"),
        ("falls ill", "warning"),
        ("is explained", "error"),
        ("first", "ok"),
        ("second", "ok"),
    ]
    assert findings[2].found == "no answer in 3 s"
    assert "ZeroDivisionError" in findings[3].found
    assert (findings[4].found, findings[4].cure) == ("the key is 7", "give 8")
    assert worst(findings) == "error"
    assert worst(findings[:4]) == "warning"
    assert worst(findings[:2]) == "ok"
