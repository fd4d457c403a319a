"""`nemo-cpt run` on a terminal: the view in the place of the log, with signals and exit codes as without it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from nemo_cpt.executors.stopping import STOPPING
from nemo_cpt.training.metrics import END_FILE, read_file
from nemo_cpt.watching.launch_view import _Said
from tests.support.executor_jobs import recipe_arguments
from tests.support.terminals import Terminal, screen


def test_the_view_instead_of_the_log_and_ctrl_c_saves(material: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = recipe_arguments(material, tmp_path / "results", 1) | {"max_steps": 10_000}
    command = [sys.executable, "-m", "nemo_cpt.cli", "run", "tiny", *(f"{key}={value}" for key, value in given.items())]
    terminal = Terminal(command, columns=400, stderr=subprocess.PIPE, NEMORUN_HOME=str(tmp_path / "home"))
    found = terminal.modes
    terminal.until(r"step [1-9]\d* of 10,000")
    shown = [line for line in screen(terminal.raw) if line.strip()]
    assert len(shown) <= 12, shown
    terminal.press("l")
    terminal.until(r"l, q: back to the view .*combined\.log")
    terminal.press("l")
    terminal.until(r"step [1-9]\d* of 10,000")
    terminal.press("q\x03")  # to leave the view would be to end the job: only Ctrl-C does
    code = terminal.ends()
    said = terminal.process.stderr.read().decode() if terminal.process.stderr else ""
    assert code == 75, said
    assert terminal.modes == found
    assert said.splitlines()[-1].startswith("nemo-cpt: task tiny-continual_pretrain: ")
    last = screen(terminal.raw)
    assert STOPPING in last
    assert any("stopped" in line and "tiny_cpt" in line for line in last)
    assert not any("[NeMo" in line or "Entering Experiment" in line for line in last)
    (log,) = {line.partition("log ")[2].strip() for line in last if line.startswith("log ")}
    assert "[NeMo I" in Path(log).read_text()
    assert read_file(tmp_path / "results/tiny_cpt", END_FILE)["state"] == "stopped"
    terminal.close()


def test_of_what_the_launcher_prints_our_lines_are_shown_whole() -> None:
    shown: list[str] = []
    said = _Said(shown.append)
    print("─ Entering Experiment ─", "nemo_cpt: wor", sep="\n", end="", file=said)
    print("ds\nLaunching job", end="", file=said)
    print(STOPPING, file=said)
    assert shown == ["nemo_cpt: words", STOPPING]
