"""The driver's answers: as recorded, in trouble, and what it does not tell."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_cpt.doctor import Examination, Job, gpus, nvidia, software

IN_USE = "0, GPU-11111111-aaaa, 81559, 30079, Disabled, 550.54.15, NVIDIA H100 80GB HBM3"
HOG = "GPU-11111111-aaaa, 4242, 51200, /usr/bin/python3, with a comma"
TWO = (
    "1, GPU-22222222-bbbb, 81559, 81079, Disabled, 550.54.15, NVIDIA H100 80GB HBM3\n"
    "0, GPU-11111111-aaaa, 81559, 81079, Disabled, 550.54.15, NVIDIA H100 80GB HBM3"
)
SPARK = "0, GPU-33333333-cccc, [N/A], [N/A], [N/A], 580.95.05, NVIDIA GB10"
SLICED = "0, GPU-44444444-dddd, 81920, 81000, Enabled, 580.65.06, NVIDIA A100-SXM4-80GB"


def job(**changes) -> Job:
    return Job("llama31_8b.continual_pretrain", **{"gpus_per_node": 1} | changes)


def state(finding):
    return finding.state, finding.found


def test_no_gpu_is_no_fault_of_a_machine_and_one_of_a_job(machine):
    machine(error="NVMLError_LibraryNotFound")
    assert gpus.gpus(Examination()).state == "skipped"
    found = gpus.gpus(Examination(job(gpus_per_node=8)))
    assert state(found) == ("error", "none, and llama31_8b.continual_pretrain takes 8")
    assert found.cure.startswith("run it elsewhere")  # to take fewer than none is no cure
    assert software.driver(Examination(job())).state == "error"
    assert gpus.gpu_memory(Examination(job())).state == "skipped"


def test_a_free_gpu(machine):
    machine()
    examination = Examination(job())
    assert state(gpus.gpus(examination)) == ("ok", "1 x NVIDIA H100 80GB HBM3 79.6 GiB")
    assert state(gpus.gpu_memory(examination)) == ("ok", "79.2 GiB free")
    assert examination.nvidia.cuda == "12.4"


def test_what_an_h200_said(machine):
    """Recorded there, while a process held 90 GiB."""
    gpu = "0, GPU-d6db2b2c-f5fb-9bd4-536e-bbdf371e7ca6, 143771, 143156, Disabled, 580.159.04, NVIDIA H200"
    machine(gpu, cuda="13.0")
    assert gpus.gpu_memory(Examination(job())).found == "139.8 GiB free"
    machine(
        gpu.replace("143156", "50478"), "GPU-d6db2b2c-f5fb-9bd4-536e-bbdf371e7ca6, 430, 92678, python3", cuda="13.0"
    )
    found = gpus.gpu_memory(Examination(job()))
    assert state(found) == ("error", "GPU 0: 91.1 of 140.4 GiB in use by python3 (pid 430 90.5 GiB)")
    assert (examination := Examination()).nvidia.driver == "580.159.04"
    assert examination.nvidia.cuda == "13.0"


def test_a_hog_is_named_and_stops_a_job(machine):
    machine(IN_USE, HOG)
    alone, launched = gpus.gpu_memory(Examination()), gpus.gpu_memory(Examination(job()))
    assert (alone.state, launched.state) == ("warning", "error")
    assert alone.found == ("GPU 0: 50.3 of 79.6 GiB in use by python3, with a comma (pid 4242 50.0 GiB)")
    assert "CUDA_VISIBLE_DEVICES" in launched.cure


def test_memory_in_use_by_nobody_visible(machine):
    machine(IN_USE.replace("30079", "71559"), "")
    found = gpus.gpu_memory(Examination(job()))
    assert found.state == "warning"
    assert "no process is shown" in found.found


def test_what_the_driver_does_not_tell_is_no_error(machine):
    machine(SPARK, "GPU-33333333-cccc, 77, [N/A], python", cuda="")
    examination = Examination(job())
    assert state(gpus.gpus(examination)) == ("ok", "1 x NVIDIA GB10")
    assert state(gpus.gpu_memory(examination)) == ("ok", "the driver does not tell")
    assert examination.nvidia.processes[0].used_mib is None


def test_slices_are_warned_of(machine):
    machine(SLICED)
    found = gpus.gpus(Examination(job()))
    assert found.state == "warning"
    assert "MIG" in found.found


def test_too_few_hidden_and_too_small(machine, monkeypatch):
    machine(TWO)
    assert gpus.gpus(Examination(job(gpus_per_node=2))).state == "ok"
    few = gpus.gpus(Examination(job(gpus_per_node=8)))
    assert state(few) == ("error", "2 x NVIDIA H100 80GB HBM3 79.6 GiB; the job takes 8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    hidden = gpus.gpus(Examination(job(gpus_per_node=2)))
    assert hidden.state == "error"
    assert "CUDA_VISIBLE_DEVICES='1' hides them" in hidden.cure
    small = gpus.gpus(Examination(job(gpu_memory_gib=141)))
    assert small.state == "error"
    assert "gpu_memory_gib=80" in small.cure
    assert gpus.gpus(Examination(job(gpu_memory_gib=80))).state == "ok"


@pytest.mark.parametrize(
    ("devices", "chosen"),
    [(None, [0, 1]), ("", []), ("-1", []), ("1", [1]), ("1,0", [1, 0]), ("0,7,1", [0]), ("GPU-2222", [1])],
)
def test_visible_devices_are_cudas(machine, devices, chosen):
    machine(TWO)
    assert [gpu.index for gpu in nvidia.visible(nvidia.read().gpus, devices)] == chosen


@pytest.mark.parametrize(
    ("error", "said", "cure"),
    [
        ("NVMLError_LibRmVersionMismatch", "RM has detected an NVML/RM version mismatch.", "reboot"),
        ("NVMLError_DriverNotLoaded", "Driver Not Loaded", "modprobe nvidia"),
        ("NVMLError_GpuIsLost", "GPU is lost", "restart the machine"),
    ],
)
def test_a_driver_in_trouble_is_quoted(machine, error, said, cure):
    machine(error=error)
    found = software.driver(Examination(job()))
    assert state(found) == ("error", said)
    assert cure in found.cure
    assert software.driver(Examination()).state == "error"
    assert software.driver(Examination(job(gpus_per_node=0))).state == "skipped"


def test_a_driver_without_gpus(machine):
    machine("")
    found = software.driver(Examination(job()))
    assert state(found) == ("error", "the NVIDIA driver lists no GPU")
    assert "--gpus all" in found.cure


def test_gpus_that_a_container_was_not_given_are_passed_over_and_lost_ones_are_not(machine):
    withheld = "0, NVMLError_NoPermission, 0, 0, Disabled, 550.54.15, none"
    machine(f"{withheld}\n{TWO.splitlines()[0]}")
    assert [gpu.index for gpu in nvidia.read().gpus] == [1]
    machine(f"{withheld.replace('NoPermission', 'GpuIsLost')}\n{TWO.splitlines()[0]}")
    assert nvidia.read() == nvidia.Nvidia(problem="GPU is lost")


def test_a_process_without_a_name(machine):
    machine(IN_USE, HOG.replace("/usr/bin/python3, with a comma", "[N/A]"))
    assert "in use by process (pid 4242 50.0 GiB)" in gpus.gpu_memory(Examination(job())).found


def test_an_older_driver_lists_its_processes(machine, monkeypatch):
    machine(IN_USE, HOG)
    nvml = nvidia._library()
    newer = nvml.nvmlDeviceGetComputeRunningProcesses_v3

    def missing(device):
        raise nvml.NVMLError_FunctionNotFound

    monkeypatch.setattr(nvml, "nvmlDeviceGetComputeRunningProcesses_v3", missing)
    monkeypatch.setattr(nvml, "nvmlDeviceGetComputeRunningProcesses_v2", newer)
    assert [each.pid for each in nvidia.read().processes] == [4242]


def test_a_driver_that_hangs(machine, monkeypatch):
    machine(error="hang")
    monkeypatch.setattr(nvidia, "SECONDS", 0.2)
    assert nvidia.read().problem == "the NVIDIA driver gave no answer in 0.2 s"


def test_the_library_is_imported_without_a_warning():
    code = "from nemo_cpt.doctor import nvidia; nvidia.read()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("built", "driver", "cuda", "expected"),
    [
        ("13.0", "550.54.15", "12.4", "error"),
        ("13.0", "535.183.01", "", "error"),
        ("13.0", "535.183.01", "13.0", "ok"),  # forward compatibility
        ("12.8", "550.54.15", "12.4", "warning"),
        ("12.4", "580.65.06", "13.0", "ok"),
        ("12.4", "580.65.06", "", "ok"),
        ("11.8", "470.42.01", "", "ok"),
        (None, "550.54.15", "12.4", "error"),
    ],
)
def test_driver_against_torchs_cuda(machine, monkeypatch, built, driver, cuda, expected):
    machine(f"0, GPU-1, 81559, 81079, Disabled, {driver}, H100", cuda=cuda)
    monkeypatch.setattr(software, "torch_cuda", lambda: built)
    found = software.driver(Examination(job()))
    assert found.state == expected
    assert bool(found.cure) == (expected != "ok")


def test_the_build_is_read_from_torchs_own_file(tmp_path, monkeypatch):
    import torch

    assert software.torch_cuda() == torch.version.cuda
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(software, "find_spec", lambda name: type("Spec", (), {"origin": str(package / "__init__.py")}))
    for text, version in {
        "cuda: Optional[str] = '13.0'\nhip = None": "13.0",
        "cuda = '12.4'": "12.4",
        "cuda = None\nhip = '6.2'": None,
    }.items():
        (package / "version.py").write_text(f"from typing import Optional\n{text}\n")
        assert software.torch_cuda() == version


@given(st.text(max_size=300))
def test_any_list_of_devices_is_survived(devices):
    one = nvidia.Gpu(0, "GPU-1", "H100", 81559, 81079, False, "550.54.15")
    assert nvidia.visible([one], devices) in ([], [one], [one] * (devices.count(",") + 1))


def test_the_executors_gpus_count(monkeypatch):
    from nemo_cpt.launching.description import place

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    assert place("local", ["gpus=2"]).environ["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert place("local", ["gpus=0"]).environ["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" in os.environ
