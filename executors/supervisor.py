"""Runs a job's command, starts it again after a crash, and lets it save when this process is told to stop.

    python -m nemo_cpt.executors.supervisor --marker FILE [--max-restarts N] [--launcher PID] -- torchrun ... -m module

torchrun, on SIGTERM, kills its workers after 30 s, which is too short for the checkpoint of a large model; here the
workers themselves are signalled and torchrun is left to wait for them. The exit code is the command's own; after a
stop that lost nothing it is `StoppedEarlyError`'s, because an unfinished run must not look finished.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import psutil

from nemo_cpt.constants import MARKER
from nemo_cpt.errors import CptError, StoppedEarlyError
from nemo_cpt.executors.runner import REFUSAL, UNTRAINED
from nemo_cpt.output import say
from nemo_cpt.signals import STOP_SIGNALS, Given, held, listen

MARKER_PREFIX = "preempted-"  # of the file in a job's folder that says: it was told to stop, and nothing is lost
REFUSAL_PREFIX = "refused-"  # of the one that says: a CptError ended it
REACHED_FILE = "reached.json"  # in a job's folder here: where it is on a cluster that is reached over SSH
RUNNER = "nemo_cpt.executors.runner"
FROM_LAUNCHER = signal.SIGUSR2
POLL_SECONDS = 0.5
TIME_TO_SAVE = "NEMO_CPT_SECONDS_TO_SAVE"  # of a job's environment: who cancels the job kills it no sooner
DEFAULT_TIME_TO_SAVE = 600  # of a job that cannot be planned


class Supervisor:
    """One command, its restarts and its end.

    Args:
        command: program and arguments.
        marker: file by which the job says that it was told to stop, and saved or had not begun to train.
        max_restarts: restarts after an exit code other than 0.
        launcher: process that started this one; the job is told to stop when it has ended, because nobody would see
            it any more. None where a job outlives its launcher.
    """

    def __init__(self, command: list[str], marker: Path, max_restarts: int = 0, launcher: int | None = None) -> None:
        self.command, self.marker, self.max_restarts, self.launcher = command, marker, max_restarts, launcher
        self.refusal = marker.with_name(REFUSAL_PREFIX + marker.name.removeprefix(MARKER_PREFIX))
        self.child: subprocess.Popen[bytes] | None = None
        self.had_workers = False
        self.told = False
        self.signals = Given()

    def run(self) -> int:
        """Run until the command succeeds, was told to stop, or has used up its restarts; return the exit code.

        A CptError is not tried again: it says what the user must change. Its exit code is 2, also under torchrun,
        which turns every failure of a worker into 1.
        """
        listen(self._stop, (*STOP_SIGNALS, FROM_LAUNCHER))
        # Preemptions end the loop and are not restarts: only crashes use them up.
        for restart in range(self.max_restarts + 1):
            code = self._run_once()
            if self.refusal.exists():
                return CptError.exit_code
            if stopped := self._how_it_stopped(code):
                say(f"nemo_cpt: stopped ahead of the end, {stopped}; the same command goes on from there")
                return StoppedEarlyError.exit_code
            if code in (0, CptError.exit_code) or self.told:
                break
            if restart < self.max_restarts:
                say(f"nemo_cpt: exit code {code}; restart {restart + 1} of {self.max_restarts}")
        if code and self.told:
            say("nemo_cpt: told to stop, and ended unsaved; the same command goes on from the last checkpoint")
        return code

    def _how_it_stopped(self, code: int) -> str:
        """What the marker says; nothing where it is not there, or was left by mistake."""
        if not self.marker.exists():
            return ""
        if self.marker.read_text() != UNTRAINED:
            return "saved"
        # torchrun stops the other workers when one has crashed: who has not begun to train takes that for our signal.
        if code and not self.told:
            self.marker.unlink()
            return ""
        return "nothing was trained yet"

    def _run_once(self) -> int:
        for left_before in (self.marker, self.refusal):
            left_before.unlink(missing_ok=True)
        if self.told:
            self.marker.write_text(UNTRAINED)
            return 0
        words = {MARKER: str(self.marker), REFUSAL: str(self.refusal)}
        with held(STOP_SIGNALS if RUNNER in self.command else ()):
            # A session of its own, so that a signal to this process's group reaches the job through _signal_job alone.
            self.child = subprocess.Popen(self.command, start_new_session=True, env=os.environ | words)
        code = self._wait(self.child)
        # As a shell has it: Popen's codes of signals are negative.
        return 128 - code if code < 0 else code

    def _wait(self, child: "subprocess.Popen[bytes]") -> int:
        """Wait for the child's end; tell it to stop once this process was told, or its launcher is gone."""
        passed_on = False
        self.had_workers = False
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(POLL_SECONDS)
            # A process whose parent has ended gets another one.
            self.told |= self.launcher is not None and os.getppid() != self.launcher
            if self.told and not passed_on:
                self._signal_job()
                passed_on = True
            if self._is_torchrun and not self.had_workers:
                self.had_workers = bool(children(child.pid))

    @property
    def _is_torchrun(self) -> bool:
        return Path(self.command[0]).name == "torchrun"

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Let the job save at the first signal; at the second of one kind end it."""
        self.told = True
        again = self.signals.add(number) > 1 and number != signal.SIGHUP  # which often follows SIGTERM by itself
        if again and self.child is not None and self.child.poll() is None:
            _end(self.child.pid)

    def _signal_job(self) -> None:
        """Send SIGTERM to the command, or to torchrun's workers; torchrun without any yet is ended, nothing is lost."""
        assert self.child is not None
        if not self._is_torchrun:
            self.child.send_signal(signal.SIGTERM)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child.pid, signal.SIGSTOP)  # so that it starts no worker while they are counted
        workers = children(self.child.pid)
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):  # it ended since it was listed
                os.kill(pid, signal.SIGTERM)
        if not workers and not self.had_workers:
            self.marker.write_text(UNTRAINED)
            self.child.kill()
        self.child.send_signal(signal.SIGCONT)


def _end(leader: int) -> None:
    """Kill the workers, each with a session of its own under torchrun, and their parent."""
    for pid in [*children(leader), leader]:
        for kill in (os.killpg, os.kill):  # a worker that leads no group is no group's name
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Return the ids of a process's direct children; none if it has ended."""
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def seconds_to_save(pid: int) -> int:
    """Return how long a job, by its supervisor's process id, may take to save when it is told to stop."""
    try:
        return int(psutil.Process(pid).environ()[TIME_TO_SAVE])
    except (psutil.Error, KeyError, ValueError):  # ended, another user's, or started without it
        return DEFAULT_TIME_TO_SAVE


def main() -> None:
    """Run the command that follows `--` and exit as it did."""
    parser = argparse.ArgumentParser(
        description="Run a job's command, restart it after a crash, let it save on SIGTERM."
    )
    parser.add_argument("--marker", type=Path, required=True, help="by which the job says that it saved and stopped")
    parser.add_argument("--max-restarts", type=int, default=0, help="after an exit code other than 0")
    parser.add_argument("--launcher", type=int, help="process id; the job is told to stop when it has ended")
    parser.add_argument("command", nargs="+", help="after --")
    given = parser.parse_args()
    sys.exit(Supervisor(given.command, given.marker, given.max_restarts, given.launcher).run())


if __name__ == "__main__":
    main()
