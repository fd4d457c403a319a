"""Runs a task inside a job, as NeMo-Run's fdl_runner does, and tells the job's script how it ended where that is lost.

NeMo's PreemptionCallback saves a checkpoint and ends the process with exit code 0, which looks like success; a training
that is done returns instead. A CptError ends it with exit code 2, of which torchrun makes 1. Each leaves a file.
Until the callback listens, at a training's first step, there is nothing to save, and a signal ends the process.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from nemo_cpt.errors import CptError, StoppedEarlyError
from nemo_cpt.executors.tracking import continue_wandb_run

MARKER = "NEMO_CPT_PREEMPTED"  # names the file that a task leaves which was told to stop: empty once it saved
UNTRAINED = "nothing was trained yet"  # what stands in that file where there was nothing to save
REFUSAL = "NEMO_CPT_REFUSED"  # names the one of a task that a CptError ended
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def main() -> None:
    """Run the task that the command line names."""
    listen(_as_sigterm, (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP))
    listen(_end_untrained, (signal.SIGTERM,))
    import fiddle
    from nemo_run.core.runners.fdl_runner import fdl_runner_app

    build = fiddle.build

    def prepare_and_build(task: Any) -> Any:
        continue_wandb_run(task)
        return build(task)

    fiddle.build = prepare_and_build
    try:
        fdl_runner_app(standalone_mode=False)
    except SystemExit as stop:
        _leave_a_word(stop.code or 0)
        raise
    except StoppedEarlyError as stop:
        _leave_a_word(0)
        print(f"nemo_cpt: {stop}", flush=True)
        sys.exit(0)  # any other code would have srun or torchrun end the tasks that are still at it
    except CptError as error:
        _leave_a_word(error.exit_code)
        print(f"nemo_cpt: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _leave_a_word(code: int | str) -> None:
    variables: dict[int | str, str] = {0: MARKER, CptError.exit_code: REFUSAL}
    if file := os.environ.get(variables.get(code, "")):
        Path(file).touch()


def listen(handler: Callable[[int, Any], None], numbers: Iterable[int]) -> None:
    """Call `handler` on these signals, also on those that were held back until now; SIGHUP only if nohup has not
    had it ignored."""
    heard = [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)


def _as_sigterm(number: int, frame: Any) -> None:
    """NeMo's callback listens to one signal."""
    os.kill(os.getpid(), signal.SIGTERM)


def _end_untrained(number: int, frame: Any) -> NoReturn:
    """Leave the marker and end without unwinding: code that is being imported may catch any exception."""
    if file := os.environ.get(MARKER):
        Path(file).write_text(UNTRAINED)
    os.write(2, f"nemo_cpt: told to stop, {UNTRAINED}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
