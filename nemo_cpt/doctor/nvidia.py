"""What NVIDIA's management library (NVML) says of the driver, the GPUs and the processes on them."""

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

SECONDS = 15  # without nvidia-persistenced a node of 8 GPUs takes several seconds to wake up
MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One GPU; memory in MiB and compute capability, None where the driver does not tell (unified memory, some MIG)."""

    index: int
    uuid: str
    name: str
    total_mib: int | None
    free_mib: int | None
    mig: bool
    driver: str
    capability: tuple[int, int] | None = None

    @property
    def used_mib(self) -> int | None:
        """Memory in use, by whatever process."""
        return None if self.total_mib is None or self.free_mib is None else self.total_mib - self.free_mib


@dataclass(frozen=True)
class GpuProcess:
    """A process on a GPU; its memory in MiB, None where the driver does not tell (in containers, for other users)."""

    gpu_uuid: str
    pid: int
    used_mib: int | None
    name: str


@dataclass(frozen=True)
class Nvidia:
    """The driver's view of this machine.

    Attributes:
        driver: its version; empty where there is none.
        cuda: the newest CUDA that it serves, such as "13.0"; empty where it does not say.
        gpus: by index.
        processes: on any of them.
        problem: what the library said instead of an answer.
    """

    driver: str = ""
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    problem: str = ""


def read() -> Nvidia:
    """Ask the driver; a machine without it gives an empty answer, a driver in trouble gives `problem`."""
    nvml, answer = _library(), list[Nvidia]()
    # A daemon: a call into a driver that hangs cannot be ended, and nobody shall wait for it.
    asking = threading.Thread(target=lambda: answer.append(_ask(nvml)), daemon=True)
    asking.start()
    asking.join(SECONDS)
    return answer[0] if answer else Nvidia(problem=f"the NVIDIA driver gave no answer in {SECONDS} s")


def _library() -> ModuleType:
    with warnings.catch_warnings():
        # The deprecated package `pynvml`, which nvidia-resiliency-ext installs, warns whoever imports this one.
        warnings.simplefilter("ignore", FutureWarning)
        import pynvml
    return pynvml


def _ask(nvml: ModuleType) -> Nvidia:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError_LibraryNotFound:
        return Nvidia()
    except nvml.NVMLError as error:
        return Nvidia(problem=str(error))
    try:
        return _machine(nvml)
    except (nvml.NVMLError, UnicodeDecodeError) as error:  # the latter of a name
        return Nvidia(problem=str(error))
    finally:
        nvml.nvmlShutdown()


def _machine(nvml: ModuleType) -> Nvidia:
    driver = nvml.nvmlSystemGetDriverVersion()
    cuda = _told(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)  # 12040 for 12.4; libcuda may be missing
    gpus, processes = list[Gpu](), list[GpuProcess]()
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            device = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError_NoPermission:  # counted all the same where a container was not given it
            continue
        gpus.append(_gpu(nvml, device, index, driver))
        processes += _processes(nvml, device, gpus[-1].uuid)
    if not gpus:
        return Nvidia(problem="the NVIDIA driver lists no GPU")
    return Nvidia(driver, f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "", tuple(gpus), tuple(processes))


def _gpu(nvml: ModuleType, device: Any, index: int, driver: str) -> Gpu:
    memory = _told(nvml, nvml.nvmlDeviceGetMemoryInfo, device)
    total, free = (memory.total // MIB, memory.free // MIB) if memory else (None, None)
    mig = _told(nvml, nvml.nvmlDeviceGetMigMode, device)  # now, and after the next reset
    uuid, name = nvml.nvmlDeviceGetUUID(device), nvml.nvmlDeviceGetName(device)
    capability = _told(nvml, nvml.nvmlDeviceGetCudaComputeCapability, device)
    return Gpu(index, uuid, name, total, free, bool(mig and mig[0]), driver, tuple(capability) if capability else None)


def _processes(nvml: ModuleType, device: Any, gpu_uuid: str) -> list[GpuProcess]:
    listed = _told(nvml, nvml.nvmlDeviceGetComputeRunningProcesses_v3, device)
    if listed is None:  # drivers before 510
        listed = _told(nvml, nvml.nvmlDeviceGetComputeRunningProcesses_v2, device) or ()
    found = []
    for each in listed:
        used = None if each.usedGpuMemory is None else each.usedGpuMemory // MIB
        found.append(GpuProcess(gpu_uuid, each.pid, used, _told(nvml, nvml.nvmlSystemGetProcessName, each.pid) or ""))
    return found


def _told(nvml: ModuleType, ask: Callable[..., Any], *arguments: Any) -> Any:
    """The answer; None where this driver, card or container does not tell. A GPU in trouble raises all the same."""
    try:
        return ask(*arguments)
    except (
        nvml.NVMLError_NotSupported,
        nvml.NVMLError_NoPermission,
        nvml.NVMLError_NotFound,
        nvml.NVMLError_FunctionNotFound,
        nvml.NVMLError_LibraryNotFound,
        UnicodeDecodeError,
    ):
        return None


def visible(gpus: Sequence[Gpu], devices: str | None) -> list[Gpu]:
    """The GPUs that CUDA shows a process: as CUDA_VISIBLE_DEVICES lists them, up to the first that is not there.

    Args:
        gpus: all of them.
        devices: the variable's value: indices, or beginnings of UUIDs; None where it is unset.
    """
    if devices is None:
        return list(gpus)
    chosen: list[Gpu] = []
    for device in (each.strip() for each in devices.split(",")):
        match = next((gpu for gpu in gpus if _is(gpu, device)), None)
        # CUDA itself stops reading the variable at the first device that it does not know.
        if match is None:
            break
        chosen.append(match)
    return chosen


def _is(gpu: Gpu, device: str) -> bool:
    # NVML lists whole cards here: which slice is meant is not looked up.
    if device.startswith("MIG-"):
        return gpu.mig
    return device == str(gpu.index) or (device.startswith("GPU-") and gpu.uuid.startswith(device))
