"""Pictures for the documentation: of a page in Chromium, and of what a command prints on a terminal.

    python benchmarks/pictures.py page clean/ja/report.html docs/cleaning.png --height 900
    python benchmarks/pictures.py terminal docs/workflow.svg nemo-cpt workflow my.yaml --dry-run

docs/cleaning.png is the report of 10,000 Wikipedia articles, docs/workflow.png the page of `workflow new demo`, and
docs/workflow.svg its dry run after `max_steps` was changed.
"""

import argparse
import os
import pty
import shlex
import subprocess
import tempfile
import termios
from contextlib import suppress
from pathlib import Path

COLUMNS, LINES = 110, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    page = kinds.add_parser("page")
    page.add_argument("page", type=Path)
    page.add_argument("picture", type=Path)
    page.add_argument("--width", type=int, default=1000)
    page.add_argument("--height", type=int, default=900)
    terminal = kinds.add_parser("terminal")
    terminal.add_argument("picture", type=Path)
    terminal.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.kind == "page":
        return of_page(given.page, given.picture, given.width, given.height)
    of_terminal(given.command, given.picture)


def of_page(page: Path, picture: Path, width: int, height: int) -> None:
    """The top of a page, as Chromium shows it."""
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        shot = [f"--window-size={width},{height}", f"--screenshot={picture.resolve()}", page.resolve().as_uri()]
        subprocess.run(["chromium", *options, *shot], check=True, capture_output=True)


def of_terminal(command: list[str], picture: Path) -> None:
    """What a command leaves on a terminal."""
    from rich.console import Console
    from rich.text import Text

    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (LINES, COLUMNS))
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal):
        os.close(terminal)
        printed = b""
        with suppress(OSError):  # the command has ended
            while part := os.read(controller, 1 << 16):
                printed += part
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere)
        console.print(Text.from_ansi(printed.decode().replace("\r\n", "\n").rstrip()))
    picture.write_text(console.export_svg(title=shlex.join(command)))


if __name__ == "__main__":
    main()
