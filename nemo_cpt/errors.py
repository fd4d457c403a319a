"""The one exception for what the user can mend, and a kind of it for what only has to be started again."""

import io
import sys
from types import TracebackType

from nemo_cpt.urls import hide_credentials


class CptError(Exception):
    """Something the user gave cannot work; the message says what, with the value, and what to do about it.

    Command lines and training jobs turn it into its message on stderr and exit code 2, without a traceback.
    Credentials in URLs never reach it, also those of other libraries' messages.
    """

    exit_code = 2

    def __init__(self, message: object) -> None:
        super().__init__(hide_credentials(str(message)))


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
    """Let an uncaught CptError end this process with its message and its exit code instead of a traceback and 1."""
    others = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, CptError):
            return others(kind, error, trace)
        # torch.distributed calls earlier hooks with a buffer as sys.stderr, and loses that where one of them exits.
        stream = sys.__stderr__ if isinstance(sys.stderr, io.StringIO) else sys.stderr
        print(f"nemo_cpt: {error}", file=stream, flush=True)
        sys.exit(error.exit_code)

    sys.excepthook = hook
