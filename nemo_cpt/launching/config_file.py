"""A job in one YAML file: the recipe, its arguments, fields of its config, and the executor with its options.

Each line is what the command line would have, with a colon for the equals sign:

    recipe: smollm2.continual_pretrain
    base: checkpoints/SmolLM2-135M
    data:
      train: {ds/ja: 0.75, ds/en: 0.25}
      validation: {ja: ds/ja_validation, en: ds/en_validation}
    max_steps: 300
    trainer.log_every_n_steps: 5
    executor: slurm
    executor.partition: gpu
"""

import ast
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_cpt import catalog
from nemo_cpt.arguments import checked
from nemo_cpt.catalog.build import build_recipe
from nemo_cpt.errors import CptError
from nemo_cpt.launching.executor import make_executor

ENDINGS = (".yaml", ".yml")
NULL = "tag:yaml.org,2002:null"
WIDTH = 120


@dataclass(frozen=True)
class ConfigFile:
    """What a configuration file says, in the command line's words.

    Attributes:
        recipe: `module.function`, or the module alone.
        executor: its name; None where the file names none.
        pairs: `key=value`, those of the executor with `executor.` ahead.
    """

    recipe: str
    executor: str | None
    pairs: list[str]


@checked
def load_config(path: str | Path, *overrides: str) -> tuple[Any, Any]:
    """Make the recipe and the executor of a configuration file, for `run.run(recipe, executor=executor)`.

    Args:
        path: the YAML file. Paths in it mean what they would on the command line: the current folder's.
        overrides: `key=value`, as on the command line, in the place of what the file says.

    Returns:
        The recipe, an editable `run.Partial`, and the executor; `local` where the file names none.

    Raises:
        CptError: there is no such file, recipe, parameter, field or executor, or a value has the wrong type.
    """
    catalog.check_distinct(overrides)
    config = read_config(path, [pair.partition("=")[0] for pair in overrides])
    function, arguments, fields, options = catalog.split(config.recipe, [*config.pairs, *overrides])
    processes, nodes = function.processes(arguments), function.nodes(arguments)
    executor = make_executor(config.executor or "local", options, processes, nodes, bool(function.gpus(arguments)))
    return build_recipe(function.name, arguments, fields), executor


def read_config(path: str | Path, given: Collection[str] = ()) -> ConfigFile:
    """Read a configuration file, without building anything.

    Args:
        path: the YAML file.
        given: keys that the command line has: a line of the file may leave their values to it.

    Raises:
        CptError: there is no such file, it is no YAML of lines `key: value`, a key stands twice, or none is `recipe`;
            or as `catalog.parse` of its lines. Each names the file.
    """
    found: dict[str, str | None] = {}
    mappings: list[tuple[str, str]] = []
    # Nodes, not values: a key that stands twice, and 4:00:00 as it was written, are lost in values.
    for key, node in _lines(path):
        if key in found:
            raise CptError(f"{path}: {key} stands twice")
        found[key] = None if key in given and _is_empty(node) else _text(path, key, node)
        if isinstance(node, yaml.MappingNode) and node.value:
            inner, value = node.value[0]
            mappings.append((key, f"{inner.value}: {value.value if isinstance(value, yaml.ScalarNode) else '...'}"))
    values = {key: text for key, text in found.items() if text is not None}
    if "_target_" in values:
        raise CptError(
            f"{path} is a whole recipe's config (_target_): `nemo llm pretrain --yaml {path}` runs it; "
            "`nemo-cpt show RECIPE --config` writes a file for nemo-cpt"
        )
    if "recipe" not in values:
        near = f"; {catalog.nearest('recipe', values)}" if values else ""
        raise CptError(f"{path} names no recipe: give it a line such as recipe: tiny.continual_pretrain{near}")
    recipe, executor = values.pop("recipe"), values.pop("executor", None)
    config = ConfigFile(recipe, executor, [f"{key}={text}" for key, text in values.items()])
    try:
        _check(config, mappings)
    except CptError as error:
        raise CptError(f"{path}: {error.message}") from None
    return config


def _check(config: ConfigFile, mappings: Sequence[tuple[str, str]]) -> None:
    """Raise CptError for a line that means nothing: the command line's own refusals would not name the file."""
    parameters = catalog.recipe(config.recipe).parameters
    for key, inner in mappings:
        if key not in parameters and "." not in key:
            raise CptError(f"{key} holds lines of its own: write each with its path, such as {key}.{inner}")
    own = [pair for pair in config.pairs if "." not in pair.partition("=")[0]]
    catalog.parse(catalog.recipe(config.recipe), own)
    if not (executor := config.executor or "local").partition(":")[0].endswith(".py"):
        options = [pair.removeprefix("executor.") for pair in config.pairs if pair.startswith("executor.")]
        catalog.parse(catalog.executor(executor), options, prefix="executor.")


def _lines(path: str | Path) -> Iterator[tuple[str, yaml.Node]]:
    """The keys of a file and their values."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise CptError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise CptError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise CptError(f"{path} holds no lines `key: value`, such as recipe: tiny.continual_pretrain")
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise CptError(f"{path}: {yaml.serialize(key).strip()} is no key")
        yield key.value, value


def _text(path: str | Path, key: str, node: yaml.Node) -> str:
    """A value's text as written: a time such as 4:00:00 is no number of YAML's."""
    if not isinstance(node, yaml.ScalarNode):
        return _in_one_line(node)
    if node.value and node.tag == NULL:
        return "None"  # the command line's word for it
    if _is_empty(node):
        raise CptError(f"{path}: {key} has no value: give one, there or behind the file, or leave the line away")
    return str(node.value)


def _is_empty(node: yaml.Node) -> bool:
    """Whether nothing stands behind a key's colon."""
    return isinstance(node, yaml.ScalarNode) and not node.value and not node.style


def _in_one_line(node: yaml.Node) -> str:
    """A mapping's or a list's YAML as the command line has it, {a: b} and [a, b]."""
    for each in _below(node):
        each.flow_style = True
    # Wider than any value: YAML would break a long line, and the command line has but one.
    return yaml.serialize(node, width=10**9, allow_unicode=True).strip()


def _below(node: Any) -> Iterator[yaml.CollectionNode]:
    if isinstance(node, yaml.CollectionNode):
        yield node
        for item in node.value:
            # A mapping's items are pairs of nodes, a list's are nodes.
            for each in item if isinstance(item, tuple) else (item,):
                yield from _below(each)


def written(function: catalog.Function, pairs: Sequence[str], executor: str = "local") -> str:
    """A configuration file: what is given as its lines, each other parameter as a comment with its default.

    Args:
        function: the recipe.
        pairs: `key=value` of the recipe, its config and the executor, as `catalog.split` takes them.
        executor: its name.

    Raises:
        CptError: as `catalog.split`; but what is required may be missing.
    """
    own = [pair for pair in pairs if "." not in pair.partition("=")[0]]
    given = catalog.parse(function, own)
    others = dict(pair.partition("=")[::2] for pair in pairs if pair not in own)
    lines = [f"recipe: {function.name}"]
    for name, parameter in function.parameters.items():
        lines += _comment(parameter.help)
        if name in given:
            lines.append(_line(name, _plain(given[name])))
        elif parameter.default is None:
            lines.append(f"{name}:  # required")
        # Written out, and not as a comment: which data are trained on is what people edit first.
        elif name == "data" and (data := catalog.default_data(function)) is not None:
            lines.append(_line(name, _plain(data)))
        else:
            lines.append(f"# {name}: {_default(parameter.default)}")
    lines += ["# Fields of the config, such as trainer.log_every_n_steps, as `nemo-cpt show` lists them."]
    lines += [f"{name}: {_scalar(text)}" for name, text in others.items() if not name.startswith("executor.")]
    lines += [f"executor: {executor}"]
    lines += [f"{name}: {_scalar(text)}" for name, text in others.items() if name.startswith("executor.")]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH - 2)]


def _line(name: str, value: Any) -> str:
    if isinstance(value, str):
        return f"{name}: {_scalar(value)}"
    if not isinstance(value, Mapping):
        return f"{name}: {_flow(value)}"
    rows = [f"  {_scalar(str(key))}: {_flow(each)}" for key, each in value.items()]
    return "\n".join([f"{name}:", *rows])


def _plain(value: Any) -> Any:
    """A value as YAML has it; of a mixture, the fields that are not their defaults."""
    if isinstance(value, Path):
        return str(value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    values = {each.name: getattr(value, each.name) for each in fields(value)}
    defaults = {each.name: {} if each.default is MISSING else each.default for each in fields(value)}
    return {name: each for name, each in values.items() if each != defaults[name]}


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False, allow_unicode=True)
    # PyYAML ends the document behind a scalar that stands alone.
    return text.removesuffix("...\n").strip()


def _scalar(text: str) -> str:
    """Text that YAML reads back as the very same."""
    node = yaml.compose(text, Loader=yaml.SafeLoader) if _may_be_plain(text) else None
    plain = isinstance(node, yaml.ScalarNode) and node.value == text and node.style is None and node.tag != NULL
    return text if plain else "'" + text.replace("'", "''") + "'"


def _may_be_plain(text: str) -> bool:
    try:
        yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return False
    # Marks that may mean something where this text is put, in a list or behind a key, though not alone.
    return text.isprintable() and text == text.strip() and not set(text) & set("#,[]{}&*!|>%@`")


def _default(source: str) -> str:
    """A default's source in YAML's words."""
    try:
        value = ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return f" # by default {source}"
    return _flow(list(value) if isinstance(value, tuple) else value)
