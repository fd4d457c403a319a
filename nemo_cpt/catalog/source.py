"""Recipes and executors read from their source, without importing them: NeMo takes 20 s and more to import.

What is understood of a function that passes its **kwargs on, and what is not:
    It calls a function of its own module or of one beside it, by its name or `module.name`, with `**` arguments.
    Each of them is `kwargs`, or dictionaries joined with `|`: displays with literal keys, names of constants of the
    module, and `kwargs`, as in `**{"rank": 16} | DEFAULTS | kwargs`. Anything else is passed over: the parameters are
    still known, their new defaults are not.
    A parameter whose help is "see `module.function`" has the help of that function's parameter of the same name.
"""

import ast
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from nemo_cpt.errors import CptError, nearest

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
PREFERRED = "continual_pretrain"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a function, as its source shows it.

    Attributes:
        name: its name.
        annotation: its annotation's source, empty if it has none.
        default: its default's source; None if it must be given.
        help: its line in the docstring.
    """

    name: str
    annotation: str
    default: str | None
    help: str


@dataclass(frozen=True)
class Function:
    """A recipe or an executor: a public function whose source was read.

    Attributes:
        name: `module.function`.
        path: the module's file.
        summary: the docstring's first sentence.
        parameters: by name, with those that **kwargs passes on.
    """

    name: str
    path: Path
    summary: str
    parameters: Mapping[str, Parameter]

    def number(self, name: str, given: Mapping[str, Any]) -> int | None:
        """Return an integer parameter's value: the given one, else its default; None if it has neither."""
        if name in given:
            return int(given[name])
        default = self.parameters[name].default if name in self.parameters else None
        return int(default) if default and default.isdigit() else None

    def processes(self, given: Mapping[str, Any]) -> int:
        """Return the processes on a node that the recipe is made for."""
        return self.number("gpus_per_node", given) or self.number("processes", given) or 1

    def nodes(self, given: Mapping[str, Any]) -> int:
        """Return the machines that the recipe is made for."""
        return self.number("num_nodes", given) or 1

    def gpus(self, given: Mapping[str, Any]) -> int:
        """Return the GPUs the recipe takes in all; 0 for one that is made for processes on the CPU."""
        if "processes" in self.parameters:
            return 0
        return self.processes(given) * self.nodes(given)


@cache
def recipes() -> dict[str, Function]:
    """Return the recipes of `nemo_cpt.recipes` by name: public functions that return a run.Partial they made."""
    found = {}
    for path in sorted(_folder("nemo_cpt.recipes").glob("[!_]*.py")):
        for name, node in functions(path).items():
            makes = "Partial" in ast.unparse(node.returns or ast.Constant(None))
            parameters = _parameters(path, node) if makes and not name.startswith("_") else {}
            # One that asks for the model, or changes another recipe, is what recipes are made of.
            part = any(each.name == "model" and each.default is None for each in parameters.values())
            part = part or any("Partial" in each.annotation for each in parameters.values())
            if makes and parameters and not part:
                found[f"{path.stem}.{name}"] = Function(f"{path.stem}.{name}", path, _summary(node), parameters)
    return found


def recipe(name: str) -> Function:
    """Return a recipe by `module.function`, or by `module` for the module's continual_pretrain.

    Raises:
        CptError: there is none; the message holds the nearest names.
    """
    known = recipes()
    # A module's name stands for what most people want of it.
    full = name if name in known else f"{name}.{PREFERRED}"
    if full not in known:
        full_names = {each: each for each in known} | {each.partition(".")[0]: each for each in known}
        close = difflib.get_close_matches(name, full_names, n=3)
        near = dict.fromkeys(full_names[each] if each in known else f"{each}.{PREFERRED}" for each in close)
        if Path(name).is_file():
            raise CptError(f"{name} is no recipe, and no configuration file: the name of one ends in .yaml or .yml")
        said = f"; near: {', '.join(near)}" if near else ""
        raise CptError(f"there is no recipe {name!r}{said} (nemo-cpt recipes lists all)")
    return known[full]


@cache
def executors() -> list[str]:
    """Return the names of the executors."""
    path = _folder("nemo_cpt.executors")
    exported = ast.literal_eval(assigned(path / "__init__.py", "__all__") or "[]")
    return [name for name in exported if (path / f"{name}.py").is_file()]


@cache
def executor(name: str) -> Function:
    """Return an executor's function, for example `slurm`.

    Raises:
        CptError: there is none of that name.
    """
    if name not in executors():
        near = difflib.get_close_matches(name, executors(), n=1)
        meant = f" (near: {near[0]})" if near else ""
        raise CptError(
            f"there is no executor {name!r}{meant}: {', '.join(executors())}, or FILE.py:FUNCTION of your own"
        )
    path = _folder("nemo_cpt.executors") / f"{name}.py"
    node = functions(path)[name]
    return Function(name, path, _summary(node), _parameters(path, node))


def function_in(path: Path, name: str) -> Function:
    """Return any function of a module by its source.

    Raises:
        CptError: the module has none of that name.
    """
    known = functions(path)
    if name not in known:
        raise CptError(f"{path} has no function {name!r}; {nearest(name, known)}")
    node = known[name]
    return Function(name, path, _summary(node), _parameters(path, node))


def parse(function: Function, given: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Parse `key=value` strings by the parameters' annotations.

    Args:
        function: whose parameters they are.
        given: the strings; keys with a dot are not for this function.
        prefix: before the keys in messages.

    Raises:
        CptError: a string has no `=` or nothing behind it, a key is unknown (with the nearest names) or a value has the
            wrong type.
    """
    values = {}
    for pair in given:
        key, equals, text = pair.partition("=")
        if not equals:
            raise CptError(f"{prefix}{pair}: write key=value")
        parameter = function.parameters.get(key)
        # Else a shell's variable that is not set would stand for the default, or for the current folder.
        if parameter is not None and not text:
            raise CptError(f"{prefix}{key}= has no value: give one, or leave {prefix}{key}= away")
        if parameter is None and "**" not in function.parameters:
            raise CptError(f"{function.name} has no parameter {prefix}{key}; {nearest(key, function.parameters)}")
        # `**` is in the parameters where any key is taken, such as slurm's directives: those values are YAML.
        values[key] = parse_value(f"{prefix}{key}", text, parameter.annotation if parameter else "")
    return values


def split(name: str, pairs: list[str]) -> tuple[Function, dict[str, Any], list[str], list[str]]:
    """Part `key=value` pairs into the recipe, its arguments, fields of its config, and the executor's options.

    Args:
        name: the recipe's, as for `recipe`.
        pairs: `name=value` of the recipe's parameters, `path.to.field=value`, `executor.name=value`.

    Raises:
        CptError: the recipe or a parameter is unknown, a value has the wrong type, or a required one is missing.
    """
    function = recipe(name)
    options = [pair.removeprefix("executor.") for pair in pairs if pair.startswith("executor.")]
    own = [pair for pair in pairs if not pair.startswith("executor.")]
    fields = [pair for pair in own if "." in pair.partition("=")[0]]
    arguments = parse(function, [pair for pair in own if pair not in fields])
    required = [key for key, each in function.parameters.items() if each.default is None and key != "**"]
    if missing := [key for key in required if key not in arguments]:
        raise CptError(
            f"{function.name} needs {', '.join(f'{key}=...' for key in missing)}{_how_data_is_written(missing)}"
        )
    return function, arguments, fields, options


def _how_data_is_written(missing: Sequence[str]) -> str:
    if "data" not in missing:
        return ""
    return f" (one set: data=ds/ja; several: data='{_AS_IN['Blend']}')"


def check_distinct(pairs: Sequence[str]) -> None:
    """Raise CptError where a key stands twice among `key=value`: one of the two would win silently."""
    keys = [pair.partition("=")[0] for pair in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        values = [pair for pair in pairs if pair.partition("=")[0] == twice[0]]
        raise CptError(f"{twice[0]} stands twice: {', '.join(values)}; give it once")


def parse_value(key: str, text: str, annotation: str) -> Any:
    """Parse one value by an annotation's source such as `int | None`, `Sequence[str]` or `Blend | None`.

    Raises:
        CptError: the text is no value of that type.
    """
    kinds = [kind.strip() for kind in annotation.split("|")]
    # Python's word and YAML's; a str parameter that may not be None gets the word itself.
    if text in ("None", "null") and ("None" in kinds or not annotation):
        return None
    # In the annotation's order: of `int | float`, "1" is an int; str has no parser and is what remains.
    for kind in kinds:
        try:
            return _PARSERS[kind.partition("[")[0]](text)
        except (KeyError, ValueError, TypeError, yaml.YAMLError):
            continue
        except OSError as error:
            raise CptError(f"{key}={text}: the file cannot be read: {error.strerror}") from None
        except CptError as error:
            raise CptError(f"{key}={text}: {error.message}") from None
    if not annotation:
        return _yaml(key, text)
    if "str" in kinds or "Literal" in annotation:
        return _literal(key, text, annotation)
    example = next((_WRITTEN[kind] for kind in (each.partition("[")[0] for each in kinds) if kind in _WRITTEN), "")
    raise CptError(f"{key}={text}: expected {annotation}{f', such as {key}={example}' if example else ''}")


def _yaml(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2024-13-45 is a ValueError
        raise CptError(f"{key}={text}: no YAML ({' '.join(str(error).split())}); put text in quotes") from None


def _literal(key: str, text: str, annotation: str) -> Any:
    """A string; of a Literal, one of its values; `ssh(...)` where an executor takes it."""
    if text.startswith("ssh(") and "ssh" in annotation:
        return _ssh(key, text)
    allowed = annotation[annotation.find("[") + 1 : annotation.find("]")] if "Literal" in annotation else ""
    if allowed and text not in ast.literal_eval(f"[{allowed}]"):
        raise CptError(f"{key}={text}: expected one of {allowed}")
    return text


def _ssh(key: str, text: str) -> Any:
    """`ssh("login1", "me", job_dir="/l")`, its arguments by place or by name as in Python."""
    from nemo_cpt.executors import ssh

    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "ssh":
            raise ValueError("not a call of ssh")
        return ssh(
            *(ast.literal_eval(each) for each in call.args),
            **{str(word.arg): ast.literal_eval(word.value) for word in call.keywords},
        )
    except (SyntaxError, ValueError, TypeError, CptError) as error:
        raise CptError(f"{key}={text}: write ssh('HOST', 'USER', 'FOLDER THERE') ({error})") from None


def _bool(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise ValueError(text)
    return text.lower() in TRUE


def mixture_of(annotation: str) -> Any:
    """Return the class of mixtures, Blend or Conversations, that an annotation names; None if it names none."""
    from nemo_cpt.conversations import Conversations
    from nemo_cpt.corpus import Blend

    kinds = [kind.strip() for kind in annotation.split("|")]
    return next((each for each in (Blend, Conversations) if each.__name__ in kinds), None)


def default_data(function: Function) -> Any:
    """Return the data that a recipe takes where none are given, if their source is made of literals; else None."""
    parameter = function.parameters.get("data")
    kind = mixture_of(parameter.annotation) if parameter and parameter.default is not None else None
    if kind is None or (call := _default_data(function, kind)) is None:
        return None
    owner, _, method = ast.unparse(call.func).partition(".")
    try:
        make = getattr(kind, method) if method else kind
        # Literals alone: no code of a recipe's module runs here.
        arguments = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        return make(*map(ast.literal_eval, call.args), **arguments) if owner == kind.__name__ else None
    except (ValueError, TypeError, AttributeError):
        return None


def data_example(function: Function) -> str | None:
    """Return how a script writes a recipe's data: its defaults, or those of its kind; None for one without data."""
    parameter = function.parameters.get("data")
    kind = mixture_of(parameter.annotation) if parameter else None
    if kind is None:
        return None
    if "default_data" in functions(function.path):
        return "default_data()"
    call = _default_data(function, kind)
    return ast.unparse(call).replace("'", '"') if call else None


def _default_data(function: Function, kind: type) -> ast.Call | None:
    """What `default_data` of a recipe's module returns, else that of what all recipes of its kind share."""
    shared = function.path.with_name({"Conversations": "instruction.py"}.get(kind.__name__, "continual.py"))
    # The recipe's own goes first: gpt's text is not the continual pretraining's.
    node = next((each for path in (function.path, shared) if (each := functions(path).get("default_data"))), None)
    call = node.body[-1].value if node and isinstance(node.body[-1], ast.Return) else None
    return call if isinstance(call, ast.Call) else None


_WRITTEN = {"Mapping": "'{NAME: VALUE}'", "dict": "'{NAME: VALUE}'", "Sequence": "'[A, B]'", "list": "'[A, B]'"}
_AS_IN = {  # how a mixture is written
    "Blend": "{train: {ds/ja: 0.75, ds/en: 0.25}, validation: {ja: ds/ja_validation}}",
    "Conversations": "{train: {sft/ja: 1.0}, validation: {ja: sft/ja_validation}}",
}


def _mixture(kind: str) -> Any:
    """A parser of a mixture: {train: {ds/ja: 0.75}, validation: {...}}, a YAML or JSON file of that, or one prefix."""

    def parse_mixture(text: str) -> Any:
        make = mixture_of(kind)
        # JSON is YAML.
        written = Path(text).read_text() if text.endswith((".yaml", ".yml", ".json")) else text
        try:
            fields = yaml.safe_load(written)
        except yaml.YAMLError as error:
            raise CptError(f"no YAML ({' '.join(str(error).split())}); it would be {_AS_IN[kind]}") from None
        # A single word is a prefix, the shortest way to say one set.
        if written is text and isinstance(fields, str) and not set(text) & set(",:{}[]"):
            return make(train={text: 1.0})
        if not isinstance(fields, dict):
            named = [prefix.strip() for prefix in text.split(",") if prefix.strip() and not set(prefix) & set("[]{}:")]
            weights = ", ".join(f"{prefix}: 1.0" for prefix in named)
            raise CptError(
                f"a {kind} is one dataset's prefix, the name of a .yaml file, or "
                f"{{train: {{{weights or 'PREFIX: 1.0'}}}, validation: {{NAME: PREFIX}}}}"
            )
        for name in fields:
            if name not in make.__dataclass_fields__:
                raise CptError(f"{kind} has no field {name}; {nearest(str(name), make.__dataclass_fields__)}")
        if "train" not in fields:
            raise CptError(f"{kind} needs train: {{PREFIX: WEIGHT, ...}}")
        return make(**fields)

    return parse_mixture


def _collection(kind: type) -> Any:
    def parse_collection(text: str) -> Any:
        # Without brackets, a list as shells like it: a,b,c.
        value = yaml.safe_load(text) if text[:1] in "[{" else text.split(",")
        if not isinstance(value, kind):
            raise ValueError(text)
        return value

    return parse_collection


_PARSERS = {
    "int": lambda text: int(text.replace("_", "")),
    "float": float,
    "bool": _bool,
    "Path": Path,
    "Blend": _mixture("Blend"),
    "Conversations": _mixture("Conversations"),
    "Sequence": _collection(list),
    "list": _collection(list),
    "tuple": lambda text: tuple(_collection(list)(text)),
    "Mapping": _collection(dict),
    "dict": _collection(dict),
}


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CptError(f"{package} is not installed; run: pip install nemo_cpt")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _module(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """Return a module's functions by name."""
    return {node.name: node for node in _module(path).body if isinstance(node, ast.FunctionDef)}


def assigned(path: Path, name: str) -> ast.expr | None:
    """Return what a module assigns to a name; None if it does not."""
    for node in _module(path).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == name:
                return node.value
    return None


def _value(path: Path, default: ast.expr) -> ast.expr:
    """A default; of a constant, of the module or of one beside it, its value: what a table's reader understands."""
    if not isinstance(default, ast.Name):
        return default
    for node in _module(path).body:
        if isinstance(node, ast.ImportFrom) and default.id in {alias.name for alias in node.names}:
            path = path.with_name(f"{str(node.module).rpartition('.')[2]}.py")  # one beside it
            break
    return (assigned(path, default.id) if path.is_file() else None) or default


def _summary(node: ast.FunctionDef) -> str:
    return " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())


def _parameters(path: Path, node: ast.FunctionDef) -> dict[str, Parameter]:
    """A function's own parameters, then those of the function that it passes **kwargs on to."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    # ast lists the defaults of the last positional parameters alone.
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    helps = {name: _seen(path, name, text) for name, text in _argument_helps(node).items()}
    own = {
        argument.arg: Parameter(
            argument.arg,
            ast.unparse(argument.annotation) if argument.annotation else "",
            None if default is None else ast.unparse(_value(path, default)),
            helps.get(argument.arg, ""),
        )
        for argument, default in pairs
    }
    if arguments.kwarg:
        # Its own come first: a parameter of the same name hides the one of the function called.
        own |= {name: each for name, each in _passed_on(path, node).items() if name not in own}
    return own


def _passed_on(path: Path, node: ast.FunctionDef) -> dict[str, Parameter]:
    keyword = node.args.kwarg
    # The first call that takes kwargs: a recipe hands them to one function.
    for call in ast.walk(node):
        takes = isinstance(call, ast.Call) and [word for word in call.keywords if word.arg is None]
        if not takes or not any(keyword and keyword.arg in ast.unparse(word.value) for word in takes):
            continue
        module, _, name = ast.unparse(call.func).rpartition(".")  # type: ignore[attr-defined]
        target = path.with_name(f"{module}.py") if module else path
        if target.is_file() and name in functions(target):
            inherited = _parameters(target, functions(target)[name])
            # What the call itself gives is no longer the caller's to choose.
            by_place = list(inherited)[: len(call.args)]  # type: ignore[attr-defined]
            fixed = {*by_place, *(word.arg for word in call.keywords)}  # type: ignore[attr-defined]
            preset = {name: source for word in takes for name, source in _preset(path, word.value).items()}
            return {
                each: replace(value, default=preset.get(each, value.default))
                for each, value in inherited.items()
                if each not in fixed
            }
    # Passed on to a function that is not read here: any key is taken, as text.
    return {"**": Parameter("**", "", "", _argument_helps(node).get(f"**{keyword.arg}" if keyword else "", ""))}


def _preset(path: Path, passed: ast.expr) -> dict[str, str]:
    """The defaults that `**{"a": 1} | CONSTANT | kwargs` gives the function called, as source by name."""
    if isinstance(passed, ast.BinOp) and isinstance(passed.op, ast.BitOr):
        return _preset(path, passed.left) | _preset(path, passed.right)  # the right one wins, as in Python
    value = assigned(path, passed.id) if isinstance(passed, ast.Name) else passed
    if not isinstance(value, ast.Dict):
        return {}
    pairs = zip(value.keys, value.values, strict=True)
    return {str(key.value): ast.unparse(each) for key, each in pairs if isinstance(key, ast.Constant)}


def _seen(path: Path, name: str, text: str) -> str:
    """What "see `module.function`" points to, perhaps by way of others, and what stands behind it; else the text."""
    if not text.startswith("see `"):
        return text
    pointer, _, rest = text.removeprefix("see `").partition("`")
    module, _, function = pointer.rpartition(".")
    target = path.with_name(f"{module}.py") if module else path
    if not target.is_file() or function not in functions(target):
        return text
    node = functions(target)[function]
    found = _seen(target, name, _argument_helps(node).get(name, ""))
    if not found and node.args.kwarg and name in (passed_on := _passed_on(target, node)):
        found = passed_on[name].help
    return found.rstrip(".") + rest if rest.strip(".") else found


def _argument_helps(node: ast.FunctionDef) -> dict[str, str]:
    """The Args section of a Google-style docstring, by parameter."""
    section = (ast.get_docstring(node) or "").partition("Args:\n")[2].partition("\n\n")[0]
    helps: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line.startswith("    ") and not line.startswith("     "):  # deeper lines go on with the last parameter
            name, _, text = line.strip().partition(": ")
            helps[name] = text
        elif name:
            helps[name] += " " + line.strip()
    return helps
