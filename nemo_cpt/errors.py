"""The one exception for what the user can mend, and a kind of it for what only has to be started again."""

import difflib
import io
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any

from nemo_cpt.output import say
from nemo_cpt.urls import hide_credentials


class CptError(Exception):
    """Something the user gave cannot work; the message says what, with the value, and what to do about it.

    Uncaught, it ends a process with its message on stderr and exit code 2, without a traceback: a command line, a
    script, a training job. Credentials in URLs never reach it, also those of other libraries' messages.
    """

    exit_code = 2

    def __init__(self, message: object) -> None:
        super().__init__(hide_credentials(str(message)))

    @property
    def message(self) -> str:
        """The message alone: to one that is raised while a config is built, Fiddle appends where in the config."""
        return str(getattr(self, "proxy_base_exception", self))


class StoppedEarlyError(CptError):
    """A job was told to stop, and nothing that it trained is lost: nothing is wrong, and the run is not finished.

    Attributes:
        trained: it did at least a step, and has saved; else this start left nothing.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later

    def __init__(self, message: object, trained: bool = True) -> None:
        super().__init__(message)
        self.trained = trained


def exit_with_the_message() -> None:
    """Let an uncaught CptError end this process with its message and its exit code instead of a traceback and 1.

    Importing nemo_cpt does this, so that no script has to. Typer, which NeMo-Run's command line is made with, replaces
    the hook without asking the one before it: jobs and executors do it again. A second call changes nothing.
    """
    if not hasattr(sys.excepthook, "exits_with_the_message"):
        sys.excepthook = _hook_before(sys.excepthook)


def _hook_before(others: Callable[..., Any]) -> Callable[..., Any]:
    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, CptError):
            return others(kind, error, trace)
        # torch.distributed calls earlier hooks with a buffer as sys.stderr, and loses that where one of them exits.
        stream = sys.__stderr__ if isinstance(sys.stderr, io.StringIO) else sys.stderr
        say(f"nemo_cpt: {error.message}", stream)
        if not (hasattr(sys, "ps1") or sys.flags.inspect):  # an interactive session goes on
            sys.exit(error.exit_code)

    hook.exits_with_the_message = True  # type: ignore[attr-defined]
    return hook


def nearest(key: str, known: Collection[str]) -> str:
    """What to say behind a name that is not known: those nearest to it, or all."""
    near = difflib.get_close_matches(key, list(known), n=3, cutoff=0.5)
    return f"near: {', '.join(near)}" if near else f"it has: {', '.join(known)}"


def near_paths(path: Path) -> str:
    """What to say behind the name of a path that is not there: those beside it with names like it; perhaps nothing."""
    beside = [each.name for each in path.parent.glob("[!.]*") if each.name != path.name]
    near = difflib.get_close_matches(path.name, beside, n=3)
    return f"; near: {', '.join(str(path.with_name(each)) for each in near)}" if near else ""
