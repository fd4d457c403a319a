"""What a workflow remembers: a folder beside its file, with a record a step, each written whole or not at all."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_cpt.corpus.atomic_files import make_folder, open_locked, write_whole
from nemo_cpt.errors import CptError
from nemo_cpt.installed import installed_versions
from nemo_cpt.records import restored
from nemo_cpt.workflow.outputs import Files
from nemo_cpt.workflow.steps import Step, Workflow

FOLDER = ".workflow"  # behind the workflow's name
RECORD, PAGE, LOCK, EARLIER = "record.json", "page.html", "lock", "earlier"
SUBMITTED = "experiment"  # holds the id of that which runs the workflow, where jobs do
PACKAGES = ("torch", "nemo_toolkit", "nemo_run", "megatron-core", "transformers", "tokenizers")
PATIENCE = 20.0  # seconds for the step of a killed workflow to end
RUNNING, DONE, STOPPED, FAILED = "running", "done", "stopped", "failed"


@dataclass(frozen=True)
class Record:
    """What is known of a step: how it was started last, and what came of it.

    Attributes:
        step: its name.
        do: what it did.
        parameters: with what.
        code: hash of the file of a function of the user's.
        state: `running` (or killed), `done`, `stopped` or `failed`.
        inputs: what it read, by path: each file with size, time and hash.
        outputs: what it made, likewise.
        found: those of `outputs` that were there before its first start: they may be somebody's.
        versions: of this library and of the stack.
        seed: of what it drew, given or the function's default; None for one that draws nothing.
        result: what the function returned, without times.
        message: why it failed or stopped.
        starts: how often it was started with these inputs and parameters.
        started: local time of the first of these starts.
        ended: local time of the last one's end.
        seconds: that it worked, over all these starts.
    """

    step: str
    do: str
    parameters: Mapping[str, Any]
    code: str = ""
    state: str = RUNNING
    inputs: Mapping[str, Files] = field(default_factory=dict)
    outputs: Mapping[str, Files] = field(default_factory=dict)
    found: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""
    starts: int = 1
    started: str = ""
    ended: str = ""
    seconds: float = 0.0

    def owns(self, path: str) -> bool:
        """Whether what lies at a path is of this step's making, and may be cleared away to make it again."""
        return path in self.outputs and path not in self.found

    def replace(self, **changes: Any) -> "Record":
        """The record with some fields changed."""
        return replace(self, **changes)


class State:
    """The folder of a workflow's records.

    Args:
        workflow: whose.
    """

    def __init__(self, workflow: Workflow) -> None:
        self.workflow = workflow
        self.folder = workflow.folder / f"{workflow.name}{FOLDER}"

    def record(self, step: Step) -> Record | None:
        """A step's record; None for one that was never started.

        Raises:
            CptError: it cannot be read.
        """
        path = self.path(step.name, "json")
        try:
            return restored(Record, json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise CptError(
                f"{path} is no record of a step ({error}): remove it, and what the step has made, to make it again"
            ) from None

    def write(self, record: Record) -> None:
        """Keep a step's record."""
        write_whole(self.path(record.step, "json"), _json(asdict(record)))

    def keep_earlier(self, record: Record, number: int) -> None:
        """Keep the record of what is set aside as the so manieth, for when its job is asked for again."""
        make_folder(self.folder / EARLIER)
        write_whole(self._earlier(record.step, number), _json(asdict(record)))

    def earlier(self, step: Step) -> list[tuple[int, Record]]:
        """The records of what a step made and was set aside, by its number, the newest first."""
        names = (path.stem.removeprefix(f"{step.name}.") for path in (self.folder / EARLIER).glob("*.json"))
        numbers = sorted((int(name) for name in names if name.isdigit()), reverse=True)
        read = ((number, self._earlier(step.name, number).read_bytes()) for number in numbers)
        return [(number, restored(Record, json.loads(content))) for number, content in read]

    def forget_earlier(self, step: Step, number: int) -> None:
        """Remove the record of what is set aside no more."""
        self._earlier(step.name, number).unlink(missing_ok=True)

    def _earlier(self, step: str, number: int) -> Path:
        return self.folder / EARLIER / f"{step}.{number}.json"

    def path(self, step: str, ending: str) -> Path:
        """A file of a step's in the folder."""
        return self.folder / "steps" / f"{step}.{ending}"

    def whole(self) -> dict[str, Any]:
        """The record of all: each step's, in their order; those that were never started are None."""
        records = {step.name: self.record(step) for step in self.workflow.order}
        return {
            "workflow": self.workflow.name,
            "versions": installed_versions(PACKAGES),
            "steps": {name: None if each is None else asdict(each) for name, each in records.items()},
        }

    def write_whole(self) -> Path:
        """Write the record of all; returns its path."""
        write_whole(self.folder / RECORD, _json(self.whole()))
        return self.folder / RECORD

    def check_not_submitted(self) -> None:
        """Check that no jobs run the workflow, which hold none of it while they wait.

        Raises:
            CptError: some do.
        """
        if (self.folder / SUBMITTED).exists():
            from nemo_cpt.launching import jobs  # half a second, for what is rarely there

            jobs.check_ended(self.folder / SUBMITTED, "runs this workflow")

    @contextmanager
    def held(self, step: str | None = None) -> Iterator[int]:
        """Hold the workflow, or a step of it; gives the lock's file descriptor, which a step's process inherits.

        What a killed workflow's last step still does is waited for.

        Raises:
            CptError: it runs already, or the folder cannot be written.
        """
        make_folder(self.folder / "steps")
        path = self.path(step, LOCK) if step else self.folder / LOCK
        try:
            file = open_locked(path, PATIENCE)
        except CptError as error:
            # The same error says that the folder cannot be written.
            if "Another process" not in error.message:
                raise
            what = f"the step {step}" if step else f"the workflow {self.workflow.name}"
            raise CptError(f"{what} runs already: another process holds {path}") from None
        with file:
            yield file.fileno()


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"
