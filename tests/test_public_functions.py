"""What users import takes what its annotations say, and tells a wrong value by its parameter; cases from signatures."""

import importlib
import inspect
import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from nemo_cpt import workflow
from nemo_cpt.arguments import as_wanted
from nemo_cpt.checkpoint import import_hf
from nemo_cpt.cleaning import Rules, rules_for
from nemo_cpt.conversations import Conversations
from nemo_cpt.corpus import Blend, prepare
from nemo_cpt.errors import CptError
from nemo_cpt.inference import Message, Sampling
from nemo_cpt.inference.endpoint import EndpointEngine
from nemo_cpt.launching.in_tasks import clean_in_tasks, prepare_in_tasks
from nemo_cpt.vocabulary import compare
from nemo_cpt.workflow import _OF_KINDS, Step, Workflow

ROOMS = (
    "corpus conversations cleaning vocabulary checkpoint publishing planning inference evaluation synthesis workflow"
)
ELSEWHERE = {
    "nemo_cpt.evaluation.judge": ["run_judge"],
    "nemo_cpt.launching.in_tasks": ["prepare_in_tasks", "clean_in_tasks"],
    "nemo_cpt.workflow.standing": ["Chosen"],
}
UNIONS = (Union, UnionType)
UNCHECKED = {
    "lay_out",  # once for each sequence of a training, by its data module
    "read",  # a recipe of whatever kind
    *("Blend", "Conversations"),  # they tell of a mapping that is none what was meant
}


def doors() -> dict[str, Callable[..., Any]]:
    """Functions that users import, and classes that check what they are made with."""
    api = (Path(__file__).parents[1] / "docs/api.md").read_text()
    named = [line.rpartition(".")[::2] for line in re.findall(r"^::: (\S+\.\S+)$", api, re.MULTILINE)]
    rooms = {f"nemo_cpt.{room}": importlib.import_module(f"nemo_cpt.{room}").__all__ for room in ROOMS.split()}
    named += [(module, name) for module, names in (rooms | ELSEWHERE).items() for name in names]
    found = {}
    for module, name in named:
        # Recipes and executors have tests of their own; a workflow's makers of steps, the parameters of those.
        if module.startswith(("nemo_cpt.recipes", "nemo_cpt.executors")) or name in UNCHECKED | set(_OF_KINDS):
            continue
        each = getattr(importlib.import_module(module), name)
        if inspect.isfunction(each) or (inspect.isclass(each) and hasattr(each.__init__, "__wrapped__")):
            found[f"{each.__module__}.{name}"] = each
    return found


def hints_of(door: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a door's parameters."""
    function = door.__init__ if inspect.isclass(door) else door
    unknown_here = {"TransformersEngine": Any, "CleaningReport": Any}
    parameters = inspect.signature(door).parameters
    hints = get_type_hints(function, localns=unknown_here)
    return {name: hints[name] for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD}


def right(hint: Any) -> Any:
    """A value of an annotation's kind."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    simple = {str: "x", int: 1, float: 0.5, bool: True, type(None): None, Path: Path("x"), Callable: print, Any: 1}
    if kind in simple:
        return simple[kind]
    if kind in (Sequence, Collection, Iterable, tuple):
        return []
    if kind is Mapping:
        return {}
    return right(inner[0]) if inner else object.__new__(kind)


def wrong(hint: Any) -> Iterator[Any]:
    """Values that people give by mistake where an annotation wants another."""
    kinds = {get_origin(each) or each for each in (get_args(hint) if get_origin(hint) in UNIONS else [hint])}
    yield object()
    yield b"x"
    if kinds & {int, float}:
        yield True
        yield from [] if str in kinds else ["1.5x"]
    if kinds & {Sequence, Collection, Iterable, tuple}:
        yield from [] if Iterable in kinds else [[object()]]  # whose elements are met one by one
        yield from [] if Iterable in kinds else [io.StringIO("a\nb")]  # whose lines are texts to go through
        yield from [] if str in kinds else ["ab"]


@pytest.mark.parametrize("door", [pytest.param(each, id=name) for name, each in doors().items()])
def test_every_argument_of_a_wrong_type_is_told_by_its_name(door: Callable[..., Any]) -> None:
    signature, hints = inspect.signature(door), hints_of(door)
    for name, hint in hints.items():
        for value in wrong(hint) if hint is not Any else ():
            given = {each: right(of) for each, of in hints.items()} | {name: value}
            if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
                given[name] = [value]
            bound = signature.bind_partial()
            bound.arguments |= given
            with pytest.raises(CptError, match=rf"^{name}([=\[].*)?: give "):
                door(*bound.args, **bound.kwargs)


@pytest.mark.parametrize("door", [pytest.param(each, id=name) for name, each in doors().items()])
def test_no_default_is_of_another_type_than_is_taken(door: Callable[..., Any]) -> None:
    for name, hint in hints_of(door).items():
        default = inspect.signature(door).parameters[name].default
        if default is not inspect.Parameter.empty and default.__class__.__name__ != "_HAS_DEFAULT_FACTORY_CLASS":
            as_wanted(name, default, hint)


INPUTS = get_type_hints(prepare)["inputs"]


@pytest.mark.parametrize(
    ("hint", "value", "made"),
    [
        (INPUTS, Path("a.jsonl"), "a.jsonl"),
        (INPUTS, (each for each in [Path("a"), "b"]), ["a", "b"]),
        (INPUTS, {"a": 1, "b": 2}.keys(), ["a", "b"]),
        (INPUTS, np.array(["a", "b"]), ["a", "b"]),
        (float | INPUTS, np.float32(0.25), 0.25),
        (float | INPUTS, ("a", "b"), ["a", "b"]),
        (INPUTS | Mapping[str, float], {"a": np.int64(2)}, {"a": 2}),
        (tuple[str, ...], ["a", "b"], ("a", "b")),
        (Collection[str], {"a"}, ["a"]),
        (frozenset[str] | None, ["a", "a"], frozenset({"a"})),
        (Mapping[str, INPUTS], {"ja": Path("a")}, {"ja": "a"}),
        (Path, "a", Path("a")),
        # As they are: one would become the other, unnoticed.
        (Mapping[str, float], {Path("a"): 1, "a": 2}, {Path("a"): 1, "a": 2}),
        (Sequence[Step], (step for step in [Step("a", "init")]), [Step("a", "init")]),
        (Sequence[Message], [{"role": "user", "content": "a"}], [{"role": "user", "content": "a"}]),
    ],
)
def test_what_only_looks_otherwise_is_taken(hint: Any, value: Any, made: Any) -> None:
    got = as_wanted("x", value, hint)
    assert (got, type(got)) == (made, type(made))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: prepare(None, "o", "t"), "inputs=None: give a path or a list of paths"),
        (lambda: prepare({"a"}, "o", "t"),
         "inputs={'a'}: give a path or a list of paths, and no set, whose order is another one in each process"),
        (lambda: prepare(["a", None], "o", "t"), "inputs[1]=None: give a path"),
        (lambda: prepare("a", "o", "t", workers="4"), "workers='4': give a whole number or None: workers=4"),
        (lambda: prepare("a", "o", "t", worker=4), "corpus.prepare has no parameter worker; near: workers, tokenizer"),
        (lambda: prepare("a", "o"), "corpus.prepare(...): missing a required argument: 'tokenizer'"),
        (lambda: import_hf("a", "b", ignore_fields="rope_scaling"),
         "ignore_fields='rope_scaling': give a list of text: ignore_fields=['rope_scaling']"),
        (lambda: compare("a", {}), "tokenizers='a': give a list of text: tokenizers=['a']"),
        (lambda: import_hf("a", "b", progress=1),
         "progress=1: give a function of a whole number and a whole number or None"),
        (lambda: Sampling(stop="。"), "stop='。': give a list of text: stop=['。']"),
        (lambda: Workflow("w", Step("a", "init")),
         "steps=Step(name='a', do='init', parameters={}, folder=PosixPath('.')): give a list of Steps"),
        (lambda: rules_for("ja").with_limits(length=5), "limits['length']=5: give a dict or None"),
        (lambda: workflow.init(dest="x"), "workflow.init(...): missing a required argument: 'name'"),
        (lambda: Blend({"a": 1}).steps("8", 4096),
         "global_batch_size='8': give a whole number: global_batch_size=8"),
        (lambda: Blend(traim={"a": 1}), "Blend has no parameter traim; near: train"),
        (lambda: Blend(), "Blend(...): missing a required argument: 'train'"),
        (lambda: Conversations({"a": 1}, validaton={}), "Conversations has no parameter validaton; near: validation"),
        (lambda: workflow.call("a", partial(print, "a")),
         "functools.partial(<built-in function print>, 'a') is in no file by a name: give the function itself, and "
         "what it is called with as the step's parameters"),
        (lambda: Workflow("w", {Step("a", "init")}),
         "steps={Step(name='a', do='init', parameters={}, folder=PosixPath('.'))}: give a list of Steps, and no set, "
         "whose order is another one in each process"),
        (lambda: Conversations({"a": 1}).steps("1", 8, 4096), "epochs='1': give a number: epochs=1.0"),
        (lambda: Rules("ja", "en"), "rules='en': give a list of Rules: rules=['en']"),
        (lambda: EndpointEngine("http://x", api_key=["sk-1"]), "api_key: give text or None, not a list"),
        (lambda: EndpointEngine.generate(object.__new__(EndpointEngine), "Hello", Sampling()),
         "prompts='Hello': give a list of text or a list of Messages: prompts=['Hello']"),
        (lambda: prepare_in_tasks("a", "o", "t", None, 2, worker=1),
         "launching.prepare_in_tasks has no parameter worker; near: workers, tokenizer"),
        (lambda: prepare_in_tasks("a", "o", "t", None, 2, workers="1"),
         "workers='1': give a whole number or None: workers=1"),
        (lambda: clean_in_tasks("a", "o", "ja", None, 2, worker=1),
         "launching.clean_in_tasks has no parameter worker; near: workers"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_what_would_be_right(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(CptError) as refused:
        call()
    assert str(refused.value) == says
