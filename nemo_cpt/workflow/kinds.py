"""What a step can do: one line a kind, with the library's function that does it, what it reads and what it writes."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nemo_cpt
from nemo_cpt import catalog
from nemo_cpt.errors import CptError

# Of the library's functions: what the workflow itself decides, or what has no place in a file.
NOT_GIVEN = ("overwrite", "quiet", "say", "progress", "api_key", "judge_key", "dry_run")
# What changes how fast a step is, and not what it makes.
OF_THE_MACHINE = (
    "workers",
    "tasks",
    "concurrency",
    "patience",
    "chunk_bytes",
    "checkpoint_seconds",
    "executor",
    "device",
)
TASKS, EXECUTOR, OPTION = "tasks", "executor", "executor."  # the last before an executor's own options


@dataclass(frozen=True)
class Kind:
    """What a step of one kind does.

    Attributes:
        function: `module:name`, the module below nemo_cpt; empty for a recipe, and for a function of the user's.
        reads: parameters that name files: a path, a list of them, or a mixture of datasets.
        writes: what it makes, with its parameters' values in braces; empty for nothing.
        by_name: those of `reads` whose value may be a name instead of a path: of the hub's, or of what ships.
        or_file: those of `by_name` whose value, where it is no name, is a file and no folder: `rules: ja` is a name,
            also beside a folder ja.
        of_run: those of `reads` where a run's folder stands for its newest whole checkpoint.
        recipe: it trains one, as `nemo-cpt run` does.
        goes_on: what is left of a killed one is gone on from, and not cleared away.
        kept: what it made is worth days: it is set aside, never removed, when the step is made again.
        by_version: another version of the library may measure otherwise: it is made again.
        on_gpu: it runs a model, on a GPU where there is one.
        forever: it goes on until it is stopped, and is never done.
        action: name in `actions` of what is called in the function's place, with the same parameters.
        labelled: those of `reads` where NAME= may stand before a path.
        in_tasks: the function of `launching.in_tasks` that makes the same with many tasks, where the step says `tasks`.
        checks: the function of its module that checks the values of options, which the function itself calls first:
            what it takes, by the names of the function's parameters, needs no file; empty for nothing to check.
    """

    function: str
    reads: tuple[str, ...] = ()
    writes: str = ""
    by_name: tuple[str, ...] = ()
    or_file: tuple[str, ...] = ()
    of_run: tuple[str, ...] = ()
    recipe: bool = False
    goes_on: bool = False
    kept: bool = False
    by_version: bool = False
    on_gpu: bool = False
    forever: bool = False
    action: str = ""
    labelled: tuple[str, ...] = ()
    in_tasks: str = ""
    checks: str = "check_options"


_RECIPE = Kind("", recipe=True, goes_on=True, kept=True, of_run=("base",))
KINDS = {
    "fetch": Kind("corpus.fetching.fetch:fetch", ("corpus",), "{folder}", by_name=("corpus",), goes_on=True),
    "clean": Kind(
        "cleaning.job:clean",
        ("inputs", "decontaminate", "rules"),
        "{output}",
        by_name=("rules",),
        or_file=("rules",),
        goes_on=True,
        in_tasks="clean_in_tasks",
    ),
    "split": Kind("corpus.splitting.splits:split", ("inputs", "validation", "test"), "{output_folder}", goes_on=True),
    "synthesize": Kind("synthesis.sets:synthesize", ("inputs", "slots"), "{output}", goes_on=True),
    "tokenizer": Kind("vocabulary.training:train", ("corpora",), "{output}"),
    "grow_tokenizer": Kind("vocabulary.growing:grow", ("tokenizer", "inputs", "keep"), "{output}", ("tokenizer",)),
    "prepare": Kind(
        "corpus.preparing.preparation:prepare",
        ("inputs", "tokenizer"),
        "{output_prefix}_{json_key}_document",
        ("tokenizer",),
        goes_on=True,
        in_tasks="prepare_in_tasks",
    ),
    "prepare_conversations": Kind(
        "conversations.preparation:prepare",
        ("inputs", "tokenizer", "template"),
        "{output_prefix}_conversations",
        ("tokenizer", "template"),
        ("template",),
        goes_on=True,
    ),
    "download": Kind("checkpoint.downloading:download", writes="{dest}", goes_on=True),
    "import": Kind("checkpoint.importing:import_hf", ("source",), "{dest}", checks=""),
    "init": Kind("checkpoint.untrained:make_untrained", ("tokenizer",), "{dest}"),
    "grow": Kind(
        "checkpoint.growing:grow_model", ("source", "tokenizer", "base", "corpus"), "{dest}", of_run=("source",)
    ),
    "train": _RECIPE,
    "tune": _RECIPE,
    "merge": Kind("checkpoint.merging:merge", ("source", "base"), "{dest}", of_run=("source",)),
    "export": Kind(
        "checkpoint.exporting:export_hf",
        ("source", "base", "chat_template"),
        "{dest}",
        ("chat_template",),
        ("chat_template",),
        of_run=("source",),
    ),
    "verify": Kind(
        "checkpoint.verification:verify",
        ("nemo", "hf", "base"),
        of_run=("nemo",),
        by_version=True,
        action="verify",
        checks="",
    ),
    "evaluate": Kind(
        "evaluation.comparison:evaluate",
        ("model", "against", "checkpoints_of", "base", "losses", "template", "prompts"),
        "{output}",
        ("model", "against", "template", "prompts"),
        ("template", "prompts"),
        goes_on=True,
        by_version=True,
        on_gpu=True,
        action="evaluate",
        labelled=("losses", "prompts"),
    ),
    "report": Kind("workflow.actions:report", ("run", "against"), "{output}", by_version=True, checks=""),
    "push": Kind("publishing.pushing:push", ("folder",)),
    "serve": Kind("workflow.actions:serve", ("model",), forever=True, checks="check_address"),
}
"""Every kind by its name. `prepare` with a template is the preparation of conversations, as on the command line."""

OWN = Kind("")  # a function of the user's


def kind_of(do: str, parameters: Iterable[str]) -> Kind:
    """The kind that a step's `do` names.

    Args:
        do: a name of `KINDS`, or a function of the user's, `FILE.py:FUNCTION` or `module:function`.
        parameters: those of the step.

    Raises:
        CptError: there is none.
    """
    if ":" in do:
        return OWN
    # As the command line tells the two apart.
    if do == "prepare" and "template" in parameters:
        return KINDS["prepare_conversations"]
    if do not in KINDS:
        raise CptError(
            f"there is no kind of step {do!r}; {catalog.nearest(do, KINDS)}. A function of your own is "
            "FILE.py:FUNCTION or module:function"
        )
    return KINDS[do]


def function_of(do: str, kind: Kind, folder: Path) -> catalog.Function:
    """The function that a step calls, as its source has it: nothing is imported.

    Args:
        do: as for `kind_of`.
        kind: its kind; not one of a recipe.
        folder: that of the workflow's file, where files of the user's are looked for.

    Raises:
        CptError: there is no such module or function.
    """
    module, _, name = (kind.function or do).partition(":")
    path = source_of(do, folder) if not kind.function else _own_module(module)
    return catalog.function_in(path, name)


def source_of(do: str, folder: Path) -> Path:
    """The file of a function of the user's.

    Raises:
        CptError: there is none.
    """
    module = do.partition(":")[0]
    if module.endswith(".py"):
        path = folder / module
    else:
        try:
            spec = find_spec(module)
        except (ImportError, ValueError):
            spec = None
        path = Path(spec.origin) if spec and spec.origin else Path(module)
    if not path.is_file():
        raise CptError(f"there is no file or module {module}")
    return path


def _own_module(module: str) -> Path:
    return Path(str(nemo_cpt.__file__)).parent.joinpath(*module.split(".")).with_suffix(".py")


def value_of(function: catalog.Function, name: str, given: Mapping[str, Any]) -> Any:
    """A parameter's value: the given one, else its default; None for one that is computed."""
    if name in given:
        return given[name]
    parameter = function.parameters.get(name)
    try:
        return ast.literal_eval(parameter.default) if parameter and parameter.default else None
    except (ValueError, SyntaxError):
        return None


def paths_in(value: Any, labelled: bool = False) -> Iterator[str]:
    """The paths that a parameter's value names: itself, a list's, a mixture's; what stands behind `NAME=` if it may."""
    if isinstance(value, str):
        label, equals, path = value.partition("=")
        # results/run/checkpoints/steps=30 is a path; ja=ds/ja_validation is a label and one.
        yield path if labelled and equals and path and "/" not in label else value
    elif isinstance(value, Mapping) and "train" in value:  # a Blend or Conversations
        yield from map(str, value["train"])
        for held_out in ("validation", "test"):
            yield from map(str, (value.get(held_out) or {}).values())
    elif isinstance(value, Mapping | list):  # a mapping of paths to weights
        for each in value:
            yield from paths_in(each, labelled)
