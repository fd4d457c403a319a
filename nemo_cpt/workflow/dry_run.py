"""Where every step of a workflow stands, and what all that would run would take, before anything starts."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_cpt.corpus.atomic_files import make_folder
from nemo_cpt.doctor import Finding
from nemo_cpt.errors import CptError
from nemo_cpt.output import size_of, span
from nemo_cpt.workflow.estimates import Estimate, Estimates
from nemo_cpt.workflow.standing import Chosen, Standing, check_free, standings
from nemo_cpt.workflow.state import State
from nemo_cpt.workflow.steps import Workflow

COLUMNS = ("step", "does", "state", "why", "time", "memory", "disk", "note")
UNKNOWN = "?"


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        workflow: whose.
        standings: of its steps.
        estimates: of each of them.
        findings: what the doctor finds of trainings and of the disk, with the step's name.
        force: it is run whatever the doctor finds.
    """

    workflow: Workflow
    standings: list[Standing]
    estimates: list[Estimate]
    findings: list[tuple[str, Finding]]
    force: bool = False

    @property
    def refused(self) -> list[tuple[str, Finding]]:
        """The findings for which a run would be refused."""
        return [each for each in self.findings if each[1].state == "error" and not self.force]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The table under `COLUMNS`, and its sum."""
        for each, estimate in zip(self.standings, self.estimates, strict=True):
            does = str(each.step.parameters.get("recipe", each.step.do))
            if each.done:
                yield each.step.name, does, "done", "", "", "", "", ""
            else:
                state = "may run" if each.waits else "put back" if each.earlier else "would run"
                yield each.step.name, does, state, each.why, *_cells(estimate)
        seconds, disk = (sum(getattr(each, name) or 0 for each in self.estimates) for name in ("seconds", "disk_bytes"))
        # One step runs after the other: times and disk add up, memory does not.
        memory = max((each.memory_gib or 0 for each in self.estimates), default=0)
        more = " and what is not known" if any(self._unknown()) else ""
        yield (
            "all",
            "",
            "",
            more.strip(),
            span(seconds),
            f"{memory:,.1f} GiB" if memory else "",
            size_of(disk),
            "",
        )

    def lines(self) -> Iterator[str]:
        """What the doctor found."""
        for name, finding in self.findings:
            if finding.state != "ok":
                yield f"{finding.state}: {name}: {finding}" if name else f"{finding.state}: {finding}"
        if self.refused:
            yield f"It would be refused ({len(self.refused)} errors); --force runs it all the same."
        elif all(each.done for each in self.standings):
            yield "Every step is done."

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        steps = {
            each.step.name: {
                "do": each.step.do,
                "done": each.done,
                "why": each.why,
                "reads": each.step.reads,
                "writes": each.step.writes,
                **asdict(estimate),
            }
            for each, estimate in zip(self.standings, self.estimates, strict=True)
        }
        findings = [{"step": name, **finding.as_dict()} for name, finding in self.findings]
        return {"workflow": self.workflow.name, "steps": steps, "findings": findings, "refused": len(self.refused)}

    def _unknown(self) -> Iterator[bool]:
        for each, estimate in zip(self.standings, self.estimates, strict=True):
            yield not each.done and estimate.seconds is None


def dry_run(
    workflow: Workflow, chosen: Chosen, plan: bool = True, executor: str = "local", options: Sequence[str] = ()
) -> DryRun:
    """Look at a workflow without running anything.

    Args:
        workflow: its steps.
        chosen: what of it would be run.
        plan: plan trainings for GPUs, which imports NeMo the first time.
        executor: of the jobs; trainings that name their own take that.
        options: `key=value` of the executor.

    Raises:
        CptError: it could not be run, whatever the machine.
    """
    make_folder(workflow.folder)  # which a workflow built in Python may only name; paths are relative to it
    workflow.check()
    names, again, state = chosen.steps(workflow), chosen.again(workflow), State(workflow)
    # All are looked at first: how those stand that a step needs says whether it waits.
    found = [each for each in standings(workflow, state, again) if each.step.name in names]
    # What somebody else's files would stop is known before anything runs.
    check_free(found)
    for each in found:
        if not each.done:  # what is done was checked when it was done
            each.step.check_values([path for other in workflow.steps.values() for path in other.writes])
    estimates = Estimates(workflow, executor, options)
    made = [estimates.of(each, plan) for each in found]
    disk = estimates.disk(sum(each.disk_bytes or 0 for each in made))
    return DryRun(workflow, found, made, [*estimates.findings, ("", disk)], chosen.force)


def refuse_red(found: DryRun) -> None:
    """Refuse a run in which something could not work.

    Raises:
        CptError: with all that the doctor finds red.
    """
    if found.refused:
        listed = "\n".join(f"  {name or found.workflow.name}: {finding}" for name, finding in found.refused)
        raise CptError(f"{found.workflow.name} is not run (--force runs it all the same):\n{listed}")


def _cells(estimate: Estimate) -> tuple[str, str, str, str]:
    memory = UNKNOWN if estimate.memory_gib is None else f"{estimate.memory_gib:,.1f} GiB"
    disk = UNKNOWN if estimate.disk_bytes is None else size_of(estimate.disk_bytes)
    time = UNKNOWN if estimate.seconds is None else span(estimate.seconds)
    return time, memory, disk, estimate.note
