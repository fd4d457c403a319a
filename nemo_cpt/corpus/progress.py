"""What a long command shows: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any


class ProgressBar:
    """Progress over a known number of bytes or other units, on stderr so that stdout stays machine-readable.

    Args:
        title: What is being done.
        total: Bytes (or units) to go through; 0 where it is unknown.
        quiet: Show nothing.
        interval: Seconds between two lines where stderr is no terminal.
        unit: What is counted, where that is no bytes.
    """

    def __init__(
        self, title: str, total: int, quiet: bool = False, interval: float = 10.0, unit: str | None = None
    ) -> None:
        self.title, self.total, self.quiet, self.interval = title, total, quiet, interval
        self.unit, self._scale = (unit, 1.0) if unit else ("MB", 1e6)
        self._begin = self._shown = time.monotonic()
        self._start: int | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "ProgressBar":
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}", markup=False),  # a path may hold [brackets]
                BarColumn(),
                TextColumn("{task.fields[rates]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self.title, total=self.total or None, rates="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, documents: int = 0, tokens: int = 0) -> None:
        """Show how far it is.

        Args:
            done: Bytes gone through.
            documents: Documents finished in this run.
            tokens: Tokens written in this run.
        """
        now = time.monotonic()
        # A resumed run begins far along: its rate counts from there, not from 0.
        if self._start is None:
            self._start = done
        # Not at each chunk: a terminal, or a log on a shared disk, is slower than the work between two of them.
        if self.quiet or now - self._shown < (0.2 if self._bar else self.interval):
            return
        self._shown = now
        seconds = max(now - self._begin, 1e-9)
        rate = (done - self._start) / seconds
        rates = f"{rate / self._scale:,.1f} {self.unit}/s"
        if documents:
            rates = f"{documents / seconds:,.0f} documents/s, {rates}"
        if tokens:
            rates = f"{rates}, {tokens / 1e6:,.1f} M tokens"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rates=rates)
        else:
            print(f"{self.title}: {self._plain(done, rate)}{rates}", file=sys.stderr, flush=True)

    def _plain(self, done: int, rate: float) -> str:
        if not self.total:
            return f"{done / self._scale:,.0f} {self.unit}, "
        left = f", {(self.total - done) / rate:,.0f} s left" if rate > 0 else ""
        return f"{100 * done / self.total:.0f} % of {self.total / self._scale:,.0f} {self.unit}{left}, "
