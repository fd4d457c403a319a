"""A terminal that shows something in one place and hears single keys, and is left as it was found.

Drawn by hand: rich's Live hides the cursor, which a killed process leaves hidden, and draws over what the shell says
when a job is stopped and goes on.
"""

import contextlib
import os
import re
import selectors
import signal
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

NONE = -1  # of descriptors
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)  # that end a process without a word
_NO_CHARACTER = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO?.?")  # what arrows, function keys and Alt send


def shows_views(stream: Any) -> bool:
    """Whether a stream is a terminal on which something can be drawn over."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


class View:
    """A place at the end of a terminal's output, which stays there as it was last.

    Args:
        output: the terminal's stream.
    """

    def __init__(self, output: Any) -> None:
        from rich.console import Console

        self._output, self._console = output, Console(file=output)
        self._drawn: list[str] = []
        self._lock = threading.Lock()  # the launcher's own lines come from another thread than what is drawn

    @property
    def height(self) -> int:
        """The lines that may be drawn: of more the upper ones could not be drawn over."""
        return self._console.height - 1

    def draw(self, shown: "RenderableType") -> None:
        """Draw in the place of what was drawn last."""
        with self._console.capture() as captured:
            self._console.print(shown)
        with self._lock:
            self._write("", captured.get().split("\n")[:-1][: self.height])

    def above(self, line: str) -> None:
        """Print a line above what is drawn."""
        with self._lock:
            self._write(f"{line}\n", self._drawn)

    def _write(self, above: str, lines: list[str]) -> None:
        # At once: a terminal shows nothing of an empty place between two of its frames.
        up = f"\x1b[{len(self._drawn)}A" if self._drawn else ""
        self._drawn = lines  # first: a stop, and with it `leave`, may come while it is written
        self._output.write(f"\r{up}\x1b[J{above}" + "".join(f"{line}\n" for line in lines))
        self._output.flush()

    def leave(self) -> None:
        """Draw the next time below, whatever has been printed since."""
        self._drawn = []  # without the lock: a signal's handler calls this


class Keys:
    """Single keys of a terminal, heard without Enter and without being echoed; see `keys_of`.

    A terminal has one set of modes for all who use it: they are changed, and keys are read, in the foreground alone.

    Args:
        descriptor: the terminal's; NONE where there is none.
        returned: called when the process goes on after a stop.
    """

    def __init__(self, descriptor: int, returned: Callable[[], None]) -> None:
        self._descriptor, self._returned = descriptor, returned
        self._modes: list[Any] | None = None  # as they were found; None while they are so
        # Another thread cannot end a wait on the terminal; it can write into a pipe that is waited for, too.
        self._woken, self._waker = os.pipe()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self._descriptor != NONE

    def wait(self, seconds: float) -> str:
        """Wait so long at most for keys, and return those pressed; an arrow or a function key is none."""
        with selectors.DefaultSelector() as selector:  # `select.select` takes no descriptor above 1,023
            selector.register(self._woken, selectors.EVENT_READ)
            if self._in_foreground():
                selector.register(self._descriptor, selectors.EVENT_READ)
            ready = [key.fd for key, _ in selector.select(seconds)]
        if self._descriptor not in ready:
            return ""
        try:
            pressed = os.read(self._descriptor, 64)
        except OSError:  # the terminal was closed
            pressed = b""
        if not pressed:  # its end, which would be ready for ever
            self._descriptor = NONE
        return _NO_CHARACTER.sub("", pressed.decode(errors="replace"))

    def wake(self) -> None:
        """Let no `wait` wait any more."""
        os.write(self._waker, b"\0")

    def take(self) -> None:
        """Change the terminal's modes, if they are ours to change."""
        if self._in_foreground():
            with contextlib.suppress(termios.error):  # it was closed
                self._modes = self._modes or termios.tcgetattr(self._descriptor)
                tty.setcbreak(self._descriptor, termios.TCSANOW)

    def give_back(self) -> None:
        """Set the terminal's modes as they were found."""
        if self._modes is not None and self._in_foreground():
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._descriptor, termios.TCSANOW, self._modes)
            self._modes = None

    def close(self) -> None:
        """Leave the terminal as it was found."""
        self.give_back()
        os.close(self._woken)
        os.close(self._waker)

    def _in_foreground(self) -> bool:
        try:
            return self._descriptor != NONE and os.tcgetpgrp(self._descriptor) == os.getpgrp()
        except OSError:  # it was closed, or is another session's
            return False

    def end(self, number: int, frame: Any) -> None:
        """Handle a signal that ends the process: with it, and with the terminal as it was found."""
        self.give_back()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    def stop(self, number: int, frame: Any) -> None:
        """Handle Ctrl-Z."""
        self.give_back()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # here the process stands still; not where no shell could let it go on
        signal.signal(number, self.stop)
        self.go_on(number, frame)

    def go_on(self, number: int, frame: Any) -> None:
        """Handle SIGCONT: a shell has set modes of its own meanwhile, and printed its words."""
        self.take()
        self._returned()


@contextlib.contextmanager
def keys_of(stream: Any, returned: Callable[[], None]) -> Iterator[Keys]:
    """Hear a terminal's keys while the block runs; its modes are restored however that ends, but for SIGKILL.

    To be entered in the main thread. Signals that something else handles already are left to that.

    Args:
        stream: stdin; where it is no terminal there are no keys.
        returned: called when the process goes on after a stop.
    """
    keys = Keys(stream.fileno() if stream is not None and stream.isatty() else NONE, returned)
    handlers = dict.fromkeys(ENDING, keys.end) | {signal.SIGTSTP: keys.stop, signal.SIGCONT: keys.go_on}
    # NeMo-Run's launcher has handlers of its own, and the view stands within it.
    ours = [number for number in handlers if keys and signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in ours:
            signal.signal(number, handlers[number])
        keys.take()
        yield keys
    finally:
        keys.close()
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
