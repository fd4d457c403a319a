"""The view of a job while the process that launched it waits for it.

A thread of the launcher reads the run's files and draws; the job is another process, and its log goes to a file. Of
what the launcher prints, NeMo-Run's panels are left out, and ours stand above the view.
"""

import contextlib
import io
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from nemo_cpt.executors.nemo_run_patches import newest_log
from nemo_cpt.executors.stopping import STOPPING
from nemo_cpt.output import WithoutReaders
from nemo_cpt.watching.following import POLL_SECONDS, Follower
from nemo_cpt.watching.screen import screen_on

OURS = (STOPPING, "experiment ", "nemo_cpt: ")  # beginnings of lines


@contextlib.contextmanager
def launch_view(folder: Path) -> Iterator[Callable[[Path], None]]:
    """Show a run while the block runs; yields what is to be told the experiment's folder, where the log will be.

    Args:
        folder: the run's.
    """
    follower = Follower(folder, starting=True)
    experiment: list[Path] = []

    def log() -> Path | None:
        return newest_log(experiment[0]) if experiment else None

    # Of a job that outlives its terminal. To leave the view would be to stop the job: that is Ctrl-C alone.
    with screen_on(WithoutReaders(sys.stdout), sys.stdin, may_leave=False) as screen:
        ended = threading.Event()

        def draw() -> None:
            while not ended.is_set():
                with contextlib.suppress(FileNotFoundError):  # a checkpoint that was removed while it was looked at
                    screen.show(follower.snapshot(log()))
                screen.wait(POLL_SECONDS)

        # A daemon: should it hang on a file system, the launcher ends all the same.
        thread = threading.Thread(target=draw, daemon=True, name="view")
        thread.start()
        try:
            with contextlib.redirect_stdout(_Said(screen.above)):
                yield experiment.append
        finally:
            ended.set()
            # The thread may be waiting for a key.
            screen.keys.wake()
            thread.join()
            last = follower.snapshot(log())
            # The job is over, whatever its files say: one that was killed has written no end.
            screen.end(replace(last, state="ended", seconds=None) if last.state in ("starting", "running") else last)


class _Said(io.TextIOBase):
    """A stream that passes on our own lines, and drops NeMo-Run's."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show, self._line = show, ""

    def write(self, text: str) -> int:
        if text.startswith(OURS):  # NeMo-Run's last line may have been one that it draws over, without an end
            self._line = ""
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            if line.startswith(OURS):
                self._show(line)
        return len(text)
