"""The end of a raw log, as a terminal can show it."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

TAIL_BYTES = 64 * 1024
# Colours and cursor movements (ECMA-48), and any other control character: a log must not steer the terminal.
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def last_lines(path: Path, count: int) -> list[str]:
    """A log's last lines as they would stand on a terminal: of a progress bar its last state; none of no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, 2) - TAIL_BYTES, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [_plain(line) for line in text.rstrip("\n").split("\n")[-count:]]


def _plain(line: str) -> str:
    return _CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]).expandtabs()


def render_log(path: str, lines: list[str], hint: str) -> "RenderableType":
    """The lines under the log's path, each in one line of the terminal."""
    from rich.console import Group
    from rich.text import Text

    top = Text.assemble((f"{hint}  ", "dim"), path or "no log yet", overflow="ellipsis", no_wrap=True)
    return Group(top, *(Text(line, overflow="ellipsis", no_wrap=True) for line in lines))
