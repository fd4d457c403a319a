"""What nvidia-smi says of the driver, the GPUs and the processes on them."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

GPU_FIELDS = "index,uuid,memory.total,memory.free,mig.mode.current,driver_version,name"  # a name may hold a comma
PROCESS_FIELDS = "gpu_uuid,pid,used_memory,process_name"
SECONDS = 15  # without nvidia-persistenced a node of 8 GPUs takes several seconds to wake up
_NUMBER = re.compile(r"[0-9]{1,12}")


@dataclass(frozen=True)
class Gpu:
    """One GPU; memory in MiB, None where the driver does not tell (unified memory, some MIG modes)."""

    index: int
    uuid: str
    name: str
    total_mib: int | None
    free_mib: int | None
    mig: bool
    driver: str

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
        problem: what nvidia-smi said instead of an answer.
    """

    driver: str = ""
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    problem: str = ""


def read() -> Nvidia:
    """Ask nvidia-smi; a machine without it gives an empty answer, a driver in trouble gives `problem`."""
    if not shutil.which("nvidia-smi"):
        return Nvidia()
    try:
        gpus = parse_gpus(_ask(f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"))
        processes = parse_processes(_ask(f"--query-compute-apps={PROCESS_FIELDS}", "--format=csv,noheader,nounits"))
        cuda = parse_cuda(_ask())
    except _NoAnswerError as problem:
        return Nvidia(problem=str(problem))
    if not gpus:
        return Nvidia(problem="nvidia-smi lists no GPU")
    return Nvidia(gpus[0].driver, cuda, tuple(gpus), tuple(processes))


class _NoAnswerError(Exception):
    """What nvidia-smi said, or that it said nothing."""


def _ask(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise _NoAnswerError(f"nvidia-smi gave no answer in {SECONDS} s") from None
    except OSError as error:
        raise _NoAnswerError(f"nvidia-smi cannot be started ({error})") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise _NoAnswerError(said[0].strip() if said else f"nvidia-smi ended with {done.returncode}")
    return done.stdout


def parse_gpus(text: str) -> list[Gpu]:
    """Read `--query-gpu=GPU_FIELDS --format=csv,noheader,nounits`; lines of another form are passed over."""
    found = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",", GPU_FIELDS.count(","))]
        if len(values) == GPU_FIELDS.count(",") + 1 and _NUMBER.fullmatch(values[0]):
            index, uuid, total, free, mig, driver, name = values
            found.append(Gpu(int(index), uuid, name, _mib(total), _mib(free), mig == "Enabled", driver))
    return sorted(found, key=lambda gpu: gpu.index)


def parse_processes(text: str) -> list[GpuProcess]:
    """Read `--query-compute-apps=PROCESS_FIELDS --format=csv,noheader,nounits`, passing over lines of another form."""
    found = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",", PROCESS_FIELDS.count(","))]
        if len(values) == PROCESS_FIELDS.count(",") + 1 and _NUMBER.fullmatch(values[1]):
            found.append(GpuProcess(values[0], int(values[1]), _mib(values[2]), values[3]))
    return found


def parse_cuda(text: str) -> str:
    """The "CUDA Version" of nvidia-smi's own table; empty where there is none, or it is N/A."""
    match = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d{1,3}\.\d{1,3})", text)
    return match[1] if match else ""


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
        if match is None:
            break
        chosen.append(match)
    return chosen


def _is(gpu: Gpu, device: str) -> bool:
    if device.startswith("MIG-"):
        return gpu.mig
    return device == str(gpu.index) or (device.startswith("GPU-") and gpu.uuid.startswith(device))


def _mib(text: str) -> int | None:
    """A number of MiB; [N/A], [Not Supported], [Insufficient Permissions] and the like are None."""
    number = text.removesuffix("MiB").strip()
    return int(number) if _NUMBER.fullmatch(number) else None
