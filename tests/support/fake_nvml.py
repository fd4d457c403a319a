"""nvidia-ml-py on a machine with the GPUs that the files beside this one list; placed on the path as `pynvml`.

The real module's errors, and its names for them; the driver's calls are answered from the files:
    gpus: a line a GPU, `index, uuid, total MiB, free MiB, MIG mode, driver, name`, "[N/A]" for what is not told.
    processes: a line a process, `uuid of its GPU, pid, MiB, name`.
    cuda: the driver's newest CUDA, such as 12.4; empty where it does not tell.
    error: an error's name that every call of `nvmlInit` raises; "hang" where it never answers.
"""

import importlib.util
import sys
import threading
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

_spec = importlib.util.spec_from_file_location("real_pynvml", distribution("nvidia-ml-py").locate_file("pynvml.py"))
_real = importlib.util.module_from_spec(_spec)
sys.modules["real_pynvml"] = _real  # it looks itself up there
_spec.loader.exec_module(_real)
globals().update({name: value for name, value in vars(_real).items() if name.startswith("NVML")})
_NOT_TOLD = "[N/A]"


def _lines(name, fields):
    lines = (Path(__file__).parent / name).read_text().splitlines()
    return [[value.strip() for value in line.split(",", fields - 1)] for line in lines]


def _told(value):
    if value == _NOT_TOLD:
        raise _real.NVMLError_NotSupported
    return value


def nvmlInit():  # noqa: N802
    error = (Path(__file__).parent / "error").read_text().strip()
    if error == "hang":
        threading.Event().wait()
    if error:
        raise getattr(_real, error)


def nvmlShutdown():  # noqa: N802
    pass


def nvmlSystemGetDriverVersion():  # noqa: N802
    return _lines("gpus", 7)[0][5] if _lines("gpus", 7) else "550.54.15"


def nvmlSystemGetCudaDriverVersion_v2():  # noqa: N802
    cuda = (Path(__file__).parent / "cuda").read_text().strip()
    if not cuda:
        raise _real.NVMLError_LibraryNotFound
    major, minor = cuda.split(".")
    return int(major) * 1000 + int(minor) * 10


def nvmlDeviceGetCount():  # noqa: N802
    return len(_lines("gpus", 7))


def nvmlDeviceGetHandleByIndex(index):  # noqa: N802
    device = next(device for device in _lines("gpus", 7) if device[0] == str(index))
    if device[1] == "NVMLError_NoPermission" or device[1] == "NVMLError_GpuIsLost":
        raise getattr(_real, device[1])
    return device


def nvmlDeviceGetUUID(device):  # noqa: N802
    return device[1]


def nvmlDeviceGetName(device):  # noqa: N802
    return device[6]


def nvmlDeviceGetMemoryInfo(device):  # noqa: N802
    return SimpleNamespace(total=int(_told(device[2])) << 20, free=int(_told(device[3])) << 20)


def nvmlDeviceGetCudaComputeCapability(device):  # noqa: N802
    return (8, 0) if "A100" in device[6] else (9, 0)


def nvmlDeviceGetMigMode(device):  # noqa: N802
    return [int(_told(device[4]) == "Enabled"), 0]


def nvmlDeviceGetComputeRunningProcesses_v3(device):  # noqa: N802
    return [
        SimpleNamespace(pid=int(pid), usedGpuMemory=None if used == _NOT_TOLD else int(used) << 20)
        for uuid, pid, used, _ in _lines("processes", 4)
        if uuid == device[1]
    ]


def nvmlDeviceGetComputeRunningProcesses_v2(device):  # noqa: N802
    raise AssertionError("a driver that has the newer call is asked by it alone")


def nvmlSystemGetProcessName(pid):  # noqa: N802
    name = next(name for _, other, _, name in _lines("processes", 4) if other == str(pid))
    if name == _NOT_TOLD:
        raise _real.NVMLError_NotFound
    return name
