"""How far a workflow is: a bar on a terminal, a line a step elsewhere."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

TAIL = 4096  # bytes of a log that hold its last line
WIDTH = 90


class Shown:
    """The progress of a workflow.

    Args:
        name: the workflow's.
        total: steps.
        say: told the lines.
    """

    def __init__(self, name: str, total: int, say: Callable[[str], None]) -> None:
        self.name, self.total, self.say, self.done = name, total, say, 0
        self._live: Any = None
        self._task: Any = None

    def __enter__(self) -> "Shown":
        # stderr: stdout may be a file, or a script's.
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.table import Column

            # A log's line has what the others leave, and takes nothing of theirs.
            rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            # A path or a log may hold [brackets].
            name = TextColumn("{task.description}", markup=False)
            said = TextColumn("{task.fields[said]}", markup=False, table_column=rest)
            columns = (name, BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), said)
            self._live = Progress(*columns, console=Console(stderr=True), expand=True)
            self._task = self._live.add_task(self.name, total=self.total, said="")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self, text: str) -> None:
        """A line of its own."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self.say(text)

    def skip(self, step: str) -> None:
        """A step that is done already."""
        self._one_more(f"{step}: done before")

    def begin(self, step: str, do: str, why: str) -> None:
        """A step that starts."""
        if self._live is not None:
            self._live.update(self._task, description=step, said="")
        else:
            self.say(f"{self.done + 1}/{self.total} {step}: {do} ({why})")

    def update(self, log: Path) -> None:
        """A step that runs: the last line of its log."""
        if self._live is not None:
            self._live.update(self._task, said=_last_line(log))

    def end(self, step: str, seconds: float) -> None:
        """A step that is done."""
        self._one_more(f"{step}: done in {seconds:,.1f} s")

    def _one_more(self, text: str) -> None:
        self.done += 1
        self.line(f"{self.done}/{self.total} {text}")
        if self._live is not None:
            self._live.update(self._task, completed=self.done, description=self.name, said="")


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(file.tell() - TAIL, 0))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    # The last but one: what stands behind the last line end may be half a line.
    return next((line.strip()[:WIDTH] for line in reversed(lines[:-1]) if line.strip()), "")
