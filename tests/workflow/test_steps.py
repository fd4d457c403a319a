"""What is known of a workflow before anything runs: its order, and what cannot work."""

import re
from dataclasses import replace
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

import nemo_cpt.workflow
from nemo_cpt import CptError
from nemo_cpt.conversations import Conversations
from nemo_cpt.corpus import Blend
from nemo_cpt.workflow import (
    Chosen,
    Step,
    Workflow,
    call,
    download,
    export,
    import_,
    init,
    prepare,
    split,
    tokenizer,
    train,
)
from nemo_cpt.workflow.dry_run import dry_run
from nemo_cpt.workflow.files import maker_names
from nemo_cpt.workflow.kinds import KINDS, function_of
from nemo_cpt.workflow.running import Runner
from nemo_cpt.workflow.showing import Shown
from nemo_cpt.workflow.standing import inputs_of, other_job
from nemo_cpt.workflow.state import Record, State
from tests.workflow.conftest import chain, own


def road(folder: Path, **changes: dict[str, Any]) -> Workflow:
    """From text to an export, each step naming those before it; `changes` are parameters by step, "-" for none."""
    text = split("text", inputs="ja.jsonl", output_folder="text", validation=0.1)
    made = tokenizer("tokenizer", corpora=text / "train.jsonl", output="tok", vocabulary_size=512)
    data = prepare("data", inputs=text / "train.jsonl", output_prefix="ds/ja", tokenizer=made)
    base = init("init", dest="base", tokenizer=made, params="tiny")
    run = train(
        "train", recipe="tiny.continual_pretrain", base=base, data=Blend({"ds/ja": 1.0}), model="base", max_steps=2,
        **{"trainer.log_every_n_steps": 1},
    )  # fmt: skip
    out = export("export", source=run, dest="hf")
    steps = []
    for step in (out, run, base, data, made, text):  # not in their order
        parameters = {**step.parameters, **changes.get(step.name, {})}
        steps.append(Step(step.name, step.do, {key: value for key, value in parameters.items() if value != "-"}))
    (folder / "ja.jsonl").write_text('{"text": "こんにちは"}\n')
    return Workflow("road", steps, folder)


def test_steps_come_behind_those_whose_files_they_read(tmp_path: Path) -> None:
    workflow = road(tmp_path)
    workflow.check()
    assert [step.name for step in workflow.order] == ["text", "tokenizer", "init", "data", "train", "export"]
    assert workflow.needs["train"] == ["init", "data", "tokenizer"] or workflow.needs["train"] == ["init", "data"]
    assert workflow.steps["data"].writes == ["ds/ja_text_document"]
    assert workflow.steps["train"].writes == ["results/tiny_cpt"]
    assert workflow.before("init") == {"init", "tokenizer", "text"}
    assert workflow.behind("init") == {"init", "train", "export"}
    assert workflow.given(workflow.steps["text"]) == ["ja.jsonl"]


def test_a_template_makes_it_a_preparation_of_conversations(tmp_path: Path) -> None:
    step = prepare("chats", inputs="chats.jsonl", output_prefix="sft/ja", tokenizer="tok", template="chatml")
    assert step.writes == ["sft/ja_conversations"]
    tuned = train("tune", recipe="tiny.instruction_tune", base="b", data=Conversations({"sft/ja": 1.0}))
    assert Workflow("w", [tuned, step]).needs["tune"] == ["chats"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": {"validatoin": 0.1}}, "text: split has no parameter validatoin; near: validation"),
        ({"text": {"overwrite": True}}, "overwrite is not for a workflow's step"),
        ({"text": {"output_folder": "-"}}, "text: split needs output_folder"),
        ({"init": {"seed": "seven"}}, "init: seed is 'seven': expected int"),
        ({"data": {"append_eod": 1}}, "append_eod is 1: expected bool"),
        ({"train": {"max_stpes": 3}}, "train: tiny.continual_pretrain has no parameter max_stpes; near: max_steps"),
        ({"train": {"max_steps": "many"}}, "train: max_steps=many: expected int"),
        ({"train": {"recipe": "-"}}, "train names no recipe"),
        ({"train": {"recipe": "tinny"}}, "there is no recipe 'tinny'"),
        ({"train": {"executor": "slurn"}}, "there is no executor 'slurn' (near: slurm)"),
        ({"train": {"executor.processses": 2}}, "local has no parameter executor.processses; near: processes"),
        ({"train": {"base": "bsae"}}, "train reads bsae, which is not there and which no step makes; near: base"),
        ({"data": {"inputs": "text2/train.jsonl"}}, "data reads text2/train.jsonl, which is not there"),
        ({"train": {"data": "ds/j"}}, "train reads ds/j, which is not there and which no step makes"),
        ({"data": {"tokenizer": "tok2"}}, "data reads tok2, which is not there and which no step makes; near: tok"),
        ({"init": {"dest": "tok"}}, "write tok: give each its own"),
        ({"init": {"dest": "text/base"}}, "one within the other: give each its own"),
        ({"text": {"inputs": "lang=ja/x.jsonl"}}, "text reads lang=ja/x.jsonl, which is not there"),
        ({"text": {"inputs": "hf/train.jsonl"}}, "these steps wait for each other: "),
        ({"text": {"inputs": "text/train.jsonl"}}, "text reads text, which it makes itself"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, changes: dict[str, dict[str, Any]], said: str) -> None:
    with pytest.raises(CptError) as error:
        road(tmp_path, **changes).check()
    assert said in error.value.message


@pytest.mark.parametrize(
    ("do", "parameters", "said"),
    [
        ("fetch", {"corpus": "llm-jp/ja_wikii", "folder": "d"}, "There is no corpus 'llm-jp/ja_wikii'"),
        ("clean", {"inputs": "a.jsonl", "output": "o", "rules": "jaa"}, "no rules for the language 'jaa'"),
        ("clean", {"inputs": "a.jsonl", "output": "o", "rules": "r.yaml"}, "r.yaml, rule 1 (length), min_characters"),
        ("split", {"inputs": "a.jsonl", "output_folder": "o", "validation": 1.5}, "validation is 1.5"),
        ("split", {"inputs": "a.jsonl", "output_folder": "o", "on_error": "skpi"}, "on_error is 'skpi'"),
        ("synthesize", {"inputs": "a.jsonl", "output": "o", "kinds": ["titel"]}, "kinds are titel"),
        ("synthesize", {"inputs": "a.jsonl", "output": "o", "model": "m"}, "no endpoint to ask"),
        ("tokenizer", {"corpora": "a.jsonl", "output": "o", "kind": "bep"}, "kind is 'bep'"),
        ("tokenizer", {"corpora": {"a.jsonl": -1.0}, "output": "o"}, "the weight of a.jsonl is -1.0"),
        ("tokenizer", {"corpora": {"a.jsonl": "much"}, "output": "o"}, "corpora['a.jsonl']='much': give a number"),
        ("tokenizer", {"corpora": "a.jsonl", "output": "o", "special": [7]}, "special[0]=7: give text"),
        ("grow_tokenizer", {"tokenizer": "t", "inputs": "a.jsonl", "output": "o"}, "say how far to grow"),
        ("prepare", {"inputs": "a.jsonl", "output_prefix": "o", "tokenizer": "t", "workers": 0}, "workers is 0"),
        (
            "prepare",
            {"inputs": "a.jsonl", "output_prefix": "o", "tokenizer": "t", "template": "chatlm"},
            "There is no template 'chatlm'",
        ),
        ("download", {"repo_id": "a/b/c", "dest": "d"}, "'a/b/c' is no repository's name"),
        ("init", {"dest": "d", "tokenizer": "t", "params": "12GBB"}, "params is '12GBB'"),
        ("grow", {"source": "t", "dest": "d", "tokenizer": "t", "initialisation": "mena"}, "initialisation is 'mena'"),
        ("merge", {"source": "t", "dest": "d", "dtype": "fp16"}, "dtype 'fp16' cannot be written"),
        ("export", {"source": "t", "dest": "d", "dtype": "fp16"}, "dtype 'fp16' cannot be written"),
        ("evaluate", {"model": "t", "output": "o", "wrappers": ["caht"]}, "there is no wrapper 'caht'"),
        ("push", {"folder": "t", "repo_id": "me"}, "'me' is no repository's name"),
        ("serve", {"model": "t", "port": 80000}, "port is 80000"),
    ],
)
def test_values_are_checked_by_what_the_step_itself_begins_with(
    tmp_path: Path, do: str, parameters: dict[str, Any], said: str
) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "r.yaml").write_text("language: ja\nrules: [{rule: length, min_characters: -5}]\n")
    with pytest.raises(CptError) as error:
        dry_run(Workflow("w", [Step("one", do, parameters)], tmp_path), Chosen())
    assert error.value.message.startswith("one: ")
    assert said in error.value.message


def test_a_language_is_no_folder_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    kept = Step("clean", "clean", {"inputs": "a.jsonl", "output": "ja", "rules": "ja"})
    asked = Step("evaluate", "evaluate", {"model": "hf:m", "output": "e", "prompts": ["ja", "mine=p.jsonl"]})
    workflow = Workflow("w", [kept, asked], tmp_path)
    assert workflow.steps["clean"].reads == ["a.jsonl"]
    assert workflow.steps["evaluate"].reads == ["hf:m", "p.jsonl"]
    assert workflow.needs == {"clean": [], "evaluate": []}
    wrong = Step("clean", "clean", {"inputs": "a.jsonl", "output": "jaa", "rules": "jaa"})
    with pytest.raises(CptError, match="no rules for the language 'jaa'"):
        dry_run(Workflow("w", [wrong], tmp_path), Chosen())


def test_a_step_in_tasks_is_made_by_them_and_is_the_same_step(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    given = {"inputs": "a.jsonl", "output": "o", "rules": "ja"}
    tasks = {"tasks": 8, "executor": "slurm", "executor.partition": "cpu", "executor.cpus_per_task": 4}
    workflow = Workflow("w", [Step("clean", "clean", given | tasks)], tmp_path)
    workflow.check()
    step = workflow.steps["clean"]
    assert step.arguments == given
    runner = Runner(workflow, State(workflow), False, Shown("w", 1, print))
    assert runner._request(step) == {
        "function": "nemo_cpt.workflow.actions:in_tasks",
        "parameters": given
        | {"function": "clean_in_tasks", "tasks": 8, "executor": "slurm"}
        | {"options": ["partition=cpu", "cpus_per_task=4"]},
    }
    # With as many as there are CPUs, or without: what is made is the same.
    plain = replace(step, parameters=given)
    done = Record("clean", "clean", step.parameters, code="", state="done", inputs=inputs_of(step))
    assert other_job(plain, done) == ""


@pytest.mark.parametrize(
    ("do", "run"), [("export", "source"), ("merge", "source"), ("grow", "source"), ("verify", "nemo")]
)
def test_of_a_run_the_newest_whole_checkpoint_is_taken(tmp_path: Path, do: str, run: str) -> None:
    (tmp_path / "results/ja/checkpoints").mkdir(parents=True)
    (tmp_path / "results/ja/metrics").mkdir()
    step = Step("one", do, {"dest": "o", run: "results/ja"})
    workflow = Workflow("w", [step], tmp_path)
    runner = Runner(workflow, State(workflow), False, Shown("w", 1, print))
    with pytest.raises(CptError, match="results/ja is a run without a whole checkpoint"):
        runner._request(workflow.steps["one"])


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"tasks": 0}, "one: tasks is 0; it must be a whole number, at least 1"),
        ({"tasks": "8GBB"}, "one: tasks is '8GBB'"),
        ({"executor": "slurm"}, "one: executor and executor.* are for many tasks: say how many"),
        ({"tasks": 2, "executor": "slurn"}, "one: there is no executor 'slurn'"),
        ({"tasks": 2, "executor": "docker"}, "one: --tasks with docker: its machines are not known to share"),
        ({"tasks": 2, "template": "chatml"}, "one: prepare has no parameter tasks"),
    ],
)
def test_tasks_that_cannot_work_are_refused(tmp_path: Path, parameters: dict[str, Any], said: str) -> None:
    step = Step("one", "prepare", {"inputs": "hf:a/b", "output_prefix": "o", "tokenizer": "t"} | parameters)
    with pytest.raises(CptError) as error:
        Workflow("w", [step], tmp_path).check()
    assert said in error.value.message


def test_an_executor_is_made_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from nemo_cpt import CptError\ndef make():\n    raise CptError('no such queue')\n"
    )
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "base").mkdir()
    tasks = {"inputs": "a.jsonl", "output": "o", "rules": "ja", "tasks": 2, "executor": "mine.py:make"}
    training = {"recipe": "tiny.continual_pretrain", "base": "base", "data": {"train": {"a": 1.0}}, "max_steps": 2}
    (tmp_path / "a.idx").touch()
    (tmp_path / "a.bin").touch()
    for do, parameters in (("clean", tasks), ("train", training | {"executor": "mine.py:make"})):
        with pytest.raises(CptError, match=r"one: executor mine\.py:make: no such queue"):
            dry_run(Workflow("w", [Step("one", do, parameters)], tmp_path), Chosen())


def test_rules_that_a_step_makes_are_read_when_it_has_made_them(folder: Path) -> None:
    made = own("rules", "join", ["a.txt"], "rules.yaml")
    step = Step("clean", "clean", {"inputs": "b.txt", "output": "o", "rules": "rules.yaml"})
    found = dry_run(Workflow("w", [made, step], folder), Chosen())
    assert [each.step.name for each in found.standings] == ["rules", "clean"]
    (folder / "rules.yaml").write_text("no rules")
    with pytest.raises(CptError, match=r"clean: rules\.yaml: no list of rules"):
        dry_run(Workflow("w", [step], folder), Chosen())


def test_a_mixture_in_a_file_is_read_where_the_workflow_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w/blend.yaml").write_text("train: {ds/ja: 1.0}\nvalidation: {en: ds/en}\n")
    monkeypatch.chdir(tmp_path)
    workflow = Workflow("w", [train("train", recipe="tiny.continual_pretrain", base="b", data="blend.yaml")], "w")
    assert workflow.steps["train"].reads == ["blend.yaml", "b", "ds/ja", "ds/en"]


def test_a_set_has_one_order_in_every_process() -> None:
    names = [f"{number:02}.jsonl" for number in range(50)]
    assert Step("data", "prepare", {"inputs": set(names)}).parameters["inputs"] == names


def test_a_circle_is_named(folder: Path) -> None:
    with pytest.raises(CptError, match=r"one -> two -> one|two -> one -> two"):
        Workflow("w", [own("one", "join", ["2"], "1"), own("two", "join", ["1"], "2")], folder).check()


def test_a_name_stands_once_and_could_be_a_file(folder: Path) -> None:
    with pytest.raises(CptError, match="two steps that are called one"):
        chain(folder, own("one", "join", ["a.txt"], "other.txt"))
    for name in ("a/b", "", ".x", "a b"):
        with pytest.raises(CptError, match="a step is called"):
            own(name, "join", [], "x")
    with pytest.raises(CptError, match="has no step"):
        Workflow("w", [])


def test_a_hub_s_name_is_no_missing_file_and_a_misspelt_output_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    named = prepare("data", inputs="a.jsonl", output_prefix="ds/a", tokenizer="meta-llama/Llama-3.1-8B")
    Workflow("w", [named], tmp_path).check()
    Workflow("w", [prepare("d", inputs="hf:x/y", output_prefix="d", tokenizer="o/n")], tmp_path).check()
    beside = [prepare("d", inputs="hf:x/y", output_prefix="d", tokenizer="meta-llama/Llama-3.1-8B")]
    beside.append(download("download", repo_id="meta-llama/Llama-3.1-8B", dest="models/Llama-3.1-8B"))
    Workflow("w", beside, tmp_path).check()
    loaded = import_("import", source="hf", dest="models/base")
    (tmp_path / "hf").mkdir()
    misspelt = prepare("data", inputs="a.jsonl", output_prefix="ds/a", tokenizer="models/bsae")
    with pytest.raises(CptError, match="near: models/base"):
        Workflow("w", [loaded, misspelt], tmp_path).check()


def test_a_function_of_one_s_own_is_looked_for_before(folder: Path) -> None:
    for do, said in (
        ("functions.py:jion", "has no function 'jion'; near: join"),
        ("missing.py:join", "there is no file or module missing.py"),
        ("no.such.module:join", "there is no file or module no.such.module"),
        ("perpare", "there is no kind of step 'perpare'; near: prepare"),
    ):
        with pytest.raises(CptError, match=said.replace(".", r"\.")):
            Workflow("w", [Step("x", do, {"dest": "y", "sources": []})], folder).check()
    with pytest.raises(CptError, match="writes names the parameter output, which is not given"):
        Workflow("w", [call("x", "functions.py:join", writes="output", sources=["a.txt"], dest="d")], folder).check()
    with pytest.raises(CptError, match="no other process could find it"):
        call("x", lambda: None)
    with pytest.raises(CptError, match="give text, numbers, paths"):
        call("x", "functions.py:join", sources=object())


def test_every_kind_has_its_function_for_python() -> None:
    assert set(maker_names().values()) <= set(nemo_cpt.workflow.__all__)
    assert all(callable(getattr(nemo_cpt.workflow, name)) for name in nemo_cpt.workflow.__all__)


@pytest.mark.parametrize("do", [do for do, kind in KINDS.items() if not kind.recipe])
def test_every_kind_s_function_and_paths_are_there(do: str) -> None:
    kind = KINDS[do]
    parameters = function_of(do, kind, Path()).parameters
    named = [name.strip("{}") for name in kind.writes.replace("_", " _ ").split() if name.startswith("{")]
    assert {*kind.reads, *kind.by_name, *kind.of_run} <= set(parameters), named
    assert set(kind.by_name) | set(kind.of_run) <= set(kind.reads)
    assert set(kind.or_file) <= set(kind.by_name)
    # All that may be a path is read, made, or said to be neither: else a change of it would go unnoticed.
    paths = {name for name, each in parameters.items() if re.search(r"Inputs|Path", each.annotation)}
    assert paths <= {*kind.reads, *re.findall(r"{(\w+)}", kind.writes)}


@pytest.mark.parametrize("do", [do for do, kind in KINDS.items() if kind.function and kind.checks])
def test_every_kind_s_check_takes_what_its_function_takes(do: str) -> None:
    module, _, name = KINDS[do].function.partition(":")
    home = import_module(f"nemo_cpt.{module}")
    checked = signature(getattr(home, KINDS[do].checks)).parameters
    assert checked.keys() <= signature(getattr(home, name)).parameters.keys()
