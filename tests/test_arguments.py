"""Wrong arguments of executors are told at once by name and value; the cases come from the signatures."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import pytest

from nemo_cpt import checkpoint, cleaning, executors, planning, vocabulary, workflow
from nemo_cpt.arguments import as_wanted, checked
from nemo_cpt.errors import CptError

NEEDED = {"kubernetes": {"image": "i", "gpus_per_node": 1, "workdir_pvc": "w"}, "skypilot": {"gpus": "H100"},
          "ssh": {"host": "h", "user": "u", "job_dir": "/j"}}  # fmt: skip


def parameters():
    for name in executors.__all__:
        for each in inspect.signature(getattr(executors, name)).parameters.values():
            if each.kind is not each.VAR_KEYWORD:
                yield pytest.param(name, each, id=f"{name}-{each.name}")


@pytest.mark.parametrize(("executor", "parameter"), parameters())
def test_every_argument_of_an_executor_of_a_wrong_type_is_told_by_its_name(executor, parameter):
    given = NEEDED.get(executor, {})
    wanted = {parameter.annotation, *get_args(parameter.annotation)}
    wrong = [object(), {"a"}, *([True, "1.5x"] if wanted & {int, float} and str not in wanted else [])]
    wrong += ["ab"] if any(getattr(each, "__origin__", None) is Sequence for each in wanted) else []
    for value in wrong:
        with pytest.raises(CptError, match=rf"^{parameter.name}(=.*)?: give "):
            getattr(executors, executor)(**given | {parameter.name: value})


@pytest.mark.parametrize("executor", [name for name in executors.__all__ if name != "slurm"])
def test_a_misspelt_argument_of_an_executor_is_told_with_the_nearest(executor):
    function = getattr(executors, executor)
    name = list(inspect.signature(function).parameters)[-1]
    with pytest.raises(CptError, match=rf"has no parameter {name}s; near: .*{name}"):
        function(**NEEDED.get(executor, {}) | {f"{name}s": 1})


@checked
def inner(
    count: int = 1,
    rate: float | None = None,
    names: Sequence[str] = (),
    limits: Mapping[str, float] | None = None,
    kind: Literal["one", "two"] = "one",
    folder: str = "",
    env: Mapping[str, str | float] | None = None,
    on: bool = False,
    where: Path | str | None = None,
    **others: Any,
) -> dict[str, Any]:
    return dict(locals())


@checked
def outer(first: int, third: int = 3, **kwargs: Any) -> Any:
    return strict(second=2, third=third, **kwargs)


@checked
def strict(second: int, third: int = 3) -> int:
    return second + third


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"count": "100"}, "count='100': give a whole number: count=100"),
        ({"count": 2.0}, "count=2.0: give a whole number: count=2"),
        ({"count": True}, "count=True: give a whole number, such as 1"),
        ({"count": np.bool_(True)}, "count=True: give a whole number, such as 1"),
        ({"rate": "1e-4"}, "rate='1e-4': give a number or None: rate=0.0001"),
        ({"names": "ja"}, "names='ja': give a list of text: names=['ja']"),
        ({"names": ["ja", 3]}, r"names[1]=3: give text: names[1]='3'"),
        ({"limits": ["en"]}, "limits=['en']: give a dict or None"),
        ({"limits": {"en": "3"}}, "limits['en']='3': give a number: limits['en']=3.0"),
        ({"kind": "three"}, "kind='three': give 'one' or 'two'"),
        ({"on": "true"}, "on='true': give True or False: on=True"),
        ({"on": 0}, "on=0: give True or False: on=False"),
        (
            {"names": {"ja"}},
            "names={'ja'}: give a list of text, and no set, whose order is another one in each process",
        ),
        ({"folder": None}, "folder=None: give text"),
        ({"env": {"HF": None}}, "env['HF']: give text or a number, not a NoneType"),
        ({"env": "HF_TOKEN=hf_secret"}, "env: give a dict or None, not a str"),
    ],
)
def test_a_wrong_value_is_told_with_what_would_be_right(given, says):
    with pytest.raises(CptError) as refused:
        inner(**given)
    assert str(refused.value) == says


def test_numbers_of_numpy_and_paths_become_plain(tmp_path):
    got = inner(np.int64(3), np.float32(0.5), [tmp_path], {"a": np.float64(1)}, folder=Path("x"), other=np.int8(1))
    assert inner(where=tmp_path)["where"] is tmp_path
    assert got["others"] == {"other": 1}  # as it was given: nothing is known of it
    plain = [got["count"], got["rate"], got["names"], got["limits"]["a"], got["folder"]]
    assert plain == [3, 0.5, [str(tmp_path)], 1.0, "x"]
    assert [type(each) for each in plain] == [int, float, list, float, str]


def test_an_open_file_is_its_lines_only_where_texts_are_gone_through(tmp_path):
    (tmp_path / "texts").write_text("one\ntwo\n")

    @checked
    def count(texts: Iterable[str] = (), paths: Sequence[str] = ()) -> int:
        return sum(1 for _ in texts)

    with open(tmp_path / "texts") as file:
        assert count(file) == 2
        with pytest.raises(CptError, match=r"^paths=.*: give a list of text"):
            count(paths=file)
    with open(tmp_path / "texts", "rb") as file, pytest.raises(CptError, match=r"^texts=.*: give a list of text"):
        count(file)


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (planning.fit_workload, {"allow": {"micro_batch", "recompute"}}),
        (planning.fit_workload, {"allow": frozenset()}),
        (vocabulary.grow, {"keep": {"texts.jsonl"}, "sample_bytes": 1e8}),
        (vocabulary.train, {"sample_bytes": 1e8}),
        (vocabulary.worth, {"parameters": 8.03e9, "sample_bytes": 1e8}),
        (checkpoint.export_hf, {"shard_bytes": 2e9}),
        (checkpoint.grow_model, {"shard_bytes": 2e9}),
        (cleaning.clean, {"decontaminate": None}),
        (workflow.call, {"reads": None, "writes": None}),
    ],
)
def test_what_means_one_thing_alone_is_taken(function, given):
    annotations = get_type_hints(function)
    for name, value in given.items():
        as_wanted(name, value, annotations[name])


def test_of_several_wrong_values_the_first_parameters_is_told():
    with pytest.raises(CptError, match=r"^count='x'"):
        inner(on="x", kind=1, folder=2, rate="y", count="x")


def test_names_are_told_by_the_function_that_was_called():
    with pytest.raises(CptError, match=r"\.outer has no parameter thrid; near: third$"):
        outer(1, thrid=2)
    with pytest.raises(CptError, match=r"\.outer sets second itself: leave second= away"):
        outer(1, second=2)
    with pytest.raises(CptError, match="missing a required argument: 'first'"):
        outer()
    with pytest.raises(CptError, match="too many positional"):
        outer(1, 2, 3)
