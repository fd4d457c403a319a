"""Workflows run: what is done is left alone, what changed is made again, what was killed or stopped goes on."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psutil
import pytest

import nemo_cpt.workflow
from nemo_cpt import CptError
from nemo_cpt.workflow import Chosen, Step, Workflow, as_yaml, run, split, tokenizer
from nemo_cpt.workflow.comparison import compare
from nemo_cpt.workflow.dry_run import dry_run
from nemo_cpt.workflow.page import _address
from nemo_cpt.workflow.state import State
from tests.support.corpus_helpers import write_jsonl
from tests.support.crashes import killed_at, lines_of
from tests.workflow.conftest import chain, make_folder, own

HERE = Path(nemo_cpt.workflow.__file__).parent
CORPUS = str(files("nemo_cpt.demo") / "corpus" / "en.jsonl")
KILLS = 25
OF_TIME = ("starts", "started", "ended", "seconds")  # of a record: other ones each time


def ran(workflow: Workflow, **chosen: Any) -> list[str]:
    """Run it, and return the steps that were done in it."""
    said: list[str] = []
    run(workflow, Chosen(**chosen), said.append)
    return [line.split()[1].rstrip(":") for line in said if " done in " in line]


def why(workflow: Workflow, **chosen: Any) -> dict[str, str]:
    return {each.step.name: each.why for each in dry_run(workflow, Chosen(**chosen)).standings if not each.done}


def test_a_rerun_does_what_changed_and_what_depends_on_it(folder: Path) -> None:
    assert why(chain(folder)) == dict.fromkeys(("one", "two", "three", "four"), "new")
    assert ran(chain(folder)) == ["three", "one", "two", "four"]
    assert (folder / "four.txt").read_text() == "a+a-b+b"
    assert ran(chain(folder)) == []
    # Parameters: of a step, and then back to what they were.
    assert why(chain(folder, two="*")) == {"two": "parameters: word", "four": "after two"}
    assert ran(chain(folder, two="*")) == ["two", "four"]
    assert (folder / "four.txt").read_text() == "a*a-b+b"
    # An input's content; that a file is touched changes nothing.
    os.utime(folder / "a.txt", (1, 1))
    assert ran(chain(folder, two="*")) == []
    (folder / "b.txt").write_text("B")
    assert why(chain(folder, two="*")) == {"three": "input changed: b.txt", "four": "after three"}
    assert ran(chain(folder, two="*")) == ["three", "four"]
    # What was made is gone, or another.
    (folder / "three.txt").unlink()
    assert why(chain(folder, two="*")) == {"three": "output missing: three.txt", "four": "after three"}
    assert ran(chain(folder, two="*")) == ["three"]  # and is what it was: four has nothing to do
    (folder / "out/two.txt").write_text("by hand")
    with pytest.raises(
        CptError, match=r"two would be made again \(output changed: two\.txt\), and somebody has changed"
    ):
        run(chain(folder, two="*"))
    with pytest.raises(CptError, match=r"two would be made again \(parameters: word\), and somebody has changed"):
        run(chain(folder, two="/"))
    assert (folder / "out/two.txt").read_text() == "by hand"
    assert ran(chain(folder, two="*"), redo=["two"]) == ["two"]
    # The code of a function of one's own.
    (folder / "functions.py").write_text((folder / "functions.py").read_text() + "\n# another\n")
    assert why(chain(folder, two="*"))["one"] == "code changed: functions.py:join"


def test_what_an_older_versions_record_does_not_know_is_no_change(folder: Path) -> None:
    (folder / "beside.py").write_text("")
    (folder / "functions.py").write_text("import beside\n" + (folder / "functions.py").read_text())
    ran(chain(folder))
    state, one = State(chain(folder)), chain(folder).steps["one"]
    record = state.record(one)
    assert record is not None
    # It noted the function's own file alone, and did not look at all that is looked at now.
    state.write(replace(record, code=record.code.partition("-")[0], inputs={}))
    assert why(chain(folder)) == {}
    (folder / "functions.py").write_text((folder / "functions.py").read_text() + "\n# another\n")
    assert why(chain(folder))["one"] == "code changed: functions.py:join"


def test_a_module_beside_a_function_of_one_s_own_is_its_code_too(folder: Path) -> None:
    (folder / "tools.py").write_text("from words import WORD\n\ndef make(dest):\n    open(dest, 'w').write(WORD)\n")
    (folder / "words.py").write_text("import json, letters.small\nWORD = letters.small.LETTER * 2\n")
    (folder / "letters").mkdir()
    (folder / "letters/__init__.py").touch()
    (folder / "letters/small.py").write_text("LETTER = 'a'\n")
    workflow = Workflow("w", [Step("make", "tools.py:make", {"writes": "dest", "dest": "made.txt"})], folder)
    assert ran(workflow) == ["make"]
    assert ran(workflow) == []
    (folder / "letters/small.py").write_text("LETTER = 'b'\n")
    assert why(workflow) == {"make": "code changed: tools.py:make"}
    assert ran(workflow) == ["make"]
    assert (folder / "made.txt").read_text() == "bb"


def test_steps_are_made_again_or_left_when_asked(folder: Path) -> None:
    assert ran(chain(folder), until="two") == ["one", "two"]
    assert not (folder / "three.txt").exists()
    assert ran(chain(folder)) == ["three", "four"]
    assert ran(chain(folder), redo=["one"]) == ["one"]
    assert ran(chain(folder), start_from="one") == ["one", "two", "four"]
    with pytest.raises(CptError, match="two does not need three: leave --until away"):
        run(chain(folder), Chosen(until="two", redo=["three"]))
    for chosen in ({"until": "tow"}, {"redo": ["tow"]}, {"start_from": "tow"}):
        with pytest.raises(CptError, match="has no step 'tow'; near: two"):
            run(chain(folder), Chosen(**chosen))


def test_what_no_run_of_it_made_is_not_written_over(folder: Path) -> None:
    (folder / "three.txt").write_text("mine")
    with pytest.raises(CptError, match=r"three would make three\.txt, which is there and which no run"):
        run(chain(folder))
    assert (folder / "three.txt").read_text() == "mine"
    assert not (folder / "one.txt").exists()  # known before anything ran


def test_what_somebody_puts_in_the_place_of_a_failed_step_s_output_stays(folder: Path) -> None:
    for dest in ("made.txt", "other.txt"):
        failing = Workflow("w", [own("first", "forget", ["a.txt"], "made.txt")], folder)
        with pytest.raises(CptError, match=r"made\.txt is not there"):
            run(failing)
        (folder / dest).write_text("by hand")
        with pytest.raises(CptError, match=r"somebody has changed what it made|no run of this workflow made"):
            run(Workflow("w", [own("first", "join", ["a.txt"], dest)], folder))
        assert (folder / dest).read_text() == "by hand"
        (folder / dest).unlink()


def sets(folder: Path, where: str, validation: float = 0.5, name: str = "w") -> Workflow:
    return Workflow(name, [split("s", inputs="all.jsonl", output_folder=where, validation=validation)], folder)


def test_a_folder_that_somebody_filled_is_neither_cleared_nor_taken_over(folder: Path) -> None:
    write_jsonl(folder / "all.jsonl", [f"{number} and so on" for number in range(40)])
    assert ran(sets(folder, "made")) == ["s"]
    (folder / "made/notes.md").write_text("mine")
    (folder / "precious").mkdir()
    (folder / "precious/thesis.txt").write_text("mine")
    with pytest.raises(CptError, match=r"s would make precious, which is there and which no run of this workflow made"):
        run(sets(folder, "precious"))
    # Made again, it leaves what lies beside its files.
    assert ran(sets(folder, "made", 0.25)) == ["s"]
    assert (folder / "made/notes.md").read_text() == (folder / "precious/thesis.txt").read_text() == "mine"
    # What another workflow made is not this one's, though it may go on from it where it is the same.
    before = (folder / "made/train.jsonl").read_bytes()
    assert ran(sets(folder, "made", 0.25, "other")) == ["s"]
    with pytest.raises(CptError, match=r"s would make made, which is there and which no run of this workflow made"):
        run(sets(folder, "made", 0.5, "other"))
    with pytest.raises(CptError, match="holds another split"):
        run(sets(folder, "made", 0.5, "third"))
    with pytest.raises(CptError, match=r"s would make made, which is there"):
        run(sets(folder, "made", 0.75, "third"))
    assert (folder / "made/train.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("function", "parameters", "said"),
    [
        ("crash", {}, "last was killed by SIGKILL; the last lines of"),
        ("forget", {}, "last ended well, and last.txt is not there"),
        ("spoil", {"victim": "a.txt"}, "last read a.txt, which changed meanwhile"),
        ("join", {"word": 3}, "last ended with exit code 1; the last lines of"),
        ("refuse", {}, "last: two tasks failed:\ntask 1: why (log: "),
    ],
)
def test_a_step_that_fails_ends_the_workflow_and_goes_on_from_there(
    folder: Path, function: str, parameters: dict[str, Any], said: str
) -> None:
    last = own("last", function, ["a.txt", "four.txt"], "last.txt", **parameters)
    with pytest.raises(CptError) as error:
        run(chain(folder, last))
    assert said in error.value.message
    assert "about to crash" in error.value.message or function != "crash"
    assert set(why(chain(folder, last))) >= {"last"}
    (folder / "a.txt").write_text("a")
    assert ran(chain(folder, own("last", "join", ["a.txt", "four.txt"], "last.txt"))) == ["last"]


def test_what_cannot_work_leaves_no_records(folder: Path) -> None:
    with pytest.raises(CptError, match=r"last reads nix\.txt, which is not there"):
        run(chain(folder, own("last", "join", ["nix.txt"], "last.txt")))
    assert not list(folder.glob("*.workflow"))


def test_an_input_that_changes_between_two_steps_is_seen(folder: Path) -> None:
    early = own("early", "spoil", [], "early.txt", victim="b.txt")
    late = own("late", "join", ["b.txt", early], "late.txt")
    with pytest.raises(CptError, match=r"b\.txt, which late reads, changed since the workflow started"):
        run(Workflow("w", [early, late], folder))
    assert not (folder / "late.txt").exists()
    assert ran(Workflow("w", [early, late], folder)) == ["late"]


def test_what_lies_behind_a_linked_folder_of_an_input_is_read_and_seen_to_change(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir()
    (folder / "texts").mkdir()
    (folder / "texts" / "more").symlink_to(tmp_path / "aside")
    write_jsonl(tmp_path / "aside" / "a.jsonl", [f"text {number}" for number in range(40)])
    workflow = Workflow("w", [split("split", inputs="texts", output_folder="sets", validation=0.5)], folder)
    assert ran(workflow) == ["split"]
    assert why(workflow) == {}
    write_jsonl(tmp_path / "aside" / "a.jsonl", [f"another {number}" for number in range(40)])
    assert why(workflow) == {"split": "input changed: texts"}


def test_a_step_whose_input_comes_out_the_same_is_left_alone(folder: Path) -> None:
    steps = [own("first", "constant", ["a.txt"], "c.txt"), own("second", "join", ["c.txt", "c.txt"], "d.txt")]
    assert ran(Workflow("w", steps, folder)) == ["first", "second"]
    (folder / "a.txt").write_text("changed")
    assert why(Workflow("w", steps, folder))["second"] == "after first"
    assert ran(Workflow("w", steps, folder)) == ["first"]


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "nemo_cpt.cli", "workflow", str(folder / "w.yaml"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/")


def until_begun(folder: Path) -> psutil.Process:
    """The process of the step that waits."""
    begun = folder / "go.begun"
    while not (begun.exists() and begun.read_text()):
        pass
    return psutil.Process(int(begun.read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_what_is_told_to_stop_or_killed_takes_its_step_along_and_goes_on(folder: Path, number: signal.Signals) -> None:
    waits = own("waits", "wait", ["one.txt"], "waited.txt", until=str(folder / "go"))
    (folder / "w.yaml").write_text(as_yaml(chain(folder, waits)))
    process = start(folder)
    step = until_begun(folder)
    process.send_signal(number)
    said, _ = process.communicate()
    step.wait()
    assert process.returncode == (75 if number != signal.SIGKILL else -9), said
    assert "was stopped in waits: the same command goes on from there" in said or number == signal.SIGKILL
    assert why(chain(folder, waits))["waits"] == ("was stopped" if number != signal.SIGKILL else "did not end")
    (folder / "go").touch()
    assert ran(chain(folder, waits)) == ["waits"] or (folder / "four.txt").exists()
    assert why(chain(folder, waits)) == {}


def test_a_workflow_runs_once_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_cpt.workflow.state.PATIENCE", 0.0)
    workflow = chain(folder)
    with State(workflow).held(), pytest.raises(CptError, match="the workflow light runs already"):
        run(workflow)


def without_times(record: Any) -> Any:
    """A record of all, but for times."""
    if isinstance(record, dict):
        return {key: without_times(value) for key, value in record.items() if key not in (*OF_TIME, "mtime_ns")}
    return [without_times(each) for each in record] if isinstance(record, list) else record


def left(workflow: Workflow) -> Any:
    return without_times(json.loads((State(workflow).folder / "record.json").read_bytes()))


def of_the_library(folder: Path) -> Workflow:
    """Text to a tokenizer through the library's steps, which go on or begin anew, and one of the user's."""
    make_folder(folder)
    text = split("text", inputs=CORPUS, output_folder="text", validation=0.2)
    words = tokenizer("tokenizer", corpora=text / "train.jsonl", output="tokenizer", vocabulary_size=512)
    return Workflow("road", [own("last", "join", [words / "tokenizer.json"], "last.json"), words, text], folder)


def test_killed_at_25_points_it_leaves_the_same_record(tmp_path: Path) -> None:
    """Between steps and within them: the points lie all over what the workflow's own process does."""
    unbroken = of_the_library(tmp_path / "unbroken")
    lines = lines_of(lambda: run(unbroken, say=lambda line: None), HERE)
    hit = 0
    for number in range(KILLS):
        workflow = of_the_library(tmp_path / str(number))
        point = 1 + number * (lines.count - 1) // KILLS
        killed, _ = killed_at(point, lambda workflow=workflow: run(workflow, say=lambda line: None), HERE)
        hit += killed
        run(workflow, say=lambda line: None)
        assert left(workflow) == left(unbroken), f"killed at line {point} of {lines.count}"
        assert why(workflow) == {}
    assert hit >= KILLS - 2


def test_two_runs_are_compared(folder: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "other")
    for where, words in ((folder, {}), (tmp_path / "other", {"two": "*"})):
        (where / "w.yaml").write_text(as_yaml(chain(where, **words)))
        run(chain(where, **words))
    rows = compare(folder / "w.yaml", tmp_path / "other/light.workflow/record.json")
    assert ("two", "word", '"+"', '"*"') in rows
    changed = {(step, what) for step, what, *_ in rows if what != "seconds"}
    assert {step for step, _ in changed} == {"two", "four"}
    assert ("four", "input out/two.txt") in changed
    assert compare(folder / "w.yaml", folder / "light.workflow") == []
    (folder / "broken.json").write_text("{}")
    for path, said in ((folder / "none", "cannot be read"), (folder / "broken.json", "it has no steps")):
        with pytest.raises(CptError, match=said):
            compare(path, folder / "w.yaml")


def test_a_folder_of_many_files_is_one_row_and_a_table_of_figures_one_a_row(tmp_path: Path) -> None:
    for number in range(2):
        made = {f"run/context/{number}{name}": {"size": 500, "mtime_ns": 1, "hash": str(name)} for name in range(40)}
        step = {
            "do": "train", "state": "done", "code": "", "seed": 1, "parameters": {}, "versions": {}, "inputs": {},
            "outputs": {"results/run": made}, "seconds": 1.0,
            "result": {"rows": [["ja", "bits per byte", 2.0, 1.5 + number], ["en", "bits per byte", 1.0, 1.0]]},
        }  # fmt: skip
        (tmp_path / f"{number}.json").write_text(json.dumps({"versions": {}, "steps": {"train": step}}))
    made_rows, figures = compare(tmp_path / "0.json", tmp_path / "1.json")
    assert made_rows[:2] == ("train", "output results/run")
    assert [each.startswith('"40 files, 20.0 kB, ') for each in made_rows[2:]] == [True, True]
    assert figures == ("train", "result: rows, ja, bits per byte", "[2.0, 1.5]", "[2.0, 2.5]")


def test_links_lead_to_paths_of_any_name() -> None:
    path = "../run #1?/50%/評価/report.html"
    link = _address(path)
    assert not set(link) & set("#? ")
    assert unquote(link) == path


def test_the_page_links_what_the_steps_report(folder: Path) -> None:
    run(chain(folder))
    page = (folder / "light.workflow/page.html").read_text("utf-8")
    assert "4 of 4 steps are done" in page
    for name in ("one", "two", "three", "four"):
        assert f'href="steps/{name}.log"' in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_broken_record_is_named(folder: Path) -> None:
    run(chain(folder))
    (folder / "light.workflow/steps/one.json").write_text("{")
    with pytest.raises(CptError, match=r"one\.json is no record of a step"):
        run(chain(folder))
