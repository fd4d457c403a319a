"""A workflow: steps that name what they read and write, put in order by that, and checked before anything runs."""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from difflib import get_close_matches
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from inspect import signature
from pathlib import Path, PurePath
from typing import Any, get_type_hints

from nemo_cpt import catalog
from nemo_cpt.arguments import as_wanted, checked
from nemo_cpt.errors import CptError
from nemo_cpt.launching.executor import make_executor
from nemo_cpt.workflow import recipes
from nemo_cpt.workflow.kinds import (
    EXECUTOR,
    NOT_GIVEN,
    OPTION,
    OWN,
    TASKS,
    Kind,
    function_of,
    kind_of,
    paths_in,
    value_of,
)
from nemo_cpt.workflow.outputs import files_of, related

NAME = re.compile(r"[\w][\w.-]*")
ELSEWHERE = re.compile(r"(hf:|https?://)")
FILES = (".yaml", ".yml", ".json", ".jsonl", ".txt", ".csv", ".parquet")
READS, WRITES = "reads", "writes"  # of a function of the user's: which of its parameters are paths


@checked
@dataclass(frozen=True)
class Step:
    """One step: a function of the library, or of the user's, with its parameters.

    `step / "train.jsonl"` is a file below what it makes, and the step itself stands for all of it, wherever a parameter
    of another step takes a path.

    Attributes:
        name: what it is called, and what its record and its log are called by.
        do: a name of `kinds.KINDS`, or `FILE.py:FUNCTION`, `module:function`.
        parameters: the function's own, as plain data; of a recipe as a configuration file has them.
        folder: what relative paths are relative to: the folder of the workflow's file.
    """

    name: str
    do: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    def __post_init__(self) -> None:
        """Turn steps, paths and mixtures among the parameters into plain data.

        Raises:
            CptError: the name is none that a file could have, or a parameter is no plain data.
        """
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise CptError(f"a step is called {self.name!r}: give letters, digits, '-', '_' and '.'")
        made = {str(key): _plain(value, f"{self.name}: {key}") for key, value in self.parameters.items()}
        object.__setattr__(self, "parameters", made)

    @cached_property
    def kind(self) -> Kind:
        """What steps like it do."""
        with self._named():
            return kind_of(self.do, self.parameters)

    @cached_property
    def function(self) -> catalog.Function:
        """The function or recipe that it calls, as its source has it."""
        if self.kind.recipe:
            return recipes.function(self.name, self.parameters)
        with self._named():
            return function_of(self.do, self.kind, self.folder)

    @cached_property
    def reads(self) -> list[str]:
        """What it names that may be files."""
        if self.kind.recipe:
            return recipes.reads(self.function, self.arguments, self.parameters)
        names = self.kind.reads if self.kind is not OWN else self._own_paths(READS)
        found = ((name, paths_in(self.parameters.get(name), name in self.kind.labelled)) for name in names)
        return list(dict.fromkeys(path for name, paths in found for path in paths if self._is_path(name, path)))

    def _is_path(self, name: str, value: str) -> bool:
        """Whether a parameter's value may be a path; what has no ending is a name where only files are none."""
        return name not in self.kind.or_file or bool(PurePath(value).suffix) or (self.folder / value).is_file()

    @cached_property
    def writes(self) -> list[str]:
        """What it makes: files, folders, prefixes of datasets.

        Raises:
            CptError: a parameter that names it is missing.
        """
        if self.kind.recipe:
            return [recipes.run_folder(self.function, self.arguments)]
        if self.kind is OWN:
            return [path for name in self._own_paths(WRITES) for path in paths_in(self.parameters.get(name))]
        names = re.findall(r"{(\w+)}", self.kind.writes)
        values = {name: value_of(self.function, name, self.parameters) for name in names}
        if missing := [name for name, value in values.items() if value is None]:
            raise CptError(f"{self.name}: {self.do} needs {missing[0]}")
        return [self.kind.writes.format_map(values)] if self.kind.writes else []

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What the function is called with; of a recipe, without fields of its config and its executor's options."""
        if self.kind.recipe:
            return recipes.split(self.name, self.parameters, self.folder)[1]
        return {name: value for name, value in self.parameters.items() if not self._is_beside(name)}

    def _is_beside(self, name: str) -> bool:
        """Whether a parameter says how the function is called, and is none of its own."""
        if self.kind.in_tasks:
            return name in (TASKS, EXECUTOR) or name.startswith(OPTION)
        return name in (READS, WRITES)

    @property
    def executor_options(self) -> list[str]:
        """`key=value` of the executor whose tasks make it."""
        given = {name: value for name, value in self.parameters.items() if name.startswith(OPTION)}
        return [f"{name.removeprefix(OPTION)}={recipes.text(value)}" for name, value in given.items()]

    def __hash__(self) -> int:
        # Its parameters have none. So a set of steps reaches `Workflow`, which says that it takes a list.
        return hash((self.name, self.do))

    def __truediv__(self, part: str) -> str:
        return str(Path(os.fspath(self), part))

    def __fspath__(self) -> str:
        if not self.writes:
            raise CptError(f"the step {self.name} makes no files that another could read")
        return self.writes[0]

    def check(self) -> None:
        """Check the parameters against the function's own.

        Raises:
            CptError: one is unknown, with the nearest; is missing; has the wrong type; or is the workflow's to decide.
        """
        if self.kind.recipe:
            recipes.check(self.name, self.parameters, self.folder)
            return
        if self.kind.in_tasks and len(self.arguments) < len(self.parameters):
            with self._named():
                self._check_tasks()
        known = {name: each for name, each in self.function.parameters.items() if name not in NOT_GIVEN}
        for name, value in self.arguments.items():
            if name in NOT_GIVEN:
                raise CptError(f"{self.name}: {name} is not for a workflow's step: leave it away")
            # `**` stands for what a function of the user's takes beside its parameters: any name.
            if name not in known and "**" not in known:
                raise CptError(f"{self.name}: {self.do} has no parameter {name}; {catalog.nearest(name, known)}")
            if name in known and not _fits(value, known[name].annotation):
                raise CptError(f"{self.name}: {name} is {value!r}: expected {known[name].annotation}")
        required = [name for name, each in known.items() if each.default is None and name != "**"]
        if missing := [name for name in required if name not in self.arguments]:
            raise CptError(f"{self.name}: {self.do} needs {', '.join(missing)}")

    def _check_tasks(self) -> None:
        from nemo_cpt.launching.in_tasks import executor_named

        if TASKS not in self.parameters:
            raise CptError(f"{EXECUTOR} and {OPTION}* are for many tasks: say how many, {TASKS}: 8")
        tasks = self.parameters[TASKS]
        if not isinstance(tasks, int) or isinstance(tasks, bool) or tasks < 1:
            raise CptError(f"{TASKS} is {tasks!r}; it must be a whole number, at least 1")
        executor_named(str(self.parameters.get(EXECUTOR, "local")), self.executor_options)

    def check_values(self, made: Sequence[str]) -> None:
        """Check the parameters' values by the code that its function begins with; `check` has seen their types.

        Args:
            made: what other steps make: rules or a template among it cannot be read before they have run.

        Raises:
            CptError: one cannot be used.
        """
        if self.kind.recipe or self.kind.in_tasks:
            self._check_executor()
        module, _, name = self.kind.function.partition(":")
        if not module:  # recipes have `launching.description`, functions of the user's nothing
            return
        home = import_module(f"nemo_cpt.{module}")
        # Where `checks` is empty there is nothing to check, and no module has a name like that.
        check, function = getattr(home, self.kind.checks, lambda: None), getattr(home, name)
        values = {each.name: each.default for each in signature(function).parameters.values()} | self.arguments
        looked_at = list(signature(check).parameters)
        files = [
            path for each in self.kind.by_name if each in looked_at and self._is_path(each, path := str(values[each]))
        ]
        if any(related(file, each, self.folder) for file in files for each in made):
            return
        hints = get_type_hints(function)
        with self._named(), contextlib.chdir(self.folder):
            for each, value in self.arguments.items():  # lists and mappings by what is in them, too
                as_wanted(each, value, hints.get(each, Any))
            check(**{each: values[each] for each in looked_at})

    def _check_executor(self) -> None:
        """Make the step's own executor, which alone knows its options' values; the import of NeMo-Run takes seconds."""
        executor = str(self.parameters.get(EXECUTOR, "local"))
        if executor != "local":
            with self._named(), contextlib.chdir(self.folder):
                make_executor(executor, self.executor_options, 1)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say which step it is that cannot work."""
        try:
            yield
        except CptError as error:
            raise CptError(f"{self.name}: {error.message}") from None

    def _own_paths(self, which: str) -> list[str]:
        names = self.parameters.get(which) or []
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list | tuple):
            raise CptError(f"{self.name}: {which} is {names!r}: give the names of its parameters that are paths")
        if unknown := [name for name in names if name not in self.parameters]:
            raise CptError(f"{self.name}: {which} names the parameter {unknown[0]}, which is not given")
        return list(names)


@checked
class Workflow:
    """Steps, in the order that their files give them.

    Args:
        name: what it is called.
        steps: in any order; of those that could come next the first one listed does.
        folder: what relative paths are relative to; where it is None, the folder of the file that it is read from, else
            the current one.

    Raises:
        CptError: a name is given twice, or there is no step.
    """

    def __init__(self, name: str, steps: Sequence[Step], folder: str | Path | None = None) -> None:
        self.name, self.rooted = str(name), folder is not None
        self.folder = Path(folder or "").absolute()
        self.steps = {
            step.name: Step(step.name, _relative(step.do, self.folder), step.parameters, self.folder) for step in steps
        }
        if not NAME.fullmatch(self.name):  # its records are in a folder of this name
            raise CptError(f"a workflow is called {self.name!r}: give letters, digits, '-', '_' and '.'")
        if not steps:
            raise CptError(f"the workflow {name} has no step")
        names = [step.name for step in steps]
        if twice := sorted({each for each in names if names.count(each) > 1}):
            raise CptError(f"the workflow {name} has two steps that are called {twice[0]}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Workflow):
            return NotImplemented
        mine, theirs = ([(each.name, each.do, each.parameters) for each in one.steps.values()] for one in (self, other))
        return self.name == other.name and mine == theirs

    @cached_property
    def needs(self) -> dict[str, list[str]]:
        """By step, those whose files it reads.

        Raises:
            CptError: a step reads what it makes itself.
        """
        found: dict[str, list[str]] = {}
        for step in self.steps.values():
            others = [each for each in self.steps.values() if _feeds(each, step)]
            if step in others:
                raise CptError(f"{step.name} reads {', '.join(step.writes)}, which it makes itself")
            found[step.name] = [each.name for each in others]
        return found

    @cached_property
    def order(self) -> list[Step]:
        """The steps, each behind those that it needs.

        Raises:
            CptError: steps wait for each other in a circle.
        """
        # The standard library's, step by step, so that the file's order decides among those that are ready.
        sorter = TopologicalSorter(self.needs)
        try:
            sorter.prepare()
        except CycleError as error:
            # graphlib names each node behind the one that needs it.
            raise CptError(f"these steps wait for each other: {' -> '.join(reversed(error.args[1]))}") from None
        listed, ordered = list(self.steps), list[str]()
        ready = set(sorter.get_ready())
        while ready:
            following = min(ready, key=listed.index)
            ready.remove(following)
            ordered.append(following)
            sorter.done(following)
            ready |= set(sorter.get_ready())
        # What never ends comes last: nothing could come behind it.
        ordered.sort(key=lambda name: self.steps[name].kind.forever)
        return [self.steps[name] for name in ordered]

    def step(self, name: str) -> Step:
        """A step by its name.

        Raises:
            CptError: there is none.
        """
        if name not in self.steps:
            raise CptError(f"the workflow {self.name} has no step {name!r}; {catalog.nearest(name, self.steps)}")
        return self.steps[name]

    def before(self, name: str) -> set[str]:
        """A step, and all that it needs, directly or not."""
        return {name}.union(*(self.before(each) for each in self.needs[name]))

    def behind(self, name: str) -> set[str]:
        """A step, and all that need it, directly or not."""
        return {name}.union(*(self.behind(each) for each, needed in self.needs.items() if name in needed))

    def given(self, step: Step) -> list[str]:
        """What a step reads that no step makes: files that must be there."""
        made = [path for each in self.steps.values() for path in each.writes]
        return [path for path in step.reads if not any(related(path, each, self.folder) for each in made)]

    def check(self) -> None:
        """Check all that can be known without running anything.

        Raises:
            CptError: a parameter is wrong, two steps make one file, steps wait for each other, or a file is missing.
        """
        for step in self.steps.values():
            step.check()
        # Before the order: two makers of one file would both be needed by whoever reads it.
        self._check_outputs()
        for step in self.order:
            for path in self.given(step):
                self._check_there(step, path)

    def _check_outputs(self) -> None:
        made = [(step.name, path) for step in self.steps.values() for path in step.writes]
        for number, (name, path) in enumerate(made):
            for other, other_path in made[:number]:
                if name != other and related(path, other_path, self.folder):
                    where = path if path == other_path else f"{other_path} and {path}, one within the other"
                    raise CptError(f"{other} and {name} both write {where}: give each its own")

    def _check_there(self, step: Step, path: str) -> None:
        if ELSEWHERE.match(path) or _exists(self.folder, path):
            return
        made = [each for other in self.steps.values() for each in other.writes]
        if path in _named(step) and not self._looks_like_a_path(path, made):
            return
        near = get_close_matches(path, made, n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise CptError(f"{step.name} reads {path}, which is not there and which no step makes{hint}")

    def _looks_like_a_path(self, path: str, made: Sequence[str]) -> bool:
        """Whether what may be a name, OWNER/NAME or NAME, is a path that somebody misspelt."""
        if PurePath(path).suffix in FILES:
            return True
        owner, *names = PurePath(path).parts
        if not names:
            return bool(get_close_matches(path, made, cutoff=0.75))
        folders = {PurePath(each).parts[0] for each in made}
        return len(names) > 1 or owner in folders or (self.folder / owner).exists()


def _relative(do: str, folder: Path) -> str:
    """A function of the user's by its file's place in the workflow's folder, wherever that lies."""
    file = Path(do.partition(":")[0])
    # So that a workflow's folder may be moved, with the functions in it.
    inside = file.is_absolute() and file.is_relative_to(folder)
    return do.replace(str(file), str(file.relative_to(folder)), 1) if inside else do


def _named(step: Step) -> set[str]:
    """What a step may mean as a name and not as a path."""
    if step.kind.recipe:
        return {str(step.arguments.get("tokenizer"))}
    named = step.kind.by_name
    return {path for name in named for path in paths_in(step.parameters.get(name), name in step.kind.labelled)}


def _exists(folder: Path, path: str) -> bool:
    full = folder / path
    return full.exists() or bool(files_of(full))


def _feeds(step: Step, other: Step) -> bool:
    return any(related(read, made, step.folder) for made in step.writes for read in other.reads)


def _plain(value: Any, where: str) -> Any:
    """A value as YAML holds it."""
    # Infinity and NaN are none of JSON's numbers, in which records are kept.
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Step | os.PathLike):
        return os.fspath(value)
    if is_dataclass(value) and not isinstance(value, type):  # a mixture: what differs from its defaults
        return {name: each for name, each in _plain(asdict(value), where).items() if each not in ({}, "")}
    if isinstance(value, Mapping):
        return {os.fspath(key) if isinstance(key, os.PathLike) else str(key): _plain(each, where)
                for key, each in value.items()}  # fmt: skip
    if isinstance(value, set | frozenset):
        # In another order in each process: by that alone a step would be another job the next time.
        value = sorted(value, key=str)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(each, where) for each in value]
    raise CptError(f"{where} is {value!r}: give text, numbers, paths, steps, or lists and mappings of them")


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "Path": (str,), "None": (type(None),),
    "Sequence": (list,), "Collection": (list,), "list": (list,), "tuple": (list,), "Mapping": (dict,), "dict": (dict,),
    "Inputs": (str, list), "Rules": (str,),
}  # fmt: skip


def _fits(value: Any, annotation: str) -> bool:
    """Whether a plain value can be one of an annotation's; yes where the annotation says something unknown."""
    kinds = [kind.strip().partition("[")[0].rpartition(".")[2] for kind in annotation.split("|")]
    if not annotation or any(kind not in _TYPES for kind in kinds if kind != "PathLike"):
        return True
    allowed = tuple(each for kind in kinds for each in _TYPES.get(kind, ()))
    return isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)
