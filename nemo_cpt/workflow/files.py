"""Workflows in files: YAML, or Python; read, and written as either.

steps:
  text: {do: split, inputs: ja.jsonl, output_folder: text/ja}
  dataset: {do: prepare, inputs: text/ja/train.jsonl, output_prefix: ds/ja, tokenizer: models/base}
"""

import re
from collections.abc import Iterator
from keyword import iskeyword
from pathlib import Path
from typing import Any

import yaml

from nemo_cpt import catalog
from nemo_cpt.arguments import checked
from nemo_cpt.errors import CptError
from nemo_cpt.python_files import import_file
from nemo_cpt.strict_yaml import StrictLoader
from nemo_cpt.workflow.kinds import KINDS, OWN
from nemo_cpt.workflow.steps import Step, Workflow

ENDINGS = (".yaml", ".yml")
NAME, STEPS, DO = "workflow", "steps", "do"
# Of YAML 1.2, whose 4:00:00 and 2024-01-01 are texts and whose 1e-4 is a number.
_SCALARS = (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
)


# Of their own: PyYAML's resolvers are those of YAML 1.1, to which 4:00:00 is a number of seconds.
class _Loader(StrictLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  the library's own way


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    # What stands twice is written twice: nobody edits `&id001` and `*id001`.
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    for _kind, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))


@checked
def load(path: str | Path) -> Workflow:
    """Read a workflow.

    Args:
        path: a YAML file, or a Python file that holds one `Workflow`. Relative paths in it are its folder's.

    Raises:
        CptError: there is no such file, or it describes no workflow.
    """
    path = Path(path)
    if path.is_dir():
        raise CptError(f"{path} is a folder: a workflow is a .yaml or a .py file")
    if not path.is_file():
        raise CptError(f"there is no workflow {path}: `nemo-cpt workflow new KIND {path}` writes one to edit")
    if path.suffix == ".py":
        return _from_python(path)
    if path.suffix not in ENDINGS:
        raise CptError(f"{path}: a workflow is a .yaml or a .py file")
    twins = [each for ending in ENDINGS if (each := path.with_suffix(ending)) != path and each.is_file()]
    if twins:
        raise CptError(f"{path} and {twins[0].name} would have their records in one folder: give one another name")
    try:
        return from_yaml(path.read_text("utf-8"), path)
    except UnicodeDecodeError as error:
        raise CptError(f"{path} is not UTF-8: {error}") from None


def from_yaml(text: str, path: Path) -> Workflow:
    """The workflow that a YAML text describes.

    Args:
        text: the YAML.
        path: its file, for messages, the workflow's name where the text says none, and the folder of its paths.

    Raises:
        CptError: it is no YAML of steps.
    """
    try:
        found = yaml.load(text, Loader=_Loader)
    except CptError as error:
        raise CptError(f"{path}: {error.message}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise CptError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not isinstance(found.get(STEPS), dict):
        raise CptError(f"{path} has no steps: write steps: and, below it, NAME: {{do: prepare, ...}}")
    if unknown := [str(key) for key in found if key not in (NAME, STEPS)]:
        raise CptError(f"{path}: {unknown[0]} is not for the top of a workflow, which has {NAME} and {STEPS}")
    try:
        steps = [_step(str(name), value) for name, value in found[STEPS].items()]
        return Workflow(found.get(NAME, path.stem), steps, path.absolute().parent)
    except CptError as error:
        raise CptError(f"{path}: {error.message}") from None


def _step(name: str, value: Any) -> Step:
    if not isinstance(value, dict) or not isinstance(value.get(DO), str):
        raise CptError(f"the step {name} does not say what to do: {name}: {{do: prepare, ...}}")
    return Step(name, value[DO], {key: each for key, each in value.items() if key != DO})


def _from_python(path: Path) -> Workflow:
    found = {name: value for name, value in vars(import_file(path)).items() if isinstance(value, Workflow)}
    # Which of several was meant nobody could tell, and their records would share a folder.
    if len(found) != 1:
        raise CptError(f"{path} holds {len(found)} workflows ({', '.join(found) or 'none'}): it must hold one")
    (workflow,) = found.values()
    # As of a YAML file: its folder's, wherever the command is given.
    return (
        workflow if workflow.rooted else Workflow(workflow.name, list(workflow.steps.values()), path.absolute().parent)
    )


@checked
def as_yaml(workflow: Workflow) -> str:
    """A workflow as YAML, which reads back as the same."""
    steps = {step.name: {DO: step.do, **step.parameters} for step in workflow.steps.values()}
    parts = [_dump({NAME: workflow.name}), f"{STEPS}:\n"]
    for name, parameters in steps.items():
        parts.append("".join(f"  {line}\n" for line in _dump({name: parameters}).splitlines()))
    return "".join(parts)


def _dump(value: dict[str, Any]) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)


@checked
def as_python(workflow: Workflow) -> str:
    """A workflow as a Python file, which reads back as the same."""
    names = sorted({_maker(step) for step in workflow.steps.values()})
    lines = [
        "from pathlib import Path",
        "",
        f"from nemo_cpt.workflow import Workflow, {', '.join([*names, 'run'])}",
        "",
    ]
    lines += ["workflow = Workflow(", f"    {workflow.name!r},", "    ["]
    for step in workflow.steps.values():
        lines += [f"        {line}" for line in _call(step)]
    lines += ["    ],", "    folder=Path(__file__).absolute().parent,", ")", ""]
    lines += ['if __name__ == "__main__":', "    run(workflow)", ""]
    return "\n".join(lines)


def _maker(step: Step) -> str:
    """The function of `nemo_cpt.workflow` that makes such a step."""
    if step.kind is OWN:
        return "call"
    return maker_names()[step.do]


def maker_names() -> dict[str, str]:
    """By each kind's name that of the function that makes its steps: `import` is a word of Python's."""
    return {do: f"{do}_" if do == "import" else do for do in KINDS if do != "prepare_conversations"}


def _call(step: Step) -> Iterator[str]:
    yield f"{_maker(step)}("
    yield f"    {step.name!r},"
    if step.kind is OWN:
        yield f"    {step.do!r},"
    plain = {name: value for name, value in step.parameters.items() if name.isidentifier() and not iskeyword(name)}
    for name, value in plain.items():
        yield f"    {name}={value!r},"
    if others := {name: value for name, value in step.parameters.items() if name not in plain}:
        yield f"    **{others!r},"
    yield "),"


def write_kind(kind: str, path: Path) -> None:
    """Write a workflow of a kind, to edit, as YAML with comments or as Python.

    Raises:
        CptError: there is no such kind, the file exists, or is neither .yaml nor .py.
    """
    from nemo_cpt.launching.scripts import write_new
    from nemo_cpt.workflow.templates import template, templates

    if kind not in templates():
        raise CptError(f"there is no kind of workflow {kind!r}; {catalog.nearest(kind, templates())}")
    if path.suffix == ".py":
        return write_new(as_python(from_yaml(template(kind), path)), path)
    if path.suffix not in ENDINGS:
        raise CptError(f"{path}: a workflow is a .yaml or a .py file")
    write_new(template(kind), path)
