"""What a check found."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "warning", "error", "skipped"]


@dataclass(frozen=True)
class Finding:
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

    def as_dict(self) -> dict[str, Any]:
        """The finding as a JSON-serialisable dict."""
        return asdict(self)


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
