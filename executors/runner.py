"""Runs a task inside a job, as NeMo-Run's fdl_runner does, and tells the job's script when it was preempted.

NeMo's PreemptionCallback saves a checkpoint and ends the process with exit code 0, which looks like success; a training
that is done returns instead.
"""

import os
import signal
from pathlib import Path
from typing import Any

from nemo_cpt.executors.tracking import continue_wandb_run

MARKER = "NEMO_CPT_PREEMPTED"


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
        if stop.code in (0, None) and os.environ.get(MARKER):
            Path(os.environ[MARKER]).touch()
        raise


def _as_sigterm(number: int, frame: Any) -> None:
    """Clusters send SIGUSR1 or SIGTERM ahead of the limit; the callback listens to one."""
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
