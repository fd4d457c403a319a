"""Commands on a pseudo-terminal, and what such a terminal shows."""

import os
import pty
import re
import selectors
import signal
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

SECONDS = 120  # in which a command says something; no test depends on how soon
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[=>]|\r")
TOKENS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+")


class Terminal:
    """A command on a terminal of its own, whose Ctrl-C and Ctrl-Z it gets."""

    def __init__(
        self, command: Sequence[str], cwd: Path | None = None, columns: int = 80, stderr: int | None = None,
        **variables: str,
    ) -> None:  # fmt: skip
        self.master, self.slave = pty.openpty()  # the slave stays open: its modes are looked at behind the command
        termios.tcsetwinsize(self.slave, (24, columns))
        environment = os.environ | {"TERM": "xterm", "NO_COLOR": "1", "PROMPT_TOOLKIT_NO_CPR": "1", **variables}
        self.process = subprocess.Popen(
            command, stdin=self.slave, stdout=self.slave, stderr=stderr or self.slave, cwd=cwd,
            env={name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")},
            start_new_session=True,
            preexec_fn=self._take,
        )  # fmt: skip
        self.shown = ""
        self.raw = ""  # all that it wrote, with what moves the cursor

    def _take(self) -> None:
        os.close(os.open(os.ttyname(self.slave), os.O_RDWR))  # which makes it the new session's own
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it

    @property
    def modes(self) -> list:
        """As they are now."""
        return termios.tcgetattr(self.slave)

    def type(self, keys: str) -> None:
        """Press keys at the prompt; only then is the terminal in the mode for it."""
        self.until(">")
        self.press(keys)

    def press(self, keys: str) -> None:
        """Press keys, whatever is shown."""
        os.write(self.master, keys.encode())

    def until(self, pattern: str) -> str:
        """Read on until a pattern is shown; return what was read up to its end."""
        deadline = time.monotonic() + SECONDS
        while (found := re.search(pattern, self.shown)) is None:
            ended = self.process.poll() is not None
            if self._said(0.1):
                self._read()
            else:
                waiting = not ended and time.monotonic() < deadline
                assert waiting, f"{pattern!r} is not in {self.shown[-2000:]!r}"
        read, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return read

    def _said(self, seconds: float) -> bool:
        with selectors.DefaultSelector() as selector:  # `select.select` takes no descriptor above 1,023
            selector.register(self.master, selectors.EVENT_READ)
            return bool(selector.select(seconds))

    def _read(self) -> None:
        text = os.read(self.master, 65536).decode(errors="replace")
        self.raw += text
        self.shown += CONTROLS.sub("", text)

    def ends(self) -> int:
        """The exit code; what it still writes is read meanwhile, or it would wait for that."""
        while self.process.poll() is None:
            if self._said(0.1):
                self._read()
        while self._said(0):
            self._read()
        return self.process.returncode

    def close(self) -> None:
        """End the command, and close the terminal."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self.slave)
        os.close(self.master)


def screen(printed: str) -> list[str]:
    """The lines that a terminal shows of what a view wrote to it."""
    rows, row = [""], 0
    for token in TOKENS.findall(printed):
        if token == "\n":
            row += 1
            rows += [""] * (row == len(rows))
        elif token.startswith("\x1b") and token.endswith("A"):
            row = max(row - int(token[2:-1] or 1), 0)
        elif token == "\x1b[J":
            rows[row:] = [""]
        elif not token.startswith(("\x1b", "\r")):
            rows[row] += token
    return rows
