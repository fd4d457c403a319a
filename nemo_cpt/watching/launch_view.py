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
from nemo_cpt.watching.following import POLL_SECONDS, Follower, live_view

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

    with live_view(WithoutReaders(sys.stdout)) as view:  # whose job outlives its terminal
        ended = threading.Event()

        def draw() -> None:
            while not ended.wait(POLL_SECONDS):
                with contextlib.suppress(FileNotFoundError):  # a checkpoint that was removed while it was looked at
                    view.show(follower.snapshot(log()))

        view.show(follower.snapshot())
        thread = threading.Thread(target=draw, daemon=True, name="view")
        thread.start()
        try:
            with contextlib.redirect_stdout(_Said(view.above)):
                yield experiment.append
        finally:
            ended.set()
            thread.join()
            last = follower.snapshot(log())
            view.show(replace(last, state="ended", seconds=None) if last.state in ("starting", "running") else last)


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
