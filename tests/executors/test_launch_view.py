"""`nemo-cpt run` on a terminal: the view in the place of the log, with signals and exit codes as without it."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_cpt.executors.stopping import STOPPING
from nemo_cpt.training.metrics import END_FILE, read_file
from nemo_cpt.watching.launch_view import _Said
from tests.support.executor_jobs import recipe_arguments

TOKENS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+")


def screen(printed: str) -> list[str]:
    """The lines that a terminal shows of what rich's live display wrote to it."""
    rows, row = [""], 0
    for token in TOKENS.findall(printed):
        if token == "\n":
            row += 1
            rows += [""] * (row == len(rows))
        elif token.startswith("\x1b") and token.endswith("A"):
            row = max(row - int(token[2:-1] or 1), 0)
        elif token == "\x1b[2K":
            rows[row] = ""
        elif not token.startswith(("\x1b", "\r")):
            rows[row] += token
    return rows


@pytest.mark.timeout(400)
def test_the_view_instead_of_the_log_and_ctrl_c_saves(material: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = recipe_arguments(material, tmp_path / "results", 1) | {"max_steps": 10_000}
    controller, terminal = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "nemo_cpt.cli", "run", "tiny", *(f"{name}={value}" for name, value in given.items())],
        stdin=subprocess.DEVNULL, stdout=terminal, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"NEMORUN_HOME": str(tmp_path / "home"), "COLUMNS": "400", "LINES": "50", "TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    printed = ""
    while not re.search(r"step [1-9]\d* of 10,000", printed):
        printed += os.read(controller, 65536).decode(errors="replace")
    shown = [line for line in screen(printed) if line.strip()]
    assert len(shown) <= 12, shown
    running.send_signal(signal.SIGINT)
    try:
        while block := os.read(controller, 65536):
            printed += block.decode(errors="replace")
    except OSError:  # the terminal is closed
        pass
    said = running.stderr.read() if running.stderr else ""
    assert running.wait(120) == 75, said
    assert said.splitlines()[-1].startswith("nemo-cpt: task tiny-continual_pretrain: ")
    last = screen(printed)
    assert STOPPING in last
    assert any("stopped" in line and "tiny_cpt" in line for line in last)
    assert not any("[NeMo" in line or "Entering Experiment" in line for line in last)
    (log,) = {line.partition("log ")[2].strip() for line in last if line.startswith("log ")}
    assert "[NeMo I" in Path(log).read_text()
    assert read_file(tmp_path / "results/tiny_cpt", END_FILE)["state"] == "stopped"


def test_of_what_the_launcher_prints_our_lines_are_shown_whole() -> None:
    shown: list[str] = []
    said = _Said(shown.append)
    print("─ Entering Experiment ─", "nemo_cpt: wor", sep="\n", end="", file=said)
    print("ds\nLaunching job", end="", file=said)
    print(STOPPING, file=said)
    assert shown == ["nemo_cpt: words", STOPPING]
