"""What the commands that take a recipe and `key=value` share: their arguments, and how a shell completes them."""

import sys
from dataclasses import replace
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from nemo_cpt.errors import CptError
from nemo_cpt.output import say


class RecipeCommand(TyperCommand):
    """A command with a recipe's `key=value`, which knows what `--key value` was meant to be."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as ever, but of a recipe's parameter written as an option say how to write it."""
        options = {name for each in self.params for name in (*each.opts, *each.secondary_opts)}
        for position, word in enumerate(() if ctx.resilient_parsing else args):  # which is a shell's completion
            name, equals, value = word.partition("=")
            if name == "--":
                break
            if name.startswith("--") and name not in options:
                following = args[position + 1] if position + 1 < len(args) else ""
                _refuse_parameter(args, word, name[2:].replace("-", "_"), value if equals else following)
        return super().parse_args(ctx, args)


def _refuse_parameter(args: list[str], word: str, key: str, value: str) -> None:
    from nemo_cpt import catalog

    # The recipe is the first word without dashes, wherever the options stand.
    given = next((each for each in args if not each.startswith("-")), "")
    try:
        parameters = catalog.recipe(given).parameters
    except CptError:
        return
    if key in parameters or "." in key:
        shown = "VALUE" if not value or value.startswith("-") else value
        raise CptError(f"{word}: recipes' parameters have no dashes: {key}={shown}")


def from_file(recipe: str, pairs: list[str] | None, executor: str | None = None) -> tuple[str, list[str], str]:
    """The recipe, its `key=value` and the executor that a configuration file stands for; else what is given.

    What the command line says comes last, and so wins.

    Raises:
        CptError: a key stands twice on the command line; or as `read_config`.
    """
    from nemo_cpt import catalog
    from nemo_cpt.launching.config_file import ENDINGS, read_config

    catalog.check_distinct(pairs or ())
    if not recipe.endswith(ENDINGS):
        return recipe, pairs or [], executor or "local"
    given = [pair.partition("=")[0] for pair in pairs or ()]
    config = read_config(recipe, [*given, "executor"] if executor else given)
    of_its_executor = [pair for pair in config.pairs if pair.startswith("executor.")]
    # Another executor has other options: the file's would be refused, or mean something else.
    if executor and executor != (config.executor or "local") and of_its_executor:
        say(f"nemo-cpt: left away for {executor}: {', '.join(of_its_executor)} of {recipe}", sys.stderr)
        config = replace(config, pairs=[pair for pair in config.pairs if pair not in of_its_executor])
    return config.recipe, [*config.pairs, *(pairs or [])], executor or config.executor or "local"


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """The recipes that begin so, each with what it is."""
    from nemo_cpt import catalog

    return [(name, each.summary) for name, each in catalog.recipes().items() if name.startswith(incomplete)]


def complete_pair(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The parameters of the recipe, or of the executor, that begin so."""
    from nemo_cpt import catalog

    try:
        function, prefix = catalog.recipe(str(ctx.params.get("recipe"))), ""
        if incomplete.startswith("executor."):
            function, prefix = catalog.executor(str(ctx.params.get("executor") or "local")), "executor."
    except CptError:
        return []
    keys = ((f"{prefix}{name}=", each.help) for name, each in function.parameters.items() if name != "**")
    return [(key, text) for key, text in keys if key.startswith(incomplete)]


def complete_executor(incomplete: str) -> list[str]:
    """The executors that begin so."""
    from nemo_cpt import catalog

    return [name for name in catalog.executors() if name.startswith(incomplete)]


Recipe = Annotated[
    str,
    typer.Argument(
        help="module.function, module for its continual_pretrain, or a configuration file (.yaml).",
        autocompletion=complete_recipe,
    ),
]
RecipeIfAny = Annotated[
    str | None,
    typer.Argument(
        help="A recipe, or a configuration file (.yaml); by default none in particular.", autocompletion=complete_recipe
    ),
]
Pairs = Annotated[
    list[str] | None,
    typer.Argument(
        help="key=value (the recipe's parameters), path.to.field=value (its config), executor.key=value.",
        autocompletion=complete_pair,
    ),
]
Executor = Annotated[
    str | None,
    typer.Option(
        "--executor",
        "-e",
        help="local (by default), slurm, ... or FILE.py:FUNCTION",
        autocompletion=complete_executor,
    ),
]
