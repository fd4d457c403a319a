"""`nemo-cpt watch`: a run as its files tell of it, until it ends."""

import contextlib
import io
import json
import os
import pty
import resource
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from rich.console import Console

from nemo_cpt.training.metrics import END_FILE, append_metrics
from nemo_cpt.watching.following import RANK_0_LOG, Follower, newest_run
from nemo_cpt.watching.terminal import NONE, Keys
from nemo_cpt.watching.view import Snapshot, duration, lines, render
from tests.support import run_folders
from tests.support.executor_jobs import held_by_another_process
from tests.support.terminals import Terminal

COMMAND = [sys.executable, "-m", "nemo_cpt.cli", "watch"]


def watch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    alone = os.environ | {"NEMORUN_HOME": str(cwd / "nemo_run")}  # without the jobs that this user has submitted
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL, env=alone
    )


def end(folder: Path, state: str, message: str = "", time: float = 0) -> None:
    (folder / END_FILE).write_text(json.dumps({"state": state, "step": 60, "message": message, "time": time}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "results" / "ja"
    run_folders.describe(run)
    run_folders.measure(run, 60)
    return run


def shown(snapshot: Snapshot, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(snapshot))
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("state", "message", "code"),
    [
        ("finished", "", 0),
        ("ended early", "", 0),
        ("stopped", "saved at step 60", 75),
        ("failed", "CptError: no", 2),
        (None, "", 2),
    ],
)
def test_it_ends_as_the_run_did(folder: Path, state: str | None, message: str, code: int) -> None:
    """None stands for a job that was killed, and that nobody holds the folder for."""
    if state:
        end(folder, state, message)
    done = watch("ja", cwd=folder.parents[1])
    assert done.returncode == code, done.stderr
    assert f"ja: {state or 'killed'}" in done.stdout
    assert message in done.stderr
    assert "step 60 of 100  tokens/s 8,192 (plan 9,000)  loss " in done.stdout
    assert "validation at step 60: en 1.08" in done.stdout
    assert "forgotten" in done.stdout


def test_the_view_holds_what_one_wants_to_know(folder: Path) -> None:
    run_folders.warn(folder, 40, "en has got worse")
    text = shown(Follower(folder).snapshot())
    for part in (
        "step 60 of 100", "tokens/s 8,192 (plan 9,000)", "grad norm", "GPU 19.0 of 140 GiB", "gained", "forgotten",
        "bits per byte", "! en has got worse",
    ):  # fmt: skip
        assert part in text, part
    assert len(text.splitlines()) <= 12
    run_folders.warn(folder, 50, "en has got worse " + "by far " * 30 + "replay more")
    assert "replay more" in shown(Follower(folder).snapshot())  # what to do stands at the end


def test_time_is_left_by_the_pace_of_the_steps_with_what_lies_between_them(folder: Path) -> None:
    assert Follower(folder).snapshot().record.seconds_left == pytest.approx(40 * run_folders.STEP_SECONDS)


def stamp(seconds: float, hours: int = 0) -> str:
    """So many seconds behind START, as NeMo's log has a time where clocks are so many hours ahead of UTC."""
    there = datetime.fromtimestamp(run_folders.START + seconds, timezone(timedelta(hours=hours)))
    return there.replace(tzinfo=None).isoformat(" ", timespec="seconds")


def test_only_what_nemo_warns_of_behind_the_first_step_is_shown_and_equal_warnings_once(folder: Path) -> None:
    """The first step ended two seconds behind START."""
    with held_by_another_process(folder):
        follower = Follower(folder)
        log = folder / RANK_0_LOG
        log.write_text(f"[NeMo W {stamp(-9)} a:1] noise\n[NeMo I {stamp(9)} a:1] words\n[NeMo W {stamp(9)} a:1] real\n")
        assert follower.snapshot().warnings == ["real"]
        with log.open("a") as file:
            file.write(f"[NeMo W {stamp(10)} a:1] real\n[NeMo W {stamp(11)} a:1] torn")
        snapshot = follower.snapshot()
        assert snapshot.warnings == ["real", "real"]
        assert "! real (2 times)" in shown(snapshot)


@pytest.mark.parametrize("hours", [-9, 9])
def test_the_log_of_a_cluster_in_another_time_zone_is_read_by_its_own_clock(folder: Path, hours: int) -> None:
    run_folders.describe(folder, started=f"2026-01-02 03:04:05{hours:+03}:00")
    logged = [f"[NeMo W {stamp(seconds, hours)} a:1] {said}\n" for seconds, said in ((-9, "noise"), (9, "real"))]
    (folder / RANK_0_LOG).write_text("".join(logged))
    assert Follower(folder).snapshot().warnings == ["real"]


def test_a_warning_of_the_runs_own_is_told_and_shown_among_those_of_its_log(folder: Path) -> None:
    with held_by_another_process(folder):
        logged = [f"[NeMo W {stamp(seconds)} a:1] logged {seconds}\n" for seconds in (20, 21, 22)]
        (folder / RANK_0_LOG).write_text("".join(logged))
        before = Follower(folder).snapshot()
        run_folders.warn(folder, 40, "en has got worse", seconds=30)
        after = Follower(folder).snapshot()
        assert list(lines(after, before)) == ["warning: en has got worse"]
        assert "! en has got worse" in shown(after)


def test_lines_say_what_is_new_and_nothing_twice(folder: Path) -> None:
    with held_by_another_process(folder):
        follower = Follower(folder)
        before = follower.snapshot()
        assert before.state == "running"
        assert list(lines(follower.snapshot(), before)) == []
        run_folders.measure(folder, 61)
        (step,) = lines(follower.snapshot(), before)
        assert step.startswith("step 61 of 100")
        end(folder, "finished", time=time.time() + 1)
        assert list(lines(follower.snapshot(), follower.snapshot())) == []
        assert follower.snapshot().state == "finished"


def test_a_job_that_was_started_just_now_is_not_what_an_earlier_start_left(folder: Path) -> None:
    end(folder, "stopped")
    follower = Follower(folder, starting=True)
    text = shown(follower.snapshot())
    assert "starting" in text
    assert "step 60" not in text
    assert "importing NeMo" in text
    with held_by_another_process(folder):
        assert Follower(folder).snapshot().state == "running"  # it began after the end that is written there
        run_folders.describe(folder)
        assert follower.snapshot().state == "running"
    end(folder, "stopped", time=time.time() + 1)
    assert follower.snapshot().state == "stopped"


def test_the_newest_run_is_the_one_that_was_measured_last(folder: Path) -> None:
    other = folder.with_name("other")
    run_folders.measure(other, 1)
    os.utime(other / "metrics/steps.jsonl", (1, 1))
    assert newest_run(folder.parent) == folder


def read_until(terminal: int, text: str) -> str:
    found = ""
    while text not in found:
        found += os.read(terminal, 65536).decode(errors="replace")
    return found


def test_a_live_view_follows_the_run_and_ctrl_c_leaves_it_alone(folder: Path) -> None:
    with held_by_another_process(folder):
        for ends in (True, False):
            controller, terminal = pty.openpty()
            running = subprocess.Popen(
                COMMAND, stdout=terminal, stderr=terminal, cwd=folder.parents[1],
                env=os.environ | {"COLUMNS": "110", "LINES": "40", "TERM": "xterm"},
            )  # fmt: skip
            os.close(terminal)
            read_until(controller, "step 60 of 100")
            if ends:
                run_folders.measure(folder, 61)
                read_until(controller, "step 61 of 100")
                end(folder, "finished", time=time.time() + 1)
                read_until(controller, "finished")
            else:
                running.send_signal(signal.SIGINT)
            assert running.wait(60) == 0
            os.close(controller)
            (folder / END_FILE).unlink(missing_ok=True)
            run_folders.measure(folder, 60)


@pytest.fixture
def on_terminal(folder: Path) -> Iterator[Callable[[list[str]], Terminal]]:
    """Starts a command on a terminal, beside a job that holds the run."""
    started: list[Terminal] = []

    def start(command: list[str]) -> Terminal:
        started.append(Terminal(command, cwd=folder.parents[1], columns=100))
        return started[-1]

    with held_by_another_process(folder):
        yield start
        for each in started:
            each.close()


def hears_keys(terminal: Terminal) -> bool:
    return not terminal.modes[3] & (termios.ICANON | termios.ECHO)


@pytest.mark.parametrize("ended_by", ["q", "\x03", signal.SIGTERM, "an error"])
def test_a_key_goes_to_the_raw_log_and_back_and_the_terminal_is_left_as_it_was(
    folder: Path, on_terminal: Callable[[list[str]], Terminal], ended_by: str | int
) -> None:
    log = folder / RANK_0_LOG
    log.write_text("".join(f"line {number}\n" for number in range(500)) + "10 %\r100 % \x1b[31mred\x1b]0;title\x07\n")
    terminal = on_terminal(COMMAND)
    found = terminal.modes
    terminal.until("step 60 of 100")
    terminal.until("l: the log   q: leave, and the run goes on")
    assert hears_keys(terminal)
    terminal.press("\x1b[Cl")  # an arrow is no key of ours, whatever letter it ends in
    shown = terminal.until("100 % red\n")
    assert "line 499\n" in shown
    assert "line 478\n" not in shown  # 24 lines are the terminal
    with log.open("a") as file:
        file.write("and one more\n")
    terminal.until("and one more\n")
    terminal.press("q")
    terminal.until("step 60 of 100[\\s\\S]*q: leave")
    if ended_by == "an error":
        (folder / "metrics/run.json").write_text("[]")
    else:
        terminal.press(ended_by) if isinstance(ended_by, str) else terminal.process.send_signal(ended_by)
    code = terminal.ends()
    assert code == {"q": 0, "\x03": 0, "an error": 1}.get(str(ended_by), -signal.SIGTERM)
    assert terminal.modes == found


def test_ctrl_z_gives_the_terminal_back_and_fg_goes_on(
    folder: Path, on_terminal: Callable[[list[str]], Terminal]
) -> None:
    (folder / RANK_0_LOG).write_text("a line of the log\n")
    shell = on_terminal(["env", "PS1=ready> ", "sh", "-i"])
    shell.press(f"{shlex.join(COMMAND)}\n")
    shell.until("q: leave")
    assert hears_keys(shell)
    shell.press("\x1a")
    shell.until("Stopped")
    assert not hears_keys(shell)
    shell.press("fg\n")
    shell.until("step 60 of 100[\\s\\S]*q: leave")
    shell.press("l")
    shell.until("a line of the log")
    shell.press("qq")
    shell.until("ready> ")
    shell.press("echo left with $?\n")
    shell.until("left with 0")
    assert not hears_keys(shell)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["jaa"], "there is no run 'jaa' in results; near: ja"),
        (["other"], "other holds no run"),
        (["-d", "nowhere"], "there is no folder nowhere with runs"),
        (["-d", "results/ja"], "is one itself"),
        (["empty"], "has no metrics/steps.jsonl: the run has measured nothing yet"),
    ],
)
def test_bad_input(folder: Path, arguments: list[str], says: str) -> None:
    (folder.with_name("empty") / "checkpoints").mkdir(parents=True)
    (folder.parents[1] / "other").mkdir(exist_ok=True)
    done = watch(*arguments, cwd=folder.parents[1])
    assert (done.returncode, says in done.stderr) == (2, True), done.stderr


def test_keys_are_waited_for_where_a_process_has_more_files_open_than_select_takes() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        opened = [os.open(os.devnull, os.O_RDONLY)]
        while opened[-1] < 1024:
            opened.append(os.dup(opened[0]))
        keys = Keys(NONE, lambda: None)
        try:
            keys.wake()
            assert keys.wait(60) == ""  # at once: it was woken
        finally:
            keys.close()
            for descriptor in opened:
                os.close(descriptor)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_watching_imports_neither_torch_nor_nemo(folder: Path) -> None:
    end(folder, "finished")
    code = (
        "import sys; sys.argv = ['nemo-cpt', 'watch']\nimport atexit\n"
        "heavy = ('torch', 'nemo', 'nemo_run', 'numpy', 'matplotlib')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
        "from nemo_cpt.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder.parents[1])
    assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr


def test_without_a_reader_it_ends(folder: Path) -> None:
    """As behind `| head -1`: there is nobody to watch for."""
    with held_by_another_process(folder):
        watching = subprocess.Popen([*COMMAND, "--plain"], stdout=subprocess.PIPE, text=True, cwd=folder.parents[1])
        assert watching.stdout is not None
        assert watching.stdout.readline() == "ja: running\n"
        watching.stdout.close()
        for step in range(61, 300):
            append_metrics(folder, {"step": step})
            with contextlib.suppress(subprocess.TimeoutExpired):
                watching.wait(1)
                break
        assert watching.returncode == 1


def test_durations() -> None:
    assert [duration(each) for each in (5, 65, 3661, 200_000)] == ["5 s", "1:05", "1:01:01", "2 days 7 h"]
