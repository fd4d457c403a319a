"""Following a run by its files until it ends: on this machine, or over a shared file system."""

import contextlib
import re
import sys
import time
from collections.abc import Callable
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from nemo_cpt.errors import CptError, StoppedEarlyError
from nemo_cpt.executors.nemo_run_patches import newest_log
from nemo_cpt.launching.results import Run, runs
from nemo_cpt.training.metrics import END_FILE, METRICS_FILE, RUN_FILE, MetricsReader
from nemo_cpt.training.run_folder import checkpoints
from nemo_cpt.training.run_lock import read_owner
from nemo_cpt.watching.record import TRAIN_LOSS, Record, record
from nemo_cpt.watching.screen import screen_on
from nemo_cpt.watching.view import Snapshot, lines

POLL_SECONDS = 0.5
UNDERWAY = ("queued", "starting", "running")
QUIET_SECONDS = 5.0  # without anything new, after which it is asked whether the job lives
RANK_0_LOG = "nemo_log_globalrank-0_localrank-0.txt"  # NeMo's own, in the run's folder
_WARNING = re.compile(r"\[NeMo W (\S+ \S+) [^\]]*\]\s*(.*)")


class Follower:
    """What a run's files say, read again only where they grew.

    Args:
        folder: the run's.
        starting: its job is about to be started from here: what the folder holds by now is of an earlier start.
    """

    def __init__(self, folder: Path, starting: bool = False) -> None:
        self.folder = folder
        self._earlier, self._since = _changed(folder / RUN_FILE) if starting else None, time.monotonic()
        self._reader = MetricsReader(folder)
        self._record = Record(folder, self._reader)
        self._stamps: tuple[float, ...] = ()
        self._alive, self._asked = True, -QUIET_SECONDS
        self._warnings = _LogWarnings(folder / RANK_0_LOG)
        self._printed: tuple[float, Path | None] | None = None  # of a start: the job's log

    def snapshot(self, log: Path | None = None) -> Snapshot:
        """The run as it is now.

        Args:
            log: the job's raw log; where nothing is given, the one that the run itself names.
        """
        stamps = tuple(_changed(self.folder / name) for name in (METRICS_FILE, RUN_FILE, END_FILE))
        # Twice a second, maybe for days: while the files stand still nothing is parsed.
        if stamps != self._stamps:
            self._asked = time.monotonic() if self._stamps else self._asked  # at first it is asked at once
            self._record, self._stamps = Record(self.folder, self._reader), stamps
        begun = stamps[1] != self._earlier
        state, message = self._state() if begun else ("starting", "")
        return Snapshot(
            # Until its own start has described itself, the folder tells of the one before.
            record=self._record if begun else Record(self.folder, _NothingYet(self.folder)),
            state=state,
            message=message,
            saved=[each.path.name for each in checkpoints(self.folder / "checkpoints")] if begun else (),
            warnings=self._said() if begun else (),
            log=str(log or (self._log() if begun else None) or ""),
            seconds=None if begun else time.monotonic() - self._since,
            trouble=self._trouble(),
        )

    def _said(self) -> list[str]:
        """The run's own warnings and those of its log, as they came: of many the newest alone are shown."""
        own = [(_stamp(each["time"], self._record), each["text"]) for each in self._record.warnings]
        return [text for _, text in sorted([*own, *self._warnings.since(self._record)], key=itemgetter(0))]

    def _trouble(self) -> str:
        """Why what is known may be old."""
        return ""

    def _log(self) -> Path | None:
        """What the job prints, where its folder is in sight from here; else what NeMo logs."""
        # Looked for once a start: the folder may hold a whole checkout.
        if self._printed is None or self._printed[0] != self._stamps[1]:
            folder = self._record.description.get("logs")
            self._printed = self._stamps[1], newest_log(Path(folder)) if folder else None
        own = self.folder / RANK_0_LOG
        return self._printed[1] or (own if own.is_file() else None)

    def _state(self) -> tuple[str, str]:
        if (end := self._record.end) and not self._has_started_again(end["time"]):
            return end["state"], end["message"]
        # A run whose files grow lives: only a quiet one is asked after.
        if time.monotonic() - self._asked > QUIET_SECONDS:
            self._alive, self._asked = Run(self.folder).running, time.monotonic()
        return ("running", "") if self._alive else ("killed", "its job ended without a word; the log may say why")

    def _has_started_again(self, ended: float) -> bool:
        """Whether a job took the folder since: until it describes itself, it is the one before that had ended."""
        owner = read_owner(self.folder)
        return owner is not None and datetime.fromisoformat(owner.since).timestamp() > ended


class _NothingYet(MetricsReader):
    """Of a run that has not begun, whatever an earlier start has left."""

    def read(self) -> list[dict[str, Any]]:
        return []


class _LogWarnings:
    """The warnings of NeMo's log from a run's first step on; what it says before that is always the same."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0
        self._found: list[tuple[str, str]] = []

    def since(self, record: Record) -> list[tuple[str, str]]:
        """Each with its time, as NeMo stamps its lines."""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            file.seek(self._read)
            for line in iter(file.readline, b""):
                # It is being written, and read whole the next time.
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                if found := _WARNING.match(line.decode(errors="replace")):
                    self._found.append((found[1], found[2].strip()))
        first = next((line["time"] for line in record.metrics if TRAIN_LOSS in line and "time" in line), None)
        if first is None:
            return []
        return [(when, text) for when, text in self._found if when > _stamp(first, record)]


def _stamp(seconds: float, record: Record) -> str:
    """A time as NeMo stamps a run's lines, by the clock where it trains: such texts compare as their times do."""
    started = record.description.get("started")
    zone = datetime.fromisoformat(started).tzinfo if started else None
    return datetime.fromtimestamp(seconds, zone).replace(tzinfo=None).isoformat(" ", timespec="seconds")


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return -1.0


def newest_run(directory: Path) -> Path:
    """The run whose measurements, or whose description, were written last.

    Raises:
        CptError: there is no run.
    """

    def written(run: Run) -> float:
        return max(_changed(run.folder / name) for name in (METRICS_FILE, RUN_FILE))

    return max(runs(directory), key=written).folder


def follow(follower: Follower, live: bool) -> Snapshot:
    """Show a run until it ends, and return how it then was.

    Args:
        follower: of the run.
        live: as a view that changes in its place; else as lines.

    Raises:
        KeyboardInterrupt: the view was left, by Ctrl-C or by its key.
    """
    # Lines for a log: nothing is drawn, and no key is listened to.
    if not live:
        return _until_the_end(follower, _print_new, time.sleep)
    with screen_on(sys.stdout, sys.stdin, may_leave=True) as screen:

        def wait(seconds: float) -> None:
            screen.wait(seconds)
            if screen.left:
                raise KeyboardInterrupt

        ended = _until_the_end(follower, lambda shown, before: screen.show(shown), wait)
        screen.end(ended)
        return ended


def _print_new(shown: Snapshot, before: Snapshot | None) -> None:
    for line in lines(shown, before):
        print(line, flush=True)


def _until_the_end(
    follower: Follower, show: Callable[[Snapshot, Snapshot | None], None], wait: Callable[[float], None]
) -> Snapshot:
    before = None
    while True:
        with contextlib.suppress(FileNotFoundError):  # a checkpoint that was removed while it was looked at
            shown = follower.snapshot()
            show(shown, before)
            if shown.state not in UNDERWAY:
                return shown
            before = shown
        wait(POLL_SECONDS)


def check_ended_well(shown: Snapshot) -> None:
    """Raise what the run's own end was, unless it ended in good order.

    Raises:
        StoppedEarlyError: it was told to stop, and saved.
        CptError: it failed, or was killed, or nothing was measured in its folder.
    """
    # Refuses a folder in which nothing was ever measured, of which there is no end to tell.
    record(shown.record.folder)
    if shown.state in ("finished", "ended early"):
        return
    kind = StoppedEarlyError if shown.state == "stopped" else CptError
    raise kind(f"{shown.record.folder} {shown.state} at step {shown.record.step}: {shown.message}".removesuffix(": "))
