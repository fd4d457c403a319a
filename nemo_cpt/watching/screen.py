"""A run on a terminal: its view, and one key away the end of its raw log."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_cpt.watching.log_tail import last_lines, render_log
from nemo_cpt.watching.terminal import Keys, View, keys_of
from nemo_cpt.watching.view import Snapshot, render


class Screen:
    """What a terminal shows of a run; see `screen_on`.

    Attributes:
        keys: of the terminal.
        left: `q` was pressed in the view.
    """

    keys: Keys

    def __init__(self, view: View, may_leave: bool) -> None:
        self._view, self._may_leave = view, may_leave
        self._in_log = False
        self._drawn: Any = None
        self.left = False
        self.above = view.above

    def wait(self, seconds: float) -> None:
        """Wait so long at most for a key, and do what it asks for."""
        for key in self.keys.wait(seconds):
            if key == "l":
                self._in_log = not self._in_log
            elif key == "q":
                self.left |= self._may_leave and not self._in_log
                self._in_log = False

    def show(self, shown: Snapshot) -> None:
        """Draw a moment of the run, or of its log, in the place of the last one, if it is another."""
        if self._in_log:
            lines = last_lines(Path(shown.log), max(self._view.height - 1, 1)) if shown.log else []
            self._draw((shown.log, lines), lambda: render_log(shown.log, lines, "l, q: back to the view"))
        else:
            # A record that was read anew is another object, though it may be equal.
            self._draw((shown, id(shown.record)), lambda: render(shown, hint=self._hint))

    def end(self, shown: Snapshot) -> None:
        """Draw what stays on the terminal."""
        self._view.draw(render(shown))

    def begin_anew(self) -> None:
        """Draw the next moment below what the terminal shows."""
        self._view.leave()
        self._drawn = None

    def _draw(self, what: Any, rendered: Any) -> None:
        if what != self._drawn:
            self._drawn = what  # first: whoever begins anew may do so while it is being drawn
            self._view.draw(rendered())

    @property
    def _hint(self) -> str:
        return f"l: the log{'   q: leave, and the run goes on' if self._may_leave else ''}" if self.keys else ""


@contextlib.contextmanager
def screen_on(output: Any, stdin: Any, may_leave: bool) -> Iterator[Screen]:
    """A screen on a terminal, which stays there as it was last.

    Args:
        output: the terminal's stream to write to.
        stdin: where keys come from; where it is no terminal there are none.
        may_leave: whether `q` ends the watching.
    """
    screen = Screen(View(output), may_leave)
    with keys_of(stdin, returned=screen.begin_anew) as screen.keys:
        yield screen
