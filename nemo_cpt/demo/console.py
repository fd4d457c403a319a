"""What the demos show while they run: a headline a step, and a job's progress from its metrics file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nemo_cpt.training.metrics import read_metrics

console = Console(soft_wrap=True, highlight=False)


def say(step: str) -> None:
    """Print a step's headline."""
    console.print(f"\n[bold cyan]▸ {step}[/]")


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int, float], None]]:
    """A progress bar on a terminal, ten plain lines elsewhere; yields a function of the step and its loss."""
    columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, state="")

        def advance(step: int, loss: float) -> None:
            progress.update(task, completed=step, state=f"step {step}/{total}, loss {loss:.3f}")
            if not console.is_terminal and step % max(total // 10, 1) == 0:
                console.print(f"  step {step}/{total}, loss {loss:.3f}")

        yield advance


@contextmanager
def followed(run_folder: Path, total: int) -> Iterator[None]:
    """Show a run's steps from its metrics file while the block runs."""
    # The job is another process: its metrics file tells how far it is.
    done = Event()

    def follow(progress: Callable[[int, float], None]) -> None:
        shown = _last_step(run_folder)
        while not done.wait(0.5):
            for line in read_metrics(run_folder):
                if line["step"] > shown and "reduced_train_loss" in line:
                    shown = int(line["step"])
                    progress(shown, line["reduced_train_loss"])

    with bar("loading NeMo, then training", total) as progress:
        follower = Thread(target=follow, args=(progress,), daemon=True)
        follower.start()
        try:
            yield
        finally:
            time.sleep(0.6)  # one more look at the metrics
            done.set()
            follower.join()


@contextmanager
def quietly() -> Iterator[None]:
    """Keep NeMo-Run's own narration out of the demo's; a failed task still raises, with its log."""
    from nemo_run.core.frontend.console.api import CONSOLE

    # Not redirected: a failed task's log must still be seen.
    CONSOLE.quiet = True
    try:
        yield
    finally:
        CONSOLE.quiet = False


def _last_step(run_folder: Path) -> int:
    return max((int(line["step"]) for line in read_metrics(run_folder)), default=0)
