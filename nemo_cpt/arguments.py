"""The arguments of what users call in Python, looked at before anything is done with them.

A wrong type would else be told by whatever library meets it first, minutes later or in the job, and by its own name for
it. The command line needs none of this: it reads text by the same annotations.
"""

import inspect
import io
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from reprlib import Repr
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from nemo_cpt.errors import CptError, nearest

F = TypeVar("F", bound=Callable[..., Any])
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
HIDDEN = ("env", "secret", "secrets", "api_key", "judge_key")  # whose values are not for a terminal, or a log
_PATHS = (Path, os.PathLike)
_LISTS = {Sequence: list, Collection: list, list: list, tuple: tuple, frozenset: frozenset}
_WORDS = {
    int: "a whole number", float: "a number", bool: "True or False", str: "text", NoneType: "None", Path: "a path",
    os.PathLike: "a path",
}  # fmt: skip
_EXAMPLES = {  # of the classes that people meet
    "Blend": "a Blend, such as Blend(train={'ds/ja': 0.75, 'ds/en': 0.25})",
    "ssh": "ssh(host=..., user=..., job_dir=...)",
    "Conversations": "Conversations, such as Conversations(train={'sft/ja': 1.0})",
}
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 100


class UnknownParameterError(CptError):
    """A function was given a parameter that it does not have.

    Attributes:
        name: the parameter's.
        known: those that there are.
    """

    def __init__(self, function: str, name: str, known: Collection[str]) -> None:
        super().__init__(f"{function} has no parameter {name}; {nearest(name, known)}")
        self.name, self.known = name, known


class _WrongTypeError(Exception):
    """A value that is of none of the kinds wanted, and where in the argument it stands."""

    def __init__(self, value: Any, wanted: Any, where: str = "") -> None:
        self.value, self.wanted, self.where = value, wanted, where


def checked(function: F) -> F:
    """Have a function, or a class, check the names and types of its arguments by its annotations.

    What only looks otherwise is made plain, so that a config of it can be written as YAML: numbers of numpy's become
    Python's, a Path becomes text where text is wanted, and what can be gone through once, such as a generator or what
    `Path.glob` returns, becomes a list where a list is wanted.

    Raises:
        CptError: when it is called: there is no such parameter, with the nearest ones; one that it needs is missing; or
            a value is of another type.
    """
    return _checked(function, types=True)


def names_checked(function: F) -> F:
    """Have a function, or a class, check the names of its arguments alone: it tells of their types itself.

    Raises:
        CptError: when it is called, as `checked`.
    """
    return _checked(function, types=False)


def _checked(function: F, types: bool) -> F:
    if isinstance(function, type):
        function.__init__ = _checked(function.__init__, types)  # type: ignore[misc]
        return function
    signature, hints = inspect.signature(function), cache(lambda: _hints_of(function))
    label, own = _label(function), signature.parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in own.values())
    names = [name for name, each in own.items() if each.kind is not each.VAR_KEYWORD]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if unknown := next((name for name in kwargs if not takes_any and name not in names), None):
            raise UnknownParameterError(label, unknown, names)
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise CptError(f"{label}(...): {error}") from None
        for name in given.arguments if types else ():
            given.arguments[name] = as_wanted(name, given.arguments[name], hints().get(name, Any), own[name].default)
        try:
            return function(*given.args, **given.kwargs)
        except UnknownParameterError as error:
            if error.name not in kwargs:
                raise
            # Of the function that **kwargs went to, which does not know this one's own.
            raise UnknownParameterError(label, error.name, list(dict.fromkeys([*names, *error.known]))) from None
        except TypeError as error:
            # Python's words where the function itself gives what came with **kwargs, too.
            twice = [name for name in kwargs if f"multiple values for keyword argument {name!r}" in str(error)]
            if not twice:
                raise
            raise CptError(f"{label} sets {twice[0]} itself: leave {twice[0]}= away") from None

    return call  # type: ignore[return-value]


def parameters_of(function: Any) -> dict[str, inspect.Parameter]:
    """A function's parameters by name; of a class that passes on **kwargs, also those of the classes it extends."""
    found: dict[str, inspect.Parameter] = {}
    for owner in function.__mro__ if isinstance(function, type) else [function]:
        parameters = inspect.signature(owner).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        found = {each.name: each for each in parameters if each.kind not in VARIADIC} | found
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return found


def _hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters' annotations, also where they are written as text; without that of what is returned.

    When the function is first called: its module is whole then. What it returns may be known to type checkers alone.
    """
    of_parameters = {name: each for name, each in function.__annotations__.items() if name != "return"}
    hints = get_type_hints(SimpleNamespace(__annotations__=of_parameters), function.__globals__)
    for name, each in inspect.signature(function).parameters.items():
        if each.kind is each.VAR_POSITIONAL:
            hints[name] = tuple[hints.get(name, Any), ...]  # type: ignore[misc]
        elif each.kind is each.VAR_KEYWORD:
            hints[name] = dict[str, hints.get(name, Any)]  # type: ignore[misc]
    return hints


def _label(function: Callable[..., Any]) -> str:
    parts, name = function.__module__.split("."), function.__qualname__
    # As it is imported: out of its room, or out of a recipe's module.
    home = parts[1] if parts[0] == "nemo_cpt" and len(parts) > 1 and parts[1] != "recipes" else parts[-1]
    # A method is known by its class, an executor by its name alone.
    return name.removesuffix(".__init__") if "." in name or name == parts[-1] else f"{home}.{name}"


def as_wanted(name: str, value: Any, annotation: Any, default: Any = None) -> Any:
    """Return a value in plain Python's types, if it is of the annotation's.

    Args:
        name: what it is called in a message.
        value: whatever a user gave.
        annotation: a type, a union, `Literal[...]`, `Sequence[...]` and the like, `tuple[KIND, ...]`, `Mapping[...]`
            or a class.
        default: the example of a message, unless it is empty.

    Raises:
        CptError: it is of another type; what it says of `HIDDEN` names has no value in it.
    """
    try:
        return _plain(value, annotation)
    except _WrongTypeError as wrong:
        where, words = name + wrong.where, _words(wrong.wanted)
        if name in HIDDEN:
            raise CptError(f"{where}: give {words}, not a {type(wrong.value).__name__}") from None
        if hint := _hint(wrong.value, wrong.wanted):
            words += f": {where}={hint}"
        elif isinstance(wrong.value, set | frozenset) and "a list of" in words:
            words += ", and no set, whose order is another one in each process"
        elif isinstance(default, int | float | str) and default and not wrong.where and "'" not in words:
            words += f", such as {default!r}"
        raise CptError(f"{where}={_SHORT.repr(wrong.value)}: give {words}") from None


def _plain(value: Any, wanted: Any) -> Any:
    """A value that is of the kind wanted, in plain Python's types.

    Raises:
        _WrongTypeError: it is of another.
    """
    origin, inner = get_origin(wanted) or wanted, get_args(wanted)
    if origin in (Any, inspect.Parameter.empty):
        return value
    if _is_union(wanted):
        return _plain_of_any(value, wanted, inner)
    if origin is str or not isinstance(value, os.PathLike):
        value = plain_scalar(value)
    if origin is Path and isinstance(value, str):
        return Path(value)
    if inner and origin in (*_LISTS, Iterable):
        return _plain_list(value, wanted, origin, inner[0])
    if inner and origin in (Mapping, dict) and isinstance(value, Mapping):
        plain = {_below(key, inner[0], ""): _below(each, inner[1], f"[{key!r}]") for key, each in value.items()}
        # A Path beside the same as text would become one with it, unnoticed.
        return plain if len(plain) == len(value) else value
    if origin is Literal:
        right = isinstance(value, str) and value in inner
    elif origin in (int, float):
        # A bool is an int to Python, and nobody means a number with it, or with NaN.
        right = isinstance(value, int if origin is int else int | float) and not isinstance(value, bool)
        right = right and value == value
    else:
        right = isinstance(value, Mapping if is_typeddict(origin) else origin)
    if not right:
        raise _WrongTypeError(value, wanted)
    return value


def _plain_list(value: Any, wanted: Any, origin: Any, element: Any) -> Any:
    # Text is its letters to Python, a mapping its keys, a file its lines: nobody means these one by one. But the lines
    # of an open file are texts to go through.
    is_list = isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray | Mapping)
    if not is_list or (hasattr(value, "read") and not (origin is Iterable and isinstance(value, io.TextIOBase))):
        raise _WrongTypeError(value, wanted)
    if isinstance(value, set | frozenset) and origin in (Sequence, list, tuple):  # of another order in each process
        raise _WrongTypeError(value, wanted)
    if origin is Iterable:  # gone through by the function alone, which may be given millions
        return value
    return _LISTS[origin](_below(each, element, f"[{index}]") for index, each in enumerate(value))


def plain_scalar(value: Any) -> Any:
    """A number of numpy's as Python's, a Path as text; any other value as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _plain_of_any(value: Any, wanted: Any, kinds: Sequence[Any]) -> Any:
    deepest = _WrongTypeError(value, wanted)
    for kind in kinds:
        try:
            return _plain(value, kind)
        except _WrongTypeError as wrong:  # a list with one wrong element is told by the element
            deepest = wrong if wrong.where else deepest
    raise deepest


def _below(value: Any, wanted: Any, where: str) -> Any:
    try:
        return _plain(value, wanted)
    except _WrongTypeError as wrong:
        raise _WrongTypeError(wrong.value, wrong.wanted, where + wrong.where) from None


def _words(wanted: Any) -> str:
    """What to give, in words."""
    origin, inner = get_origin(wanted) or wanted, get_args(wanted)
    if _is_union(wanted):
        # Text that is to name a file is a path to people.
        as_path = any((get_origin(each) or each) in _PATHS for each in inner)
        return " or ".join(dict.fromkeys(_words(each) for each in inner if not (as_path and each is str)))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if inner and origin in (*_LISTS, Iterable):
        one = _words(inner[0])
        return f"a list of {re.sub('^an? ', '', one)}" + "s" * one.startswith(("a ", "an "))
    if origin in (Mapping, dict):
        return "a dict"
    if origin is Callable:
        takes = inner[0] if inner and isinstance(inner[0], list) else []
        return "a function" + (f" of {' and '.join(map(_words, takes))}" if takes else "")
    if origin.__module__.startswith("nemo_run"):
        return f"a run.{origin.__name__}"
    article = "an" if origin.__name__.startswith(tuple("AEIO")) else "a"
    return _WORDS.get(origin) or _EXAMPLES.get(origin.__name__) or f"{article} {origin.__name__}"


def _hint(value: Any, wanted: Any) -> str:
    """The value as it would be right, where that is plain to see; else nothing."""
    kinds = [get_origin(each) or each for each in (get_args(wanted) if _is_union(wanted) else [wanted])]
    if isinstance(value, str) and any(kind in kinds for kind in (*_LISTS, Iterable)):
        return repr([value])
    if (
        str in kinds
        and not any(kind in kinds for kind in _PATHS)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    ):
        return repr(str(value))
    if bool in kinds and str(value).lower() in ("true", "false", "0", "1"):
        return str(str(value).lower() in ("true", "1"))
    for kind in (int, float):
        if kind in kinds and isinstance(value, str | float):
            try:
                number = kind(value) if isinstance(value, str) else int(value)
            except (ValueError, OverflowError):
                continue
            return repr(number)
    return ""


def _is_union(wanted: Any) -> bool:
    return get_origin(wanted) in (Union, UnionType)
