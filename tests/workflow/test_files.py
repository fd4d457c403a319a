"""Workflows as YAML and as Python: each reads back as the same."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_cpt import CptError
from nemo_cpt.workflow import Chosen, Step, Workflow, as_python, as_yaml, load
from nemo_cpt.workflow.dry_run import dry_run
from nemo_cpt.workflow.files import from_yaml, maker_names, write_kind
from nemo_cpt.workflow.kinds import KINDS
from nemo_cpt.workflow.templates import templates
from tests.workflow.conftest import chain
from tests.workflow.test_steps import road

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
SCALARS = st.one_of(
    TEXT, st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["1e-4", "4:00:00", "2024-01-01", "null", "yes", "1_000", "0x1f", "~", "true", "-", "#", "a: b"]),
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXT, part, max_size=3))
NAMES = st.from_regex(r"[a-z][a-z0-9_.-]{0,8}", fullmatch=True)
KEYS = NAMES.filter(lambda name: name not in ("do", "template"))
STEPS = st.lists(
    st.builds(Step, NAMES, st.sampled_from(sorted(maker_names())), st.dictionaries(KEYS, VALUES, max_size=4)),
    min_size=1, max_size=4, unique_by=lambda step: step.name,
)  # fmt: skip


@given(STEPS, NAMES)
def test_yaml_reads_back_as_the_same(steps: list[Step], name: str) -> None:
    workflow = Workflow(name, steps)
    assert from_yaml(as_yaml(workflow), Path("x.yaml")) == workflow


@given(STEPS, NAMES)
def test_python_reads_back_as_the_same(tmp_path_factory: pytest.TempPathFactory, steps: list[Step], name: str) -> None:
    path = tmp_path_factory.mktemp("python") / "x.py"
    path.write_text(as_python(Workflow(name, steps)), "utf-8")
    assert load(path) == Workflow(name, steps)


def test_one_workflow_in_both(folder: Path) -> None:
    for workflow in (chain(folder), road(folder)):
        (folder / "w.yaml").write_text(as_yaml(workflow), "utf-8")
        (folder / "w.py").write_text(as_python(workflow), "utf-8")
        assert load(folder / "w.yaml") == load(folder / "w.py") == workflow
        assert [step.name for step in load(folder / "w.py").order] == [step.name for step in workflow.order]
        assert load(folder / "w.py").folder == load(folder / "w.yaml").folder == folder


def test_functions_of_the_file_itself_are_steps(folder: Path) -> None:
    (folder / "w.py").write_text(
        "from nemo_cpt.workflow import Workflow, call\n"
        "def make(dest):\n    open(dest, 'w').write('made')\n"
        "workflow = Workflow('w', [call('make', make, writes='dest', dest='made.txt')])\n"
    )
    assert load(folder / "w.py").steps["make"].do == "w.py:make"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: {a: {do: split}, a: {do: split}}", "a stands twice"),
        ("steps: {a: {do: split, inputs: x, inputs: y}}", "inputs stands twice"),
        ("steps: {a: {inputs: x}}", "the step a does not say what to do"),
        ("steps: {a: split}", "the step a does not say what to do"),
        ("steps: []", "has no steps"),
        ("steps: {}", "has no step"),
        ("stepps: {}", "has no steps"),
        ("name: x\nsteps: {a: {do: split}}", "name is not for the top of a workflow"),
        ("steps: {a: [", "is no YAML"),
        ("just text", "has no steps"),
        ("workflow: ../../x\nsteps: {a: {do: split}}", "a workflow is called '../../x'"),
    ],
)
def test_what_is_no_workflow_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "w.yaml").write_text(text)
    with pytest.raises(CptError) as error:
        load(tmp_path / "w.yaml")
    assert said in error.value.message
    assert "w.yaml" in error.value.message


def test_a_file_that_is_missing_or_broken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("\n\n1 / 0")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "leaves.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "latin.yaml").write_bytes(b"steps: {a: {do: split, inputs: caf\xe9}}")
    (tmp_path / "folder.yaml").mkdir()
    for ending in ("yaml", "yml"):
        (tmp_path / f"twin.{ending}").write_text("steps: {a: {do: split}}")
    (tmp_path / "w.txt").touch()
    for name, said in (
        ("none.yaml", "there is no workflow"),
        ("broken.py", r"cannot be imported: ZeroDivisionError: division by zero \(line 3\)"),
        ("empty.py", "holds 0 workflows"),
        ("leaves.py", "cannot be imported: SystemExit: 3"),
        ("latin.yaml", "is not UTF-8"),
        ("folder.yaml", "is a folder"),
        ("twin.yml", "twin.yaml would have their records in one folder"),
        ("w.txt", "a workflow is a .yaml or a .py file"),
    ):
        with pytest.raises(CptError, match=said):
            load(tmp_path / name)


def test_a_file_may_import_its_neighbours_and_hides_no_library(tmp_path: Path) -> None:
    (tmp_path / "my_paths.py").write_text("CORPUS = 'ja.jsonl'\n")
    (tmp_path / "colorsys.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from my_paths import CORPUS\nfrom nemo_cpt.workflow import Workflow, split\n"
        "@dataclass\nclass Sizes:\n    most: ClassVar[int] = 1\n"  # which Python looks up by the module's name
        "workflow = Workflow('w', [split('text', inputs=CORPUS, output_folder='text')])\n"
    )
    (tmp_path / "mine.py").write_text((tmp_path / "colorsys.py").read_text())
    import colorsys

    for name in ("mine.py", "colorsys.py"):
        assert load(tmp_path / name).steps["text"].reads == ["ja.jsonl"]
    assert sys.modules["colorsys"] is colorsys


@pytest.mark.parametrize("ending", ["yaml", "py"])
@pytest.mark.parametrize("kind", templates())
def test_every_kind_that_can_be_begun_with_loads_and_is_looked_at(tmp_path: Path, kind: str, ending: str) -> None:
    path = tmp_path / f"mine.{ending}"
    write_kind(kind, path)
    workflow = load(path)
    for step in workflow.order:
        for file in workflow.given(step):
            if not file.startswith(("hf:", "/")) and file.endswith(".jsonl"):
                (tmp_path / file).write_text('{"text": "yours"}\n')
    found = dry_run(workflow, Chosen(), plan=False)
    assert not any(each.done for each in found.standings)
    assert len(list(found.rows())) == len(workflow.steps) + 1
    assert {step.do for step in workflow.order} <= set(KINDS)
    with pytest.raises(CptError, match="exists"):
        write_kind(kind, path)


def test_the_kinds_to_begin_with_hold_what_they_are_named_for() -> None:
    assert templates() == ["demo", "domain-lora", "from-scratch", "japanese", "single-gpu"]
    with pytest.raises(CptError, match="near: japanese"):
        write_kind("japanes", Path("x.yaml"))
