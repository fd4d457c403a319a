"""Runs a job's command, starts it again after a crash, and lets it save when this process is told to stop.

    python -m nemo_cpt.executors.supervisor --marker FILE [--max-restarts N] -- torchrun ... -m module

torchrun, on SIGTERM, kills its workers after 30 s, which is too short for the checkpoint of a large model; here the
workers themselves are signalled and torchrun is left to wait for them. The exit code is the command's own; after a
stop that left a checkpoint it is `StoppedEarlyError`'s, because an unfinished run must not look finished.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from nemo_cpt.errors import CptError, StoppedEarlyError
from nemo_cpt.executors.runner import MARKER, REFUSAL

MARKER_PREFIX = "preempted-"  # of the file in a job's folder that says: it was told to stop, and saved
REFUSAL_PREFIX = "refused-"  # of the one that says: a CptError ended it


class Supervisor:
    """One command, its restarts and its end.

    Args:
        command: program and arguments.
        marker: file by which the job says that it was told to stop and saved.
        max_restarts: restarts after an exit code other than 0.
    """

    def __init__(self, command: list[str], marker: Path, max_restarts: int = 0) -> None:
        self.command, self.marker, self.max_restarts = command, marker, max_restarts
        self.refusal = marker.with_name(REFUSAL_PREFIX + marker.name.removeprefix(MARKER_PREFIX))
        self.child: subprocess.Popen[bytes] | None = None
        self.stops = 0

    def run(self) -> int:
        """Run until the command succeeds, was told to stop, or has used up its restarts; return the exit code.

        A CptError is not tried again: it says what the user must change. Its exit code is 2, also under torchrun,
        which turns every failure of a worker into 1.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._stop)
        for restart in range(self.max_restarts + 1):
            code = self._run_once()
            if self.marker.exists():
                print("nemo_cpt: stopped ahead of the end, saved; the same command goes on from there", flush=True)
                return StoppedEarlyError.exit_code
            if self.refusal.exists():
                return CptError.exit_code
            if code in (0, CptError.exit_code) or self.stops:
                break
            if restart < self.max_restarts:
                print(f"nemo_cpt: exit code {code}; restart {restart + 1} of {self.max_restarts}", flush=True)
        return code

    def _run_once(self) -> int:
        for left_before in (self.marker, self.refusal):
            left_before.unlink(missing_ok=True)
        words = {MARKER: str(self.marker), REFUSAL: str(self.refusal)}
        # A session of its own, so that a signal to this process's group reaches the job through _stop alone.
        self.child = subprocess.Popen(self.command, start_new_session=True, env=os.environ | words)
        if self.stops:
            self._signal_job()
        code = self.child.wait()
        return 128 - code if code < 0 else code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Let the job save at the first signal; at the second one end it."""
        self.stops += 1
        if self.child is not None and self.child.poll() is None:
            self._signal_job() if self.stops == 1 else _end(self.child.pid)

    def _signal_job(self) -> None:
        assert self.child is not None
        workers = children(self.child.pid) if Path(self.command[0]).name == "torchrun" else []
        for pid in workers or [self.child.pid]:
            with contextlib.suppress(ProcessLookupError):  # it ended since it was listed
                os.kill(pid, signal.SIGTERM)


def _end(leader: int) -> None:
    """Kill the workers, each with a session of its own under torchrun, and their parent."""
    for pid in [*children(leader), leader]:
        for kill in (os.killpg, os.kill):  # a worker that leads no group is no group's name
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Return the ids of a process's direct children; none if it has ended."""
    return [each for each, (parent, _) in processes().items() if parent == pid]


def processes() -> dict[int, tuple[int, str]]:
    """Return the parent and the state of every process of this machine, by id; the state Z is an ended one's."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended since it was listed
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]  # a program's name may hold spaces
            found[int(stat.parent.name)] = (int(parent), state)
    return found


def main() -> None:
    """Run the command that follows `--` and exit as it did."""
    parser = argparse.ArgumentParser(
        description="Run a job's command, restart it after a crash, let it save on SIGTERM."
    )
    parser.add_argument("--marker", type=Path, required=True, help="by which the job says that it saved and stopped")
    parser.add_argument("--max-restarts", type=int, default=0, help="after an exit code other than 0")
    parser.add_argument("command", nargs="+", help="after --")
    given = parser.parse_args()
    sys.exit(Supervisor(given.command, given.marker, given.max_restarts).run())


if __name__ == "__main__":
    main()
