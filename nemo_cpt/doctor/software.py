"""Python, the packages' versions, and whether torch and Transformer Engine import at all."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_cpt.doctor.examination import Examination, Finding, State, alongside
from nemo_cpt.doctor.versions import MEASURED, OLDEST_DRIVER, OTHERS, PYTHONS, STACK, Package, required

if TYPE_CHECKING:
    from packaging.version import Version

IMPORT_SECONDS = 120
TORCH = "import json, torch; print('DOCTOR' + json.dumps([torch.cuda.is_available(), torch.cuda.device_count()]))"
TRANSFORMER_ENGINE = "import transformer_engine.pytorch; print('DOCTOR[]')"


def python(examination: Examination) -> Finding:
    """Whether NeMo 2.7 has wheels for this Python."""
    found = f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}"
    if sys.version_info[:2] in PYTHONS:
        return Finding("Python", "ok", found)
    return Finding("Python", "error", found, "make a virtual environment with Python 3.11 or 3.12")


def packages(examination: Examination) -> Iterator[Finding]:
    """Each package's version against the range that works; read from metadata, nothing is imported."""
    if not _this_environment(examination):
        yield Finding("packages", "skipped", f"the job on {examination.place.executor} uses its own")
        return
    known = required()
    if not known:
        found = "not compared: nemo_cpt's files are here without the metadata that declare what it requires"
        yield Finding("packages", "warning", found, "install it: pip install PATH_OF_ITS_CHECKOUT")
        return
    of_all = {name: _of_package(package, examination) for name, package in known.items()}
    yield from (of_all[name] for name in STACK if name in known)
    yield from (each for name, each in of_all.items() if name not in (*STACK, *OTHERS) and each.state != "ok")
    wrong = [of_all[name] for name in OTHERS if name in known and of_all[name].state != "ok"]
    if wrong:
        found = "; ".join(f"{each.name} {each.found}" for each in wrong)
        names = " ".join(known[each.name].cure.removeprefix("pip install ") for each in wrong)
        yield Finding("other packages", "warning", found, f"pip install {names}")
    else:
        yield Finding("other packages", "ok", f"{len(known) - len(STACK)}, each in its range")


def combination(examination: Examination) -> Finding:
    """Whether the versions together are those that this project's tests and figures come from."""
    if not _this_environment(examination):
        return Finding("combination", "skipped", f"the job on {examination.place.executor} uses its own packages")
    differing = {name: list(_differences(wanted)) for name, wanted in MEASURED.items()}
    for name, differences in differing.items():
        if not differences:
            return Finding("combination", "ok", f"the versions measured together on the {name}")
    name, differences = min(differing.items(), key=lambda item: len(item[1]))
    found = f"not run together so far; nearest is the {name} set: {', '.join(differences)}"
    return Finding("combination", "warning", found, "if something fails, install with `--constraint constraints.txt`")


@alongside
def torch_import(examination: Examination) -> Finding:
    """Whether torch imports, in a process of its own, and whether it sees the GPUs that the driver shows."""
    if not _this_environment(examination):
        return Finding("import torch", "skipped", f"the job on {examination.place.executor} uses its own")
    # Looked for, not imported: an import in this process could end it.
    if find_spec("torch") is None:
        return Finding("import torch", "error", "torch is not installed", "pip install torch")
    answer, problem = _imported(TORCH)
    if answer is None:
        return Finding("import torch", "error", problem, _cure("torch", problem))
    sees, count = answer
    if examination.visible_gpus and not sees and torch_cuda():
        cure = "compare driver and CUDA build above; `python -c 'import torch; torch.cuda.init()'` says more"
        return Finding("import torch", "error", "imports, but sees none of the GPUs", cure)
    return Finding("import torch", "ok", f"imports; sees {count} GPU{'s' * (count != 1)}")


@alongside
def transformer_engine_import(examination: Examination) -> Finding:
    """Whether Transformer Engine imports: its wheels fit one torch and one CUDA."""
    name, job = "import transformer_engine", examination.job
    if not _this_environment(examination):
        return Finding(name, "skipped", f"the job on {examination.place.executor} uses its own")
    if find_spec("transformer_engine") is None:
        return Finding(name, "skipped", "not installed")
    answer, problem = _imported(TRANSFORMER_ENGINE)
    if answer is not None:
        return Finding(name, "ok", "imports")
    needed = examination.has_gpus or bool(job and job.gpus_per_node)
    return Finding(name, "error" if needed else "warning", problem, _cure("transformer_engine", problem))


def driver(examination: Examination) -> Finding:
    """Whether the driver serves the CUDA that torch was built for."""
    if not examination.place.here:
        return Finding("NVIDIA driver", "skipped", "this machine's is not the job's")
    nvidia, needed = examination.nvidia, bool(examination.job and examination.job.gpus_here)
    red: State = "error" if needed or examination.job is None else "skipped"  # a job on the CPU does without
    if nvidia.problem:
        return Finding("NVIDIA driver", red, nvidia.problem, _driver_cure(nvidia.problem))
    if not nvidia.driver:
        cure = "install NVIDIA's driver; in a container, start it with `--gpus all`"
        return Finding(
            "NVIDIA driver", "error" if needed else "skipped", "none: libnvidia-ml.so.1 is not here", cure * needed
        )
    found = f"{nvidia.driver}" + (f", for CUDA up to {nvidia.cuda}" if nvidia.cuda else "")
    built = torch_cuda() if _this_environment(examination) else None
    if built is None and _this_environment(examination) and _installed("torch") is not None:
        cure = "install a CUDA build of torch: pip install torch (from pypi.org, not its cpu index)"
        return Finding("NVIDIA driver", red, f"{found}; torch is a CPU build", cure)
    if built is None:
        return Finding("NVIDIA driver", "ok", found)
    return _compared(found, nvidia.driver, nvidia.cuda, built)


def _compared(found: str, driver: str, serves: str, built: str) -> Finding:
    """A driver of a CUDA major version runs all its minor versions, those later than itself by recompiling PTX."""
    found = f"{found}; torch is built for CUDA {built}"
    major, branch = int(built.partition(".")[0]), int(re.match(r"\d*", driver)[0] or 0)  # type: ignore[index]
    newest = tuple(map(int, serves.split("."))) if serves else None
    oldest = OLDEST_DRIVER.get(major)
    # The driver's word counts first: in a container with CUDA's forward compatibility an old branch serves more.
    if (newest and newest[0] < major) or (newest is None and oldest and branch < oldest):
        cure = (
            f"update the driver to {oldest or 'a later branch'} or later, or install a torch built for CUDA "
            f"{newest[0] if newest else major - 1} (https://pytorch.org/get-started)"
        )
        return Finding("NVIDIA driver", "error", found, cure)
    if newest and newest < tuple(map(int, built.split("."))):
        cure = "update the driver: what is compiled at run time (Triton, CUDA extensions) may be refused by this one"
        return Finding("NVIDIA driver", "warning", found, cure)
    return Finding("NVIDIA driver", "ok", found)


def _driver_cure(problem: str) -> str:
    if "mismatch" in problem:
        return "the driver was updated under the running kernel module: reboot, or reload the nvidia modules"
    if "GPU is lost" in problem or "requires restart" in problem:
        return "a GPU no longer answers: restart the machine (dmesg has the reason, as an Xid)"
    if "lists no GPU" in problem:
        return "no GPU is passed in: start the container with `--gpus all`, the Slurm job with --gpus-per-node"
    return "load the driver (modprobe nvidia; dmesg says why it fails), or restart the container with `--gpus all`"


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for, out of torch/version.py; None for a CPU build or no torch."""
    spec = find_spec("torch")
    if spec is None or not spec.origin:
        return None
    try:
        # Read, not imported: torch takes seconds, and may be just what is broken.
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+\.\d+)", text, re.MULTILINE)
    return match[1] if match else None


def _this_environment(examination: Examination) -> bool:
    return examination.place.same_packages


def _installed(name: str) -> "Version | None":
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version(name))
    except (PackageNotFoundError, InvalidVersion, TypeError):  # TypeError: metadata without a version
        return None


def _of_package(package: Package, examination: Examination) -> Finding:
    from packaging.specifiers import SpecifierSet

    installed = _installed(package.name)
    job = examination.job
    if installed is None:
        if package.optional and not (job and job.gpus_per_node) and not examination.has_gpus:
            return Finding(package.name, "skipped", "not installed; runs on the CPU do without")
        state: State = "warning" if package.optional and not (job and job.gpus_per_node) else "error"
        return Finding(package.name, state, "not installed", package.cure)
    # NVIDIA's containers bring pre-releases of torch, such as 2.9.0a0.
    if installed in SpecifierSet(package.works, prereleases=True):
        return Finding(package.name, "ok", str(installed))
    why = f" ({package.otherwise})" if package.otherwise else ""
    found = f"{installed}, and {package.works} works{why}"
    return Finding(package.name, "error", found, package.cure)


def _differences(wanted: dict[str, str]) -> Iterator[str]:
    from packaging.version import Version

    for name, seen in wanted.items():
        installed, known = _installed(name), Version(seen)
        if installed is None or installed.release[: len(known.release)] != known.release:
            yield f"{name} {installed or 'absent'} ({seen})"


def _imported(code: str) -> tuple[list[int] | None, str]:
    """What `code` printed behind DOCTOR, or None and the last line of its error."""
    try:
        # In a process of its own: an import that hangs, or crashes in C, is a finding and not the doctor's end.
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return None, f"still importing after {IMPORT_SECONDS} s"
    marked = [line for line in done.stdout.splitlines() if line.startswith("DOCTOR")]
    if done.returncode == 0 and marked:
        return json.loads(marked[-1].removeprefix("DOCTOR")), ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return None, lines[-1] if lines else f"the process ended with {done.returncode} and said nothing"


def _cure(package: str, problem: str) -> str:
    """What helps against an import's error; the first line whose words it holds."""
    spec = find_spec(package)
    origin = Path(spec.origin).parent if spec and spec.origin else None
    # First, because it explains every other symptom.
    if origin and Path(sys.prefix) not in origin.parents and os.environ.get("PYTHONPATH"):
        return f"{origin} stands before this environment's own: remove it from PYTHONPATH"
    if "still importing" in problem:
        return "a slow or hanging file system: put the environment on a local disk, or try again"
    cures = {
        "undefined symbol": f"{package} and its libraries are of different builds: unset LD_LIBRARY_PATH, and if that "
        f"does not help, pip install --force-reinstall --no-cache-dir {package}",
        "cannot open shared object": "a library is missing or hidden: unset LD_LIBRARY_PATH, and if that does not "
        f"help, pip install --force-reinstall --no-cache-dir {package}",
        "GLIBC": "the system's C library is older than the wheel's: use a newer system or a container",
        "No module named": f"a package is missing: pip install --force-reinstall {package}",
        "numpy": "NumPy and a compiled package disagree: pip install --constraint constraints.txt numpy",
    }
    general = f"pip install --force-reinstall --no-cache-dir {package}"
    return next((cure for words, cure in cures.items() if words in problem), general)
