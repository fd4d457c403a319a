"""A whole road, through the library's own steps and one short training: the example, run as it stands."""

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from nemo_cpt import CptError
from nemo_cpt.workflow import Chosen, Step, Workflow, load
from nemo_cpt.workflow.dry_run import dry_run
from nemo_cpt.workflow.running import Runner
from nemo_cpt.workflow.showing import Shown
from nemo_cpt.workflow.standing import goes_on, standing
from nemo_cpt.workflow.state import State

EXAMPLE = Path(__file__).parents[2] / "examples" / "workflow.py"
CLI = [sys.executable, "-m", "nemo_cpt.cli", "workflow"]


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the example has run."""
    folder = tmp_path_factory.mktemp("road")
    environ = os.environ | {"NEMORUN_HOME": str(folder / "home")}
    done = subprocess.run([sys.executable, str(EXAMPLE)], cwd=folder, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def workflow(road: Path, monkeypatch: pytest.MonkeyPatch) -> Workflow:
    monkeypatch.chdir(road)
    return load(EXAMPLE)


def test_everything_is_done_and_recorded(road: Path, workflow: Workflow) -> None:
    record = json.loads((road / "workflow_ja/ja.workflow/record.json").read_bytes())
    assert {step["state"] for step in record["steps"].values()} == {"done"}
    assert record["steps"]["data"]["result"]["documents"] > 50
    assert (record["steps"]["init"]["seed"], record["steps"]["train"]["seed"]) == (7, 1234)  # given, and by default
    assert record["steps"]["long"]["result"]["kept"] > 50
    assert any("steps=20" in name for name in record["steps"]["train"]["outputs"]["results/ja"])
    assert (road / "workflow_ja/model/model.safetensors").is_file()
    assert not any(each.why for each in dry_run(workflow, Chosen()).standings)


def test_the_page_s_links_lead_somewhere(road: Path) -> None:
    class Links(HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [str(value) for name, value in attrs if name in ("href", "src")]

    page = road / "workflow_ja/ja.workflow/page.html"
    Links().feed(page.read_text("utf-8"))
    assert "../report/report.html" in Links.found
    assert "../text/split.json" in Links.found
    assert "../model" in Links.found
    assert "../ds/ja_text_document" not in Links.found  # a prefix, beside which a training left its indices
    assert not [link for link in Links.found if not (page.parent / unquote(link)).exists()]


def test_the_command_says_so_and_ends_with_0(road: Path) -> None:
    done = subprocess.run([*CLI, str(EXAMPLE), "--json"], cwd=road, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"]["train"]["state"] == "done"
    assert "9/9 report: done before" in done.stderr
    shown = subprocess.run([*CLI, str(EXAMPLE), "--dry-run", "--json"], cwd=road, capture_output=True, text=True)
    assert all(step["done"] for step in json.loads(shown.stdout)["steps"].values())
    wrong = subprocess.run([*CLI, str(EXAMPLE), "--until", "trian"], cwd=road, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (2, "nemo-cpt: the workflow ja has no step 'trian'; near: train\n")


def test_a_training_that_is_made_again_is_set_aside_and_what_follows_waits(road: Path, workflow: Workflow) -> None:
    step = workflow.steps["train"]
    other = Step("train", "train", {**step.parameters, "max_steps": 3, "max_step": 3}, workflow.folder)
    with pytest.raises(CptError, match="near: max_steps"):
        other.check()
    found = dry_run(changed(workflow, "train", max_steps=3), Chosen())
    assert {each.step.name: each.why for each in found.standings if not each.done} == {
        "train": "parameters: max_steps",
        "export": "after train",
        "report": "after train",
    }
    assert not found.refused
    # Before it starts, its folder is moved away; unless it is to go on there, with no more than another schedule.
    record = State(workflow).path("train", "json")
    kept = record.read_bytes()
    for parameters, left in (
        ({"max_steps": 30, "extend": "keep"}, ["ja"]),
        ({"max_steps": 30, "extend": "keep", "seed": 7}, ["ja.1"]),
        ({"max_steps": 3}, ["ja.1"]),
    ):
        again = changed(workflow, "train", **parameters)
        state = State(again)
        runner = Runner(again, state, False, Shown(again.name, 1, lambda line: None))
        assert runner.begin(standing(again.steps["train"], state)).state == "running"
        assert [path.name for path in (workflow.folder / "results").glob("ja*")] == left
        # Stopped there it goes on, also with other parameters: which of them may change, the training decides.
        assert goes_on(standing(changed(workflow, "train", max_steps=40).steps["train"], state))
        assert not goes_on(standing(again.steps["train"], state, again=True))
        record.write_bytes(kept)
        if left == ["ja.1"]:
            (workflow.folder / "results/ja.1").rename(workflow.folder / "results/ja")
    # Nor while a job trains there, which would go on in the folder that was moved.
    command = [sys.executable, "-c", HOLDER, str(workflow.folder / "results/ja")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as job:
        assert job.stdout is not None
        job.stdout.readline()
        with pytest.raises(CptError, match="results/ja is in use by process"):
            runner.begin(standing(again.steps["train"], state))
        job.communicate()
    assert [path.name for path in (workflow.folder / "results").glob("ja*")] == ["ja"]


HOLDER = """
import sys
from pathlib import Path
from nemo_cpt.training.run_lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_finished_training_that_was_set_aside_is_put_back(workflow: Workflow) -> None:
    """Settings that were changed and changed back; the other training is the first one's copy."""
    results, other, state = workflow.folder / "results", changed(workflow, "train", max_steps=3), State(workflow)
    said: list[str] = []

    def why(of: Workflow) -> str:
        return next(each.why for each in dry_run(of, Chosen()).standings if each.step.name == "train")

    def runner(of: Workflow) -> Runner:
        return Runner(of, state, False, Shown(of.name, 1, said.append))

    def folders() -> list[str]:
        return sorted(path.name for path in results.glob("ja*"))

    record = runner(other).begin(standing(other.steps["train"], state))
    assert folders() == ["ja.1"]
    shutil.copytree(results / "ja.1", results / "ja")
    runner(other).end(other.steps["train"], record, 0, 1.0)
    assert (why(other), why(workflow)) == ("", "parameters: max_steps; results/ja.1 is put back")
    runner(workflow).take(workflow.steps["train"], again=False)
    assert folders() == ["ja", "ja.2"]
    assert not any(each.why for each in dry_run(workflow, Chosen()).standings)
    # Killed between the record and the renaming.
    first = state.record(workflow.steps["train"])
    assert first is not None
    (results / "ja").rename(results / "ja.1")
    state.keep_earlier(first, 1)
    assert why(workflow).endswith("; results/ja.1 is put back")
    runner(workflow).take(workflow.steps["train"], again=False)
    assert (why(workflow), why(other)) == ("", "parameters: max_steps; results/ja.2 is put back")
    # Asked for again it is trained; and what somebody changed meanwhile is not put back.
    assert standing(other.steps["train"], state, again=True).earlier is None
    next((results / "ja.2/checkpoints").glob("*/run.json")).unlink()
    assert why(other) == "parameters: max_steps"
    shutil.rmtree(results / "ja.2")
    assert any("ja.1, made with these settings, is ja again" in line for line in said)


def changed(workflow: Workflow, name: str, **parameters: object) -> Workflow:
    steps = [
        Step(each.name, each.do, {**each.parameters, **(parameters if each.name == name else {})})
        for each in workflow.steps.values()
    ]
    return Workflow(workflow.name, steps, workflow.folder)
