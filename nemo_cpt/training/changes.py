"""What is different when a run is started again. Apart from `record`, so that it can be told without importing NeMo."""

import contextlib
import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cpt.conversations import Conversations
from nemo_cpt.conversations.dataset import conversations_prefix
from nemo_cpt.corpus import Blend
from nemo_cpt.corpus.dataset.index import full_prefix
from nemo_cpt.errors import CptError
from nemo_cpt.training.options import EXTENSIONS
from nemo_cpt.training.run_folder import Checkpoint

FIXED = ("optimizer", "data", "adapters")  # groups of settings that a checkpoint's states belong to
# Besides, how they are written: of master weights the whole, or what the weights lack of them. Megatron reads the one
# as the other without a word, and trains on with numbers that are no weights; a finished run reads none.
READ = (*FIXED, "states")
GROWN_ROWS_FIRST = "grown_rows_first"
_SAMPLE_BYTES = 2**16
_CONTENT = re.compile(r".*:([0-9a-f]{16})", re.DOTALL)  # as `content_of` writes it


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was when the checkpoint was written.

    Attributes:
        group: `schedule`, `optimizer`, `data`, `adapters`, `states`, `layout` or `validation`.
        name: of the setting, as in the recipe.
        was: its value in the checkpoint's run.
        now: its value.
    """

    group: str
    name: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} {_shown(self.was)} -> {_shown(self.now)}"


def changes(was: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[Change]:
    """What differs between two runs' settings; what either does not know is not compared."""
    return [
        Change(group, name, was[group][name], value)
        for group, settings in now.items()
        for name, value in settings.items()
        # What an older version did not write down is not taken for a change.
        if name in was.get(group, {}) and not same(was[group][name], value)
    ]


def check_goes_on(checkpoint: Checkpoint, changed: Collection[Change], extend: str | None) -> None:
    """Refuse to resume a run with settings that its checkpoint cannot take, or with a schedule that nobody explained.

    Args:
        checkpoint: that it goes on from.
        changed: what is not as it was when that was written.
        extend: see `ResumeOrStartFromBase`.

    Raises:
        CptError: there is such a setting.
    """
    where = f"this run was started otherwise than it is resumed at step {checkpoint.step}"
    if fixed := [each for each in changed if each.group in READ and not _is_over(each, checkpoint.step)]:
        why = ""
        if any(each.group == "states" for each in fixed):
            why = " (as state_precision=bf16 does, and gpu_memory_gib= where it keeps Adam's states on the host)"
        raise CptError(
            f"{where}: {listed(fixed)}{why}. Its checkpoints hold the optimizer's state and the position in the "
            "data that belong to the old values: take these back, or begin a new run (another name) with "
            f"base={checkpoint.path}"
        )
    schedule = [each for each in changed if each.group == "schedule"]
    if schedule and extend is None:
        choices = "; ".join(f"extend={name}: {meaning}" for name, meaning in EXTENSIONS.items())
        raise CptError(f"{where}: {listed(schedule)}. Say what becomes of the learning rate: {choices}")


def _is_over(change: Change, step: int) -> bool:
    """Whether a run is past the steps that a setting is for."""
    return change.name == GROWN_ROWS_FIRST and step >= max(change.was or 0, change.now or 0)


def check_started_again(
    checkpoint: Checkpoint, now: Mapping[str, Mapping[str, Any]], extend: str | None, finished: bool
) -> None:
    """Refuse, before a job, what it would refuse of a run that has this checkpoint.

    Args:
        checkpoint: the run's newest.
        now: settings by group, as far as they are known.
        extend: see `ResumeOrStartFromBase`.
        finished: whether it has all the steps that are asked for.

    Raises:
        CptError: as `check_finished` or `check_goes_on`.
    """
    if finished:
        check_finished(checkpoint, now)
    else:
        check_goes_on(checkpoint, changes(checkpoint.record.get("settings", {}), now), extend)


def check_finished(checkpoint: Checkpoint, now: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to call a run finished that was trained otherwise than it is asked for.

    Args:
        checkpoint: its last one.
        now: settings by group, as far as they are known.

    Raises:
        CptError: what decides the weights has other values now.
    """
    was = checkpoint.record.get("settings", {})
    found = [each for each in changes(was, now) if each.group in (*FIXED, "schedule") and each.name != "max_steps"]
    if was.get("schedule", {}).get("max_steps") != now.get("schedule", {}).get("max_steps"):
        # Of fewer steps, all of which are trained; its warmup is counted from them.
        found = [each for each in found if each.name != "warmup_steps"]
    if found:
        raise CptError(
            f"the run is finished, and was trained otherwise than this asks for: {listed(found)} ({checkpoint.path}). "
            "Give this training another name="
        )


def listed(found: Iterable[Change]) -> str:
    """Changes in words."""
    return ", ".join(map(str, found))


def sets_of(weights: Mapping[str, float]) -> list[list[Any]]:
    """What is trained on, in its order: each set's weight, and what it holds."""
    return [[weight, content_of(prefix)] for prefix, weight in weights.items()]


def trained_on(data: Blend | Conversations | None, replay: Blend | None) -> dict[str, Any]:
    """The sets that are trained on, as the setting they are; nothing where they are not here, or mixed with replay."""
    weights: dict[str, float] = {}
    with contextlib.suppress(CptError, OSError):
        if isinstance(data, Conversations) and replay is None:
            weights = {conversations_prefix(prefix): float(weight) for prefix, weight in data.train.items()}
        elif isinstance(data, Blend):
            weights = data.shares()
        return {"train": sets_of(weights)} if weights else {}
    return {}


def content_of(prefix: str) -> str:
    """A dataset's name, and a hash of its files' sizes, beginnings and ends: the same wherever it was copied to."""
    # Not `index.fingerprint`, which is like it: this hash stands in checkpoints, and is compared with theirs for good.
    digest = hashlib.blake2b(digest_size=8)
    full = full_prefix(prefix)
    for suffix in (".idx", ".bin", *([".mask"] if Path(full + ".mask").exists() else [])):  # conversations have one
        with open(full + suffix, "rb") as file:
            size = file.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            for start in (0, max(size - _SAMPLE_BYTES, 0)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"{Path(prefix).name.removesuffix('_text_document')}:{digest.hexdigest()}"


def same(was: Any, now: Any) -> bool:
    """Whether two values of a setting are one.

    However they were reckoned: 3e-5 is also a tenth of 3e-4, but for the last bit. And whatever a dataset is called:
    its name is for messages, and one that was renamed is no other.
    """
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(map(same, was, now))
    if isinstance(was, dict) and isinstance(now, dict):
        return was.keys() == now.keys() and all(same(was[name], now[name]) for name in was)
    if isinstance(was, str) and isinstance(now, str):
        before, after = _CONTENT.fullmatch(was), _CONTENT.fullmatch(now)
        return before[1] == after[1] if before and after else was == now
    if isinstance(was, float) and isinstance(now, float):
        return math.isclose(was, now, rel_tol=1e-6)
    return bool(was == now)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
