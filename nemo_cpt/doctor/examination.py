"""One examination: what is examined, what its checks share and find, and running them side by side."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nemo_cpt.doctor.job import Job, Place
from nemo_cpt.doctor.nvidia import Gpu, Nvidia, read, visible
from nemo_cpt.errors import CptError
from nemo_cpt.records import AsDict

State = Literal["ok", "warning", "error", "skipped"]


@dataclass(frozen=True)
class Finding(AsDict):
    """One line of the doctor's report.

    Attributes:
        name: what was looked at, such as "GPU memory".
        state: `error` would stop a job, `warning` may hurt it, `skipped` could not or need not be looked at.
        found: what is there, with its value.
        cure: what to do about it; empty where nothing is wrong.
    """

    name: str
    state: State
    found: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.found}" + (f"; {self.cure}" if self.cure else "")


def from_error(name: str, problem: Exception) -> Finding:
    """An error finding of a CptError's message: what is wrong, then, behind the first colon or full stop, the cure.

    A colon in parentheses, such as that of "rope_theta (NeMo: rotary_base)", is part of what is wrong.
    """
    found, _, cure = re.sub(r"(: |\. )(?![^()]*\))", "\n", str(problem), count=1).partition("\n")
    return Finding(name, "error", found, cure)


def worst(findings: Iterable[Finding]) -> State:
    """The worst state among findings: error, warning or ok."""
    states = {each.state for each in findings}
    return "error" if "error" in states else "warning" if "warning" in states else "ok"


Check = Callable[["Examination"], Finding | Iterable[Finding]]


class Examination:
    """What the checks are given.

    Args:
        job: the recipe and where it is to run; None looks at the machine alone.
        ranks: processes of this machine that shall reach each other; None for the job's GPUs.
        nodes: machines that take part in that.
        hub: repository whose access is asked for; None for the default, where it is needed.
        environ: the environment; by default this process's, with what the executor adds.
    """

    def __init__(
        self,
        job: Job | None = None,
        ranks: int | None = None,
        nodes: int = 1,
        hub: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.job, self.ranks, self.nodes, self.hub = job, ranks, nodes, hub
        self.place = job.place if job else Place()
        self.environ = dict(os.environ if environ is None else environ) | dict(self.place.environ)
        self.answers: dict[tuple[str, ...], str] = {}  # of commands that several checks ask, such as scontrol
        self._lock = threading.Lock()
        self._nvidia: Nvidia | None = None

    @property
    def nvidia(self) -> Nvidia:
        """What the driver says; asked once."""
        # Checks run side by side, and the driver is slow to answer.
        with self._lock:
            if self._nvidia is None:
                self._nvidia = read()
            return self._nvidia

    @property
    def visible_gpus(self) -> list[Gpu]:
        """The GPUs that a process started now would see."""
        return visible(self.nvidia.gpus, self.environ.get("CUDA_VISIBLE_DEVICES"))

    @property
    def has_gpus(self) -> bool:
        """Whether this machine has a GPU, visible or not."""
        return bool(self.nvidia.gpus)


def alongside(check: Check) -> Check:
    """Mark a check that waits for a process: it gets a thread of its own, beside the others.

    It must import nothing while it runs: Python's import locks deadlock now and then where two threads import modules
    that need each other (seen with `email` and `http.client`), so that one thread alone may import.
    """
    check.alongside = True  # type: ignore[attr-defined]
    return check


def examine(checks: Sequence[Check], examination: Examination, seconds: float = 180) -> list[Finding]:
    """Run checks: those marked `alongside` side by side, the others one after the other; findings in checks' order.

    Args:
        checks: functions of the examination.
        examination: what they look at.
        seconds: how long they may take together; one that has not answered by then is reported as that.
    """
    found: dict[int, list[Finding]] = {}

    def run(*numbers: int) -> None:
        for number in numbers:
            found[number] = _findings(checks[number], examination)

    slow = [number for number, check in enumerate(checks) if hasattr(check, "alongside")]
    quick = [number for number in range(len(checks)) if number not in slow]
    # Daemons: a check that hangs in the driver or in a file system must not keep the doctor from ending.
    threads = [threading.Thread(target=run, args=each, daemon=True) for each in (quick, *((one,) for one in slow))]
    for thread in threads:
        thread.start()
    # One for all: the checks run at once, and a slow one must not give the next one more time.
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    return [each for number, check in enumerate(checks) for each in found.get(number, [_silent(check, seconds)])]


def _findings(check: Check, examination: Examination) -> list[Finding]:
    try:
        result = check(examination)
        return [result] if isinstance(result, Finding) else list(result)
    except CptError as error:
        return [from_error(_name(check), error)]
    except ImportError as error:  # in an environment of which a part is missing, the other checks go on
        cure = f"pip install --constraint constraints.txt {error.name or 'nemo_cpt'}"
        return [Finding(_name(check), "error", f"could not be checked: {error}", cure)]
    except Exception as error:  # a doctor that falls ill reports that, too
        return [Finding(_name(check), "warning", f"could not be checked: {type(error).__name__}: {error}")]


def _silent(check: Check, seconds: float) -> Finding:
    return Finding(_name(check), "warning", f"no answer in {seconds:g} s", "look at this one by hand")


def _name(check: Check) -> str:
    return getattr(check, "__name__", "check").replace("_", " ")
