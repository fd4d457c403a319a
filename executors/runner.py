"""Runs a task inside a job, as NeMo-Run's fdl_runner does, and tells the job's script how it ended where that is lost.

NeMo's PreemptionCallback saves a checkpoint and ends the process with exit code 0, which looks like success; a training
that is done returns instead. A CptError ends it with exit code 2, of which torchrun makes 1. Each leaves a file.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from nemo_cpt.errors import CptError
from nemo_cpt.executors.tracking import continue_wandb_run

MARKER = "NEMO_CPT_PREEMPTED"  # names the file that a task leaves which was told to stop, and saved
REFUSAL = "NEMO_CPT_REFUSED"  # names the one of a task that a CptError ended


def main() -> None:
    """Run the task that the command line names."""
    import fiddle
    from nemo_run.core.runners.fdl_runner import fdl_runner_app

    build = fiddle.build

    def prepare_and_build(task: Any) -> Any:
        continue_wandb_run(task)
        return build(task)

    fiddle.build = prepare_and_build
    signal.signal(signal.SIGUSR1, _as_sigterm)
    try:
        fdl_runner_app(standalone_mode=False)
    except SystemExit as stop:
        _leave_a_word(stop.code or 0)
        raise
    except CptError as error:
        _leave_a_word(error.exit_code)
        print(f"nemo_cpt: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _leave_a_word(code: int | str) -> None:
    variables: dict[int | str, str] = {0: MARKER, CptError.exit_code: REFUSAL}
    if file := os.environ.get(variables.get(code, "")):
        Path(file).touch()


def _as_sigterm(number: int, frame: Any) -> None:
    """Clusters send SIGUSR1 or SIGTERM ahead of the limit; the callback listens to one."""
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
