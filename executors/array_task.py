"""Runs one task of an array of them, or the job behind it; without NeMo-Run, which takes 7 s to import.

    python -m nemo_cpt.executors.array_task MODULE:FUNCTION FOLDER [NUMBER]

The function is called with the folder that the tasks share, and with the task's number where there is one. How the task
ends is told as `runner` tells it. One that is told to stop raises StoppedEarlyError in the function, which leaves what
it has done to the next start.
"""

import sys
from importlib import import_module
from typing import Any

from nemo_cpt import signals
from nemo_cpt.errors import StoppedEarlyError
from nemo_cpt.executors.runner import told_how_it_ends
from nemo_cpt.output import WithoutReaders


def main() -> None:
    """Run the task that the command line names."""
    signals.listen(_stop, signals.STOP_SIGNALS)
    signals.shield_children()
    # Whoever followed the log may be gone; the task is not to end of that.
    sys.stdout, sys.stderr = WithoutReaders(sys.stdout), WithoutReaders(sys.stderr)
    name, folder, *number = sys.argv[1:]
    module, _, function = name.partition(":")
    with told_how_it_ends():
        getattr(import_module(module), function)(folder, *map(int, number))


def _stop(number: int, frame: Any) -> None:
    # Once: what is left to do then is to leave the files in order.
    signals.listen(lambda number, frame: None, signals.STOP_SIGNALS)
    raise StoppedEarlyError("told to stop; the same task goes on from there")


if __name__ == "__main__":
    main()
