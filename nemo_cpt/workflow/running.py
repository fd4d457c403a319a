"""Running a workflow on this machine: step by step, each in a process of its own; killed or stopped, it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from nemo_cpt.arguments import checked
from nemo_cpt.corpus.atomic_files import make_folder, write_whole
from nemo_cpt.errors import CptError, StoppedEarlyError
from nemo_cpt.installed import installed_versions
from nemo_cpt.launching.results import checkpoint_folder
from nemo_cpt.python_files import environment_of_children
from nemo_cpt.signals import Given, listen
from nemo_cpt.training import run_lock
from nemo_cpt.workflow import outputs, recipes
from nemo_cpt.workflow.dry_run import dry_run, refuse_red
from nemo_cpt.workflow.kinds import EXECUTOR, OWN, TASKS, paths_in, value_of
from nemo_cpt.workflow.page import write_up
from nemo_cpt.workflow.showing import Shown
from nemo_cpt.workflow.standing import (
    Chosen,
    Standing,
    check_free,
    code_of,
    goes_on,
    inputs_of,
    outputs_of,
    standing,
)
from nemo_cpt.workflow.state import DONE, FAILED, PACKAGES, RUNNING, STOPPED, Record, State
from nemo_cpt.workflow.steps import Step, Workflow

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TOLD_LINES = 15  # of a log whose step crashed without a word of ours
SPEAKERS = ("nemo-cpt: ", "nemo_cpt: ")


@checked
def run(workflow: Workflow, chosen: Chosen | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run what is not done yet, and write the record and the page.

    Args:
        workflow: its steps.
        chosen: what of it; all of it when None.
        say: told a line about each step, where there is no terminal.

    Returns:
        The record of all, as `record.json` has it.

    Raises:
        CptError: something of it cannot work, which is found before anything runs where it can be; a step failed.
        StoppedEarlyError: it was told to stop; the same call goes on.
    """
    chosen = chosen or Chosen()
    state, again = State(workflow), chosen.again(workflow)
    make_folder(workflow.folder)
    workflow.check()  # first: what cannot work leaves no folder of records, perhaps in the wrong place
    with state.held():
        state.check_not_submitted()
        found = dry_run(workflow, chosen, plan=False)
        refuse_red(found)
        runner = Runner(workflow, state, chosen.force, Shown(workflow.name, len(found.standings), say))
        try:
            with runner.shown, runner.listening():
                for each in found.standings:
                    runner.take(each.step, again=each.step.name in again)
        finally:
            page = write_up(state)
        runner.shown.line(f"{workflow.name} is done: {page}")
        return state.whole()


class Runner:
    """One run of a workflow.

    Args:
        workflow: its steps.
        state: its records, held.
        force: see `Chosen`.
        shown: where its progress is shown.
    """

    def __init__(self, workflow: Workflow, state: State, force: bool, shown: Shown) -> None:
        self.workflow, self.state, self.force, self.shown = workflow, state, force, shown
        self.child: subprocess.Popen[bytes] | None = None
        self.given = Given()
        # What nobody makes, as it is now: two steps must not read two versions of it.
        self.stamps = {
            path: _stamps(workflow.folder / path) for step in workflow.order for path in workflow.given(step)
        }

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Pass what tells this process to stop on to the step that runs."""
        before = {number: signal.getsignal(number) for number in STOPS}

        def stop(number: int, frame: Any) -> None:
            if self.given.add(number) and self.child is not None:
                self.child.send_signal(number)

        listen(stop, STOPS)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def take(self, step: Step, again: bool) -> None:
        """Do a step, unless it is done.

        Raises:
            CptError: it failed, or what it reads changed since the workflow started.
            StoppedEarlyError: it was told to stop.
        """
        self._check_stopped(step)
        with self.state.held(step.name) as lock:
            found = standing(step, self.state, again)
            if found.done:
                return self.shown.skip(step.name)
            # Once more: of one that waited for others it was not known whether it would run.
            check_free([found])
            if found.earlier:
                self.put_back(step, *found.earlier)
                return self.shown.skip(step.name)
            self._check_given(step)
            # Noted before it runs: of one that is killed the next run must know whose the files are.
            record = self.begin(found)
            self.shown.begin(step.name, step.do, found.why)
            started = time.monotonic()
            code = self._wait(step, lock)
            self.end(step, record, code, time.monotonic() - started)

    def begin(self, found: Standing) -> Record:
        """Clear away what stands in a step's way, and note that it runs.

        Raises:
            CptError: what it reads was not made.
        """
        step, before = found.step, found.record
        for path in step.reads:
            if not outputs.files_of(step.folder / path) and any(
                outputs.related(path, made, step.folder) for name in self.workflow.needs[step.name]
                for made in self.workflow.steps[name].writes
            ):  # fmt: skip
                raise CptError(f"{step.name} reads {path}, which the steps before it have not made")
        there = [path for path in step.writes if outputs.is_there(step.folder / path)]
        record = Record(
            step.name, step.do, step.parameters, code_of(step), RUNNING, inputs_of(step, before),
            # From here on what lies there is the step's own, but for what was there before.
            outputs={path: {} for path in step.writes},
            found=[path for path in there if before is None or not before.owns(path)],
            versions=installed_versions(PACKAGES), started=_now(), seed=value_of(step.function, "seed", step.arguments),
        )  # fmt: skip
        if before is not None and goes_on(found):
            record = record.replace(starts=before.starts + 1, started=before.started, seconds=before.seconds)
        elif before is not None:
            self._clear(step, before)
        self.state.write(record)
        return record

    def _clear(self, step: Step, before: Record) -> None:
        """Remove what a step has made, or set it aside; what is not its own was refused before (`check_free`).

        Raises:
            CptError: a job trains in what would be set aside.
        """
        for path in step.writes:
            full = step.folder / path
            if not outputs.is_there(full):
                continue
            if step.kind.kept:
                self._set_aside(full, before)
            else:
                outputs.remove(full, before.outputs.get(path, {}))

    def _set_aside(self, path: Path, made: Record) -> None:
        """Rename what a step made; where it was finished, its record says so when that job is asked for again."""
        run_lock.check_free(path)  # a job that trains there, started by hand perhaps, would go on beside it
        aside = outputs.set_aside(path)
        if made.state == DONE:
            self.state.keep_earlier(made, int(aside.name.removeprefix(f"{path.name}.")))
        self.shown.line(f"{made.step}: what {path.name} holds is now {aside}")

    def put_back(self, step: Step, number: int, record: Record) -> None:
        """Give what was set aside its name again, and its record."""
        path, there = step.folder / step.writes[0], self.state.record(step)
        if outputs.is_there(path) and there is not None:
            self._set_aside(path, there)
        # The record first: killed between the two, the next run finds its output missing, and set aside.
        self.state.write(record)
        aside = outputs.aside(path, number)
        aside.rename(path)
        self.state.forget_earlier(step, number)
        self.shown.line(f"{step.name}: {aside}, made with these settings, is {path.name} again")

    def _wait(self, step: Step, lock: int) -> int:
        """Run a step's process to its end; returns its exit code."""
        for path in step.writes:
            make_folder((step.folder / path).parent)
        request, result = (self.state.path(step.name, ending) for ending in ("request", "result"))
        # An earlier start's result is not this one's.
        result.unlink(missing_ok=True)
        write_whole(request, json.dumps(self._request(step), ensure_ascii=False).encode())
        # -P: a user's tokenizers.py in the workflow's folder is not the library of that name.
        command = [sys.executable, "-P", "-m", "nemo_cpt.workflow.process", str(request), str(result)]
        log = self.state.path(step.name, "log")
        with log.open("ab") as file:
            self.child = subprocess.Popen(
                command, cwd=step.folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                # A terminal's Ctrl-C comes by way of this process, once. The lock lives as long as the step's process:
                # of a workflow that was killed the next run waits for that.
                start_new_session=True, pass_fds=[lock], env=environment_of_children(),
            )  # fmt: skip
            try:
                # A signal between the look at what was given and the start would have found no child.
                if self.given:
                    self.child.send_signal(signal.SIGTERM)
                while (code := _poll(self.child)) is None:
                    self.shown.update(log)
                return code
            finally:
                self.child = None

    def _request(self, step: Step) -> dict[str, Any]:
        given = {name: self._resolved(step, name, value) for name, value in step.parameters.items()}
        if step.kind.recipe:
            return {"command": recipes.command(given, ["--force"] if self.force else [])}
        name = step.kind.function or step.do
        if step.kind.action:
            name = f"workflow.actions:{step.kind.action}"
        parameters = {key: value for key, value in given.items() if key in step.arguments}
        if step.kind.in_tasks and TASKS in given:
            name = "workflow.actions:in_tasks"
            parameters |= {"function": step.kind.in_tasks, "tasks": given[TASKS]}
            parameters |= {"executor": given.get(EXECUTOR, "local"), "options": step.executor_options}
        return {"function": name if step.kind is OWN else f"nemo_cpt.{name}", "parameters": parameters}

    def _resolved(self, step: Step, name: str, value: Any) -> Any:
        """A parameter as the function takes it: of a run that stands for a checkpoint, its newest whole one."""
        if name not in step.kind.of_run or not isinstance(value, str) or not list(paths_in(value)):
            return value
        found = checkpoint_folder(step.folder / value)
        return os.path.relpath(found, step.folder) if found != step.folder / value else value

    def end(self, step: Step, record: Record, code: int, seconds: float) -> None:
        """Note how a step ended, with what exit code and after how long.

        Raises:
            CptError: it failed, or what it reads changed while it ran.
            StoppedEarlyError: it was told to stop.
        """
        log = self.state.path(step.name, "log")
        record = record.replace(seconds=round(record.seconds + seconds, 3), ended=_now())
        # Whatever its code once it was told: a function of the user's knows nothing of 75.
        if code and (self.given or code == StoppedEarlyError.exit_code):
            self.state.write(self._left(record).replace(state=STOPPED, message="told to stop"))
            where = f"{self.workflow.name} was stopped in {step.name}"
            raise StoppedEarlyError(f"{where}: the same command goes on from there")
        if code:
            self._fail(record, _message(step, code, log))
        # Looked at once more: what it read must have been the same from its beginning to its end.
        now, made = inputs_of(step, record), outputs_of(step)
        if names := [name for path in now if (name := outputs.changed(record.inputs[path], now[path]))]:
            message = f"{step.name} read {names[0]}, which changed meanwhile: what it made is of neither; run it again"
            # Without inputs: it is not gone on from, whatever they become.
            self._fail(record.replace(inputs={}), message)
        if missing := [path for path, files in made.items() if not files]:
            self._fail(record, f"{step.name} ended well, and {missing[0]} is not there; its log is {log}")
        result = self.state.path(step.name, "result")
        returned = json.loads(result.read_bytes()) if result.is_file() else {}
        self.state.write(record.replace(state=DONE, outputs=made, result=returned))
        self.shown.end(step.name, record.seconds)

    def _fail(self, record: Record, message: str) -> NoReturn:
        self.state.write(self._left(record).replace(state=FAILED, message=message))
        raise CptError(message)

    def _left(self, record: Record) -> Record:
        """What a step that did not end well has left, if that will be cleared away: it alone may be."""
        step = self.workflow.steps[record.step]
        return record if step.kind.goes_on else record.replace(outputs=outputs_of(step))

    def _check_given(self, step: Step) -> None:
        for path in self.workflow.given(step):
            if _stamps(self.workflow.folder / path) != self.stamps[path]:
                raise CptError(
                    f"{path}, which {step.name} reads, changed since the workflow started: steps before it may have "
                    "read what it was. Run the workflow again: it looks at everything anew"
                )

    def _check_stopped(self, step: Step) -> None:
        if self.given:
            raise StoppedEarlyError(
                f"{self.workflow.name} was stopped ahead of {step.name}: the same command goes on from there"
            )


def _poll(child: "subprocess.Popen[bytes]") -> int | None:
    try:
        return child.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return None


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    stats = [(str(file), file.stat()) for file in outputs.files_of(path, linked=True)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _message(step: Step, code: int, log: Path) -> str:
    """Why a step failed, by its log."""
    lines = log.read_text("utf-8", errors="replace").splitlines()
    told = [at for at, line in enumerate(lines) if line.startswith(SPEAKERS)]
    if code == CptError.exit_code and told:
        # With the last of the lines below it: which of its tasks failed, and how.
        first, *below = lines[told[-1] :]
        said = "\n".join([first.partition(": ")[2], *below[-TOLD_LINES:]])
        return f"{step.name}: {said} (log: {log})"
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return "\n".join([f"{step.name} {how}; the last lines of {log}:", *lines[-TOLD_LINES:]])


def _now() -> str:
    return datetime.now().isoformat(" ", timespec="seconds")
