"""Runs a task inside a job, as NeMo-Run's fdl_runner does, and tells the job's script how it ended where that is lost.

A recipe that is told to stop saves, and raises StoppedEarlyError; a training that is done returns. A CptError ends the
process with exit code 2, of which torchrun makes 1. Each of the two leaves a file. Until a training listens, at its
first step, there is nothing to save, and a signal ends the process. A task that ends itself with `sys.exit()` leaves no
file: nobody knows whether it saved.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nemo_cpt import signals
from nemo_cpt.constants import MARKER
from nemo_cpt.errors import CptError, StoppedEarlyError
from nemo_cpt.executors.tracking import continue_wandb_run
from nemo_cpt.importing import uncollected
from nemo_cpt.output import WithoutReaders, say

UNTRAINED = "nothing was trained yet"  # what stands in that file where there was nothing to save
REFUSAL = "NEMO_CPT_REFUSED"  # names the file of a task that a CptError ended


def main() -> None:
    """Run the task that the command line names."""
    # First of all: imports take a minute, and a signal in them must not end the process without a marker.
    signals.listen(_as_sigterm, signals.STOP_SIGNALS)
    signals.listen(_end_untrained, [signal.SIGTERM])
    signals.shield_children()
    sys.stdout, sys.stderr = WithoutReaders(sys.stdout), WithoutReaders(sys.stderr)
    with told_how_it_ends():
        try:
            _run_task()
        except SystemExit as end:
            say(f"nemo_cpt: the task ended itself: sys.exit({end.code!r})", sys.stderr)
            raise


@contextmanager
def told_how_it_ends() -> Iterator[None]:
    """Run a task within, and end the process as the task was stopped or refused, with the file that says so."""
    try:
        yield
    except StoppedEarlyError as stop:
        left = leave(MARKER, "" if stop.trained else UNTRAINED)
        say(f"nemo_cpt: {stop.message}")
        # With a marker 0: any other code would have srun or torchrun end the tasks that are still at it.
        sys.exit(0 if left else stop.exit_code)
    except CptError as error:
        leave(REFUSAL)
        say(f"nemo_cpt: {error.message}", sys.stderr)
        sys.exit(error.exit_code)


def _run_task() -> None:
    """Run the command as Typer would, but for what Typer makes of exceptions.

    Of a broken pipe to a child process it makes exit code 1 without a word, as if stdout were closed; of
    KeyboardInterrupt, a code that is returned and taken for success.
    """
    with ExitStack() as importing:
        importing.enter_context(uncollected())
        import fiddle
        import typer.main
        from nemo_run.core.runners.fdl_runner import fdl_runner_app

        # Between the config and its objects: only here is the W&B logger still a config that can be given an id.
        build = fiddle.build

        def prepare_and_build(task: Any) -> Any:
            importing.close()  # to read the task was to import its recipe, with NeMo
            continue_wandb_run(task)
            return build(task)

        fiddle.build = prepare_and_build
        command = typer.main.get_command(fdl_runner_app)
        with command.make_context("runner", sys.argv[1:]) as context:
            command.invoke(context)


def leave(variable: str, words: str = "") -> bool:
    """Write the file that an environment variable names; return whether there is one."""
    if file := os.environ.get(variable):
        Path(file).write_text(words)
    return bool(file)


def _as_sigterm(number: int, frame: Any) -> None:
    """Clusters send SIGUSR1 or SIGTERM ahead of the limit; a task that listens itself listens to one."""
    os.kill(os.getpid(), signal.SIGTERM)


def _end_untrained(number: int, frame: Any) -> None:
    """Leave the marker and end without unwinding: code that is being imported may catch any exception.

    Behind a training it does nothing: the process has saved and is about to end, or to say what went wrong.
    """
    if signals.training_began:
        return
    leave(MARKER, UNTRAINED)
    os.write(2, f"nemo_cpt: told to stop, {UNTRAINED}\n".encode())
    # 0, as with every marker; see `main`.
    os._exit(0)


if __name__ == "__main__":
    main()
