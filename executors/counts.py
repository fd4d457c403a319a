"""Counts and sizes that executors take."""

import re
from collections.abc import Mapping
from typing import Any

from nemo_cpt.errors import CptError


def check_not_negative(executor: str, **counts: int | None) -> None:
    """Refuse counts below 0; None stands for a default.

    Args:
        executor: the function's name, for the message.
        **counts: its arguments.

    Raises:
        CptError: one is below 0.
    """
    for name, count in counts.items():
        if count is not None and count < 0:
            raise CptError(f"{executor}({name}={count}): 0 or more")


def check_form(executor: str, form: str, words: str, **values: Any) -> None:
    """Refuse what a scheduler would, when all else is done, for how it is written; None stands for a default.

    Args:
        executor: the function's name, for the message.
        form: a regular expression for the whole of it.
        words: what to give.
        **values: its arguments.

    Raises:
        CptError: one is written otherwise.
    """
    for name, value in values.items():
        if value is not None and not re.fullmatch(form, str(value)):
            raise CptError(f"{executor}({name}={value!r}): {words}")


def cores_of_task(given: Mapping[str, Any]) -> int | None:
    """The cores of each task, by arguments or fields of a job with a GPU a task; None where none are named."""
    count = given.get("cpus_per_task") or given.get("cpus_per_gpu")
    return int(count) if count else None


def asks_for_memory(given: Mapping[str, Any]) -> bool:
    """Whether arguments or fields of a job tell Slurm how much of a node's memory it takes."""
    return any(given.get(name) is not None for name in ("mem", "mem_per_cpu", "mem_per_gpu"))  # 0 is the whole


def asks_for_cores(given: Mapping[str, Any]) -> bool:
    """Whether arguments or fields of a job tell Slurm how many cores its tasks take."""
    return any(given.get(name) for name in ("cpus_per_task", "cpus_per_gpu", "exclusive"))
