"""Where each step stands: done, or to be run, and why; by the content of what it reads, its parameters, its code."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cpt.arguments import checked
from nemo_cpt.corpus.reading.chunks import hash_file
from nemo_cpt.errors import CptError
from nemo_cpt.installed import installed_versions
from nemo_cpt.python_files import with_neighbours
from nemo_cpt.workflow import outputs
from nemo_cpt.workflow.kinds import OF_THE_MACHINE, OPTION, OWN, source_of
from nemo_cpt.workflow.state import DONE, FAILED, RUNNING, STOPPED, Record, State
from nemo_cpt.workflow.steps import Step, Workflow

EXTEND = "extend"  # of a recipe: it goes on in its folder with another schedule
SCHEDULE = {EXTEND, "max_steps", "lr", "min_lr", "warmup_steps"}
GOES_ON = {RUNNING: "did not end", STOPPED: "was stopped", FAILED: "failed"}


@checked
@dataclass(frozen=True)
class Chosen:
    """What of a workflow is run, and how.

    Attributes:
        until: the last step, with all that it needs; None for every step.
        redo: steps to make again.
        start_from: a step to make again with all that need it.
        force: trainings are launched although the doctor finds them red.
    """

    until: str | None = None
    redo: Collection[str] = ()
    start_from: str | None = None
    force: bool = False

    def again(self, workflow: Workflow) -> set[str]:
        """Names of the steps that are made again.

        Raises:
            CptError: there is no such step.
        """
        named = {workflow.step(name).name for name in self.redo}
        return named | (workflow.behind(workflow.step(self.start_from).name) if self.start_from else set())

    def steps(self, workflow: Workflow) -> set[str]:
        """Names of the steps that are looked at.

        Raises:
            CptError: there is no such step, or one to be made again is not among them.
        """
        chosen = workflow.before(workflow.step(self.until).name) if self.until else set(workflow.steps)
        named = {*self.redo, *([self.start_from] if self.start_from else [])}
        if outside := sorted(named - chosen):
            raise CptError(f"{self.until} does not need {outside[0]}: leave --until away, or name a later step")
        return chosen


@dataclass(frozen=True)
class Standing:
    """A step, and whether it is done.

    Attributes:
        step: which.
        why: it would run; empty for one that is done.
        record: of its last start; None where there was none.
        waits: it reads what steps make that are to run first: it may turn out to be done.
        spoilt: a file that it made, and that somebody else has changed since.
        asked: it is made again because somebody wants it so.
        earlier: what this very job made, and was set aside, by its number: it is put back, and nothing runs.
    """

    step: Step
    why: str = ""
    record: Record | None = None
    waits: bool = False
    spoilt: str = ""
    asked: bool = False
    earlier: tuple[int, Record] | None = None

    @property
    def done(self) -> bool:
        """Whether there is nothing to do."""
        return not self.why


def standings(workflow: Workflow, state: State, again: Collection[str] = ()) -> list[Standing]:
    """Where every step stands, in their order.

    Args:
        workflow: its steps.
        state: its records.
        again: names of steps to make again.
    """
    found: dict[str, Standing] = {}
    for step in workflow.order:
        first = [name for name in workflow.needs[step.name] if not found[name].done]
        found[step.name] = standing(step, state, again=step.name in again, first=first)
    return list(found.values())


def check_free(found: Collection[Standing]) -> None:
    """Check that no step would write over what it did not make.

    Raises:
        CptError: one would.
    """
    for each in found:
        if each.spoilt and not (each.done or each.asked or each.waits):
            raise CptError(
                f"{each.step.name} would be made again ({each.why}), and somebody has changed what it made, "
                f"{each.spoilt}: move that away to keep it, or --redo {each.step.name}"
            )
        kind, record = each.step.kind, each.record
        # At its first start what goes on from what is there looks itself whose that is, and removes nothing; but not a
        # training, which would call it finished.
        if each.done or each.waits or (kind.goes_on and not kind.kept and record is None):
            continue
        for path in each.step.writes:
            # What was there before the first start is gone on from, and never made again.
            ours = record is not None and (record.owns(path) or (path in record.found and goes_on(each)))
            if outputs.is_there(each.step.folder / path) and not ours:
                raise CptError(
                    f"{each.step.name} would make {path}, which is there and which no run of this workflow made: move "
                    "it away, or give the step another place"
                )


def standing(step: Step, state: State, again: bool = False, first: Collection[str] = ()) -> Standing:
    """Where one step stands.

    Args:
        step: which.
        state: the workflow's records.
        again: it is to be made again.
        first: steps that are to run before it and make what it reads.
    """
    record = state.record(step)
    if record is None:
        return Standing(step, "new")
    # Of one that was killed nobody knows what it has left; of one that goes on there, it need not be known.
    looked_at = record.state == DONE or (record.state != RUNNING and not step.kind.goes_on)
    made = outputs_of(step, record) if looked_at else {}
    spoilt = _spoilt(step, record, made)
    why = "asked for" if again else other_job(step, record, bool(first)) or _unlike(step, record, made, spoilt)
    if not why and first:
        # Once they have run it may turn out that what it reads is as before, and it is done.
        return Standing(step, f"after {', '.join(first)}", record, waits=True)
    # While its inputs are still to be made, nobody knows what job it will be.
    if why and not again and not first and (earlier := _earlier(step, state)):
        where = outputs.aside(Path(step.writes[0]), earlier[0])
        return Standing(step, f"{why}; {where} is put back", record, spoilt=spoilt, earlier=earlier)
    return Standing(step, why, record, spoilt=spoilt, asked=again)


def _earlier(step: Step, state: State) -> tuple[int, Record] | None:
    """What the step made when it was this very job, where that is set aside and as it was."""
    if not step.kind.kept:
        return None
    (path,) = step.writes
    for number, record in state.earlier(step):
        made = record.outputs.get(path)
        if not made or other_job(step, record):
            continue
        if not outputs.changed(made, outputs.look_aside(step.folder / path, number, made)):
            return number, record
    return None


def _spoilt(step: Step, record: Record, made: Mapping[str, outputs.Files]) -> str:
    """What of a step's files somebody else has changed; of a run also that it was trained on."""
    for path, now in made.items():
        before = record.outputs[path]
        if name := outputs.spoilt(before, now) if record.state == DONE else outputs.changed(before, now):
            return name
        # A run that somebody trained on has new checkpoints beside the old ones.
        if step.kind.kept and now and before.keys() != now.keys():
            return path
    return ""


def _unlike(step: Step, record: Record, made: Mapping[str, outputs.Files], spoilt: str) -> str:
    """Why a step of the same job as its record's is to be run; empty where all is there that it made."""
    if record.state != DONE:
        return GOES_ON[record.state]
    if step.kind.forever:
        return "never done"
    gone = next((path for path, now in made.items() if record.outputs[path].keys() - now.keys()), "")
    return f"output missing: {gone}" if gone else f"output changed: {spoilt}" if spoilt else ""


def other_job(step: Step, record: Record, waits: bool = False) -> str:
    """What makes a step another job than the one of its record; empty where it is the same.

    Args:
        step: as it is now.
        record: of its last start.
        waits: its inputs are about to be made again: they say nothing yet.
    """
    if step.do != record.do:
        return f"does {step.do}, did {record.do}"
    if names := _other_parameters(step.parameters, record.parameters):
        return f"parameters: {', '.join(names)}"
    # An older version noted the function's own file alone, and read fewer of the others: what it does not know is the
    # same.
    if record.code not in (code := code_of(step), code.partition("-")[0]):
        return f"code changed: {step.do}"
    if step.kind.by_version and (was := record.versions.get("nemo_cpt")) != (now := installed_versions(())["nemo_cpt"]):
        return f"version: {was}, now {now}"
    other = "" if waits else _other_input(step, record, [path for path in step.reads if path in record.inputs])
    return f"input changed: {other}" if other else ""


def goes_on(found: Standing) -> bool:
    """Whether a step goes on from what its last start has left, instead of beginning anew."""
    step, record = found.step, found.record
    if record is None or found.asked or not step.kind.goes_on or _other_input(step, record, step.reads):
        return False
    if not step.kind.kept:
        return record.state != DONE and not other_job(step, record)
    # What a training may change when it is resumed, `nemo-cpt run` decides, and refuses the rest; but one that is
    # finished it would call so, whatever else has changed.
    changed = set(_other_parameters(step.parameters, record.parameters))
    return record.state != DONE or (EXTEND in step.parameters and changed <= SCHEDULE)


def _other_input(step: Step, record: Record, paths: Sequence[str]) -> str:
    """The first of the paths that a step reads that is not as its record has it."""
    for path in paths:
        known = _known(record, path)
        if outputs.changed(known, outputs.look(_full(step, path), known, linked=True)):
            return path  # and not the file: of a checkpoint that would be one of random name
    return ""


def inputs_of(step: Step, record: Record | None = None) -> dict[str, outputs.Files]:
    """What a step reads, looked at."""
    return {path: outputs.look(_full(step, path), _known(record, path), linked=True) for path in step.reads}


def outputs_of(step: Step, record: Record | None = None) -> dict[str, outputs.Files]:
    """What a step has made, looked at; with its record, of the paths that it made then."""
    known: Mapping[str, outputs.Files] = record.outputs if record else {path: {} for path in step.writes}
    return {path: outputs.look(step.folder / path, files) for path, files in known.items()}


def code_of(step: Step) -> str:
    """The hashes of the file of a function of the user's and of those beside it that it imports; empty for others."""
    if step.kind is not OWN:
        return ""
    return "-".join(hash_file(str(file)) for file in with_neighbours(source_of(step.do, step.folder)))


def _known(record: Record | None, path: str) -> Mapping[str, Mapping[str, Any]]:
    return record.inputs.get(path, {}) if record else {}


def _full(step: Step, path: str) -> Path:
    return step.folder / path


def _other_parameters(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Parameters that are not as before, and change what is made."""
    names = [name for name in {**before, **now} if name not in OF_THE_MACHINE and not name.startswith(OPTION)]
    # As text: 1 and True are equal in Python, and different settings.
    texts = [{name: json.dumps(value) for name, value in each.items()} for each in (now, before)]
    return [name for name in names if texts[0].get(name) != texts[1].get(name)]
