"""What `nemo-cpt run` submits: the recipe's name and arguments, so that the launcher itself need not import NeMo."""

import difflib
import inspect
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from nemo_cpt.errors import CptError

_FOLDER_FIELDS = ("log.explicit_log_dir", "log.version", "log.use_datetime_version", "log.ckpt.dirpath")
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def build_recipe(recipe: str, arguments: Mapping[str, Any], overrides: Sequence[str] = ()) -> Any:
    """Call a recipe function and change fields of what it returns.

    Args:
        recipe: `module.function` in nemo_cpt.recipes.
        arguments: the function's; a mapping for `data` stands for a Blend's fields.
        overrides: `path.to.field=value` on the run.Partial, type-checked by the field's annotation.

    Returns:
        The run.Partial.

    Raises:
        CptError: a field does not exist (with the nearest names), a value has the wrong type, or the recipe objects.
    """
    from nemo_cpt.corpus import Blend

    module, _, function = recipe.rpartition(".")
    given = dict(arguments)
    if isinstance(given.get("data"), Mapping):
        given["data"] = Blend(**given["data"])
    partial = getattr(import_module(f"nemo_cpt.recipes.{module}"), function)(**given)
    for override in overrides:
        _override(partial, override)
    return partial


def run_recipe(recipe: str, arguments: dict[str, Any], overrides: list[str]) -> None:
    """Build a recipe in the job and run it: it saves on SIGTERM, and under Slurm its trainer takes the job's nodes.

    A run that is finished, or that another job trains, is left alone before NeMo is imported.
    """
    if said := nothing_to_train(recipe, arguments, overrides):
        return print(f"nemo_cpt: {said}", flush=True)
    import fiddle as fdl

    from nemo_cpt.executors.stopping import save_on_sigterm
    from nemo_cpt.training import guards

    partial = build_recipe(recipe, arguments, overrides)
    if "SLURM_NNODES" in os.environ and hasattr(partial, "trainer"):
        partial.trainer.num_nodes = int(os.environ["SLURM_NNODES"])
    guards.check(partial)
    save_on_sigterm(partial)
    fdl.build(partial)()


def nothing_to_train(recipe: str, arguments: Mapping[str, Any], overrides: Sequence[str], here: bool = True) -> str:
    """What to say of a run that is finished, by its folder; empty where there are steps to train, or no telling.

    Args:
        recipe: as for `build_recipe`.
        arguments: as for `build_recipe`.
        overrides: as for `build_recipe`.
        here: the run is to start on this machine, now.

    Raises:
        CptError: another job holds the run's folder, and it is to start now.
    """
    from nemo_cpt.cli import catalog
    from nemo_cpt.cli.doctor import describe
    from nemo_cpt.training.run_folder import finished
    from nemo_cpt.training.run_lock import check_free

    if any(override.partition("=")[0] in _FOLDER_FIELDS for override in overrides):
        return ""
    job = describe(catalog.recipe(recipe), arguments, overrides, "local", ())
    said = finished(job.directory / "checkpoints", job.max_steps)
    if here and not said:
        check_free(job.directory)
    return said or ""


def _override(partial: Any, override: str) -> None:
    from nemo_run.cli.cli_parser import parse_value

    from nemo_cpt.executors import upstream

    upstream.parse_new_unions()
    path, _, text = override.partition("=")
    *parents, name = path.split(".")
    config = partial
    for parent in parents:
        _check_field(config, parent, path)
        config = getattr(config, parent)
    _check_field(config, name, path)
    annotation = _fields(config.__fn_or_cls__)[name].annotation
    try:
        value = parse_value(text, None if annotation is inspect.Parameter.empty else annotation)
    except Exception as error:
        raise CptError(f"{override}: expected {annotation} ({error})") from error
    setattr(config, name, value)


def _check_field(config: Any, name: str, path: str) -> None:
    function = getattr(config, "__fn_or_cls__", None)
    if function is None:
        raise CptError(f"{path}: {name} is a field of a plain value, {config!r}, which has none")
    fields = _fields(function)
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5) or fields
        raise CptError(f"{path}: {function.__name__} has no field {name}; near: {', '.join(near)}")


def _fields(function: Any) -> dict[str, inspect.Parameter]:
    """A function's parameters by name; of a class that passes on **kwargs, also those of the classes it extends."""
    found: dict[str, inspect.Parameter] = {}
    for owner in function.__mro__ if isinstance(function, type) else [function]:
        parameters = inspect.signature(owner).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        found = {each.name: each for each in parameters if each.kind not in VARIADIC} | found
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return found
