"""How long before its time limit a job is told to stop: as long as it needs to finish a step and write a checkpoint."""

import re
from typing import Any

from nemo_cpt.errors import CptError

LONGEST_SECONDS = 65535  # that sbatch takes
_NONE = ("-1", "UNLIMITED", "INFINITE")
# As sbatch takes it: 4:0:0 is 4:00:00, and 90:00 or 1-30 carry over.
_LIMIT = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


def seconds_to_save(task: Any) -> int | None:
    """Return the window that the planner finds for a recipe for GPUs; None for what it cannot plan.

    Args:
        task: a run.Partial, of a recipe or not.
    """
    from nemo_cpt import planning
    from nemo_cpt.planning.save_window import saving

    # The planner knows GPUs; a run on a CPU saves in seconds.
    if getattr(getattr(task, "trainer", None), "accelerator", None) != "gpu":
        return None
    try:
        return min(saving(planning.read(task)).window, LONGEST_SECONDS)
    except CptError:
        return None


def seconds_of(limit: str | None) -> int | None:
    """Return the seconds of a time limit as Slurm writes it; None for no limit, or no number.

    "30" are minutes, "30:00" minutes and seconds, "4:00:00" hours first, "2-00" days and hours.
    """
    found = _LIMIT.fullmatch(limit or "")
    if found is None:
        return None
    first, second, third = (int(found[name] or 0) for name in ("first", "second", "third"))
    if found["days"] or found["third"]:
        seconds = 86400 * int(found["days"] or 0) + 3600 * first + 60 * second + third
    else:
        seconds = 60 * first + second
    return seconds or None  # to sbatch nothing is no limit


def is_limit(limit: str) -> bool:
    """Say whether sbatch takes a time limit, or that there be none."""
    return bool(_LIMIT.fullmatch(limit)) or limit.upper() in _NONE
