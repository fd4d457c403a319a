"""Workloads of recipes by name: built by a process that has NeMo, or imports it, and remembered on the disk.

The first plan of a recipe takes as long as NeMo's import; the same one again, for another card, a tenth of a second.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_cpt.cache import cache_folder
from nemo_cpt.catalog import source
from nemo_cpt.checkpoint.base import carried_places
from nemo_cpt.errors import CptError
from nemo_cpt.output import say_that_nemo_loads
from nemo_cpt.planning.workload import Workload
from nemo_cpt.recipe_models import LIKE_BASE, like_base
from nemo_cpt.training.preconditions import check_base

SECONDS = 300  # for the process that builds the recipe
SOURCES = ("nemo_cpt.recipes", "nemo_cpt.planning", "nemo_cpt.training", "nemo_cpt.catalog")
VERSIONS = ("nemo_toolkit", "nemo_run", "megatron-core")


def workload(recipe: str, arguments: Mapping[str, Any], fields: Sequence[str] = ()) -> Workload:
    """Return the workload of a recipe by name.

    Args:
        recipe: `module.function` in nemo_cpt.recipes.
        arguments: the function's.
        fields: `path.to.field=value` on its config.

    Raises:
        CptError: the recipe objects, a field does not exist, or the planner cannot read it.
    """
    request = json.dumps([recipe, {name: _plain(value) for name, value in arguments.items()}, list(fields)])
    # Named by all that decides the workload: another version, an edited recipe or other data ask anew.
    name = f"{_key(request + _counted(recipe, arguments) + _shape(recipe, arguments))}.json"
    remembered = _remembered(name)
    # The base may be imported, or another one put in its place, after it was planned.
    if remembered and remembered["digest"] == _digest(remembered["configuration"]):
        return _workload(remembered["workload"])
    _check_its_shape_is_here(source.recipe(recipe), arguments)
    text = _described_here(request) if "nemo.collections.llm" in sys.modules else _described_elsewhere(request)
    _remember(name, text)
    return _workload(json.loads(text)["workload"])


def _remembered(name: str) -> Any:
    """What was remembered under a name; None where nothing is, or only a torn file."""
    with suppress(OSError, ValueError, CptError):
        return json.loads((cache_folder("workloads") / name).read_text())
    return None


def _remember(name: str, text: str) -> None:
    # A home that cannot be written, or a full one, costs the next plan 20 s, and this one nothing.
    with suppress(OSError, CptError):
        path = cache_folder("workloads") / name
        # Two plans at once write two files; the last rename wins, with the same content.
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            partial.write_text(text)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)


def _check_its_shape_is_here(recipe: source.Function, arguments: Mapping[str, Any]) -> None:
    """Refuse at once, and not when NeMo is imported, a recipe of its base's shape whose base is not there."""
    base, of_its_shape = _base(recipe, arguments), arguments.get("model") == LIKE_BASE or like_base(recipe.path)
    if "base" in recipe.parameters and of_its_shape and not Path(str(base)).exists():
        check_base(base)


def _workload(fields: Mapping[str, Any]) -> Workload:
    values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return Workload(**values)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _counted(recipe: str, arguments: Mapping[str, Any]) -> str:
    """What tells the files from others whose epochs a recipe counts: their sizes and times."""
    function = source.recipe(recipe)
    if "epochs" not in function.parameters or arguments.get("max_steps") is not None:
        return ""
    data = arguments.get("data") or source.default_data(function)
    indices = [Path(prefix + ".idx").absolute() for prefix in data.prefixes()] if data else []
    stats = [(str(path), path.stat()) for path in indices if path.is_file()]
    return json.dumps([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])


def _shape(recipe: str, arguments: Mapping[str, Any]) -> str:
    """What tells the base from another of its name, of whose shape the model may be."""
    folder = Path(str(_base(source.recipe(recipe), arguments)))
    return "".join(_digest(str(place / "config.json")) for place in carried_places(folder))


def _base(recipe: source.Function, arguments: Mapping[str, Any]) -> Any:
    """The base that is given, else the recipe's own; None where it has none."""
    parameter = recipe.parameters.get("base")
    return arguments.get("base", ast.literal_eval(str(parameter.default))) if parameter else None


def _described(request: str) -> str:
    """The workload, and what of the base it was read from, as JSON."""
    from nemo_cpt.catalog.build import build_recipe
    from nemo_cpt.planning.recipe_reader import configuration_of, read

    recipe, arguments, fields = json.loads(request)
    partial = build_recipe(recipe, arguments, fields)
    found, configuration = read(partial), str(configuration_of(partial))
    return json.dumps({"workload": asdict(found), "configuration": configuration, "digest": _digest(configuration)})


def _described_here(request: str) -> str:
    try:
        return _described(request)
    except CptError:
        raise
    except Exception as error:
        raise CptError(f"the recipe could not be built to be planned: {error!r}") from error


def _described_elsewhere(request: str) -> str:
    """The same from a process that imports NeMo."""
    command = [sys.executable, "-m", "nemo_cpt.catalog.workloads"]
    say_that_nemo_loads()
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise CptError(f"the recipe was not built in {SECONDS} s: is the file system of the packages slow?") from error
    if done.returncode == CptError.exit_code:
        raise CptError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise CptError(f"the recipe could not be built to be planned:\n{done.stderr.strip()[-2000:]}")
    # The last line: NeMo prints what it likes while it is imported.
    return done.stdout.strip().splitlines()[-1]


def _key(request: str) -> str:
    """A digest of what the workload depends on: the request, our sources, versions."""
    digest = hashlib.sha256(request.encode())
    for name in VERSIONS:
        digest.update(version(name).encode())
    for package in SOURCES:
        spec = find_spec(package)
        for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else []:
            for path in sorted(Path(folder).glob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _digest(configuration: str) -> str:
    """Of the base's config.json, from which the vocabulary's size comes; empty while it is not there."""
    path = Path(configuration)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _main() -> None:
    try:
        print(_described(sys.stdin.read()))
    except CptError as error:
        # One line, because the caller takes the last one.
        print(" ".join(str(error).split("\n")), file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    _main()
