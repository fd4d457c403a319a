"""lm-evaluation-harness' command line and results; a small local task where it is installed."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nemo_cpt.errors import CptError
from nemo_cpt.evaluation import benchmarks, evaluate
from nemo_cpt.evaluation.benchmarks import PRESETS, Task, command, find_tasks, result_of
from nemo_cpt.evaluation.candidates import Candidate

RESULTS = {  # what version 0.4.13 writes, shortened
    "results": {
        "sums": {"alias": "sums", "sample_len": 8, "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25,
                 "acc_norm_stderr,none": "N/A"},
        "words": {"alias": "words", "exact_match,strict": 0.125, "exact_match_stderr,strict": 0.01,
                  "exact_match,loose": 0.5, "exact_match_stderr,loose": 0.02},
    },
    "versions": {"sums": 1.0, "words": "Yaml"},
    "n-shot": {"sums": 3, "words": 0},
    "higher_is_better": {"sums": {"acc": True, "acc_norm": True}, "words": {"exact_match": True}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What is ours of it is tested without the harness too."""
    if "real_harness" not in request.fixturenames:
        monkeypatch.setattr(benchmarks, "find_spec", lambda name: object())


@pytest.fixture
def real_harness() -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]'")


def test_tasks_and_presets() -> None:
    assert find_tasks(["sums", "words:5"]) == [Task("sums"), Task("words", 5)]
    assert find_tasks(["en-forgetting"]) == list(PRESETS["en-forgetting"])
    assert all(task.shots is not None and task.metric and task.dataset for each in PRESETS.values() for task in each)


def test_own_tasks(tmp_path: Path) -> None:
    assert find_tasks([f"{tmp_path}/sums:2"]) == [Task("sums", 2, folder=str(tmp_path))]
    with pytest.raises(CptError, match="there is no folder nowhere of tasks"):
        find_tasks(["nowhere/sums"])


@pytest.mark.parametrize("spec", ["", "sums:", "sums:many", "sums:-1", ":3"])
def test_what_is_no_task(spec: str) -> None:
    with pytest.raises(CptError, match=r"a task is NAME, NAME:SHOTS or a preset \(ja, zh-tw, en-forgetting\)"):
        find_tasks([spec])


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    with pytest.raises(CptError, match=r"`pip install .* -e '.\[eval\]'`"):
        evaluate(tmp_path / "model", tmp_path / "out", tasks=["ja"])
    assert not (tmp_path / "out").exists()


def test_the_command_line(world: Path, tmp_path: Path) -> None:
    candidate = Candidate("after", str(world / "base_hf"), {"device": "cpu"})
    words = " ".join(command(candidate, [Task("sums", 3), Task("words", 3)], tmp_path, 10))
    given = json.dumps({"pretrained": str(world / "base_hf"), "dtype": "float32"})
    assert f"-m lm_eval run --tasks sums,words --model hf --model_args {given} --device cpu" in words
    assert words.endswith("--num_fewshot 3 --limit 10")
    own = command(candidate, [Task("sums", None, folder="mine")], tmp_path, None)
    assert own[-2:] == ["--include_path", "mine"]
    assert "--num_fewshot" not in own


@pytest.mark.usefixtures("real_harness")
def test_the_rotary_embedding_of_a_model_that_transformers_5_has_written(world: Path, tmp_path: Path) -> None:
    """transformers 4 passes over `rope_parameters`, and the harness would measure another model."""
    from lm_eval.models.huggingface import HFLM

    model = Path(shutil.copytree(world / "base_hf", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    theta = config.pop("rope_theta")
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    (model / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_theta": theta, **scaling}}))
    words = command(Candidate("after", str(model), {"device": "cpu"}), [Task("sums")], tmp_path, None)
    given = json.loads(words[words.index("--model_args") + 1])
    tokens = torch.arange(5, 45)[None]
    found, expected = (
        HFLM(**{"device": "cpu", **arguments}).model(tokens).logits
        for arguments in (given, {"pretrained": str(world / "base_hf"), "dtype": "float32"})
    )
    assert theta != 10_000
    assert torch.equal(found, expected)


def test_the_command_line_for_an_endpoint(tmp_path: Path) -> None:
    """Its address as everything else asks it: a gateway's own version in place of /v1, and no password to be read."""
    candidate = Candidate("after", "https://me:secret@gateway.example/v1beta/openai/#some/model")
    words = command(candidate, [Task("sums")], tmp_path, None)
    given = json.loads(words[words.index("--model_args") + 1])
    assert given["base_url"] == "https://gateway.example/v1beta/openai/chat/completions"
    assert given["model"] == "some/model"


def test_results() -> None:
    sums = result_of(RESULTS, Task("sums"))
    assert sums["metrics"] == {
        "acc": {"value": 0.5, "stderr": 0.1, "higher_is_better": True},
        "acc_norm": {"value": 0.25, "stderr": None, "higher_is_better": True},
    }
    assert (sums["version"], sums["shots"]) == (1.0, 3)
    assert list(result_of(RESULTS, Task("sums", metric="acc"))["metrics"]) == ["acc"]
    words = result_of(RESULTS, Task("words", metric="exact_match"))
    assert list(words["metrics"]) == ["exact_match (strict)", "exact_match (loose)"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task("other"), "have no task other, but sums, words"),
        (Task("sums", metric="f1"), "of sums have no f1, but alias"),
    ],
)
def test_results_that_miss_something(task: Task, message: str) -> None:
    with pytest.raises(CptError, match=message):
        result_of(RESULTS, task)


def test_rows_take_standard_errors_for_independent() -> None:
    before = result_of(RESULTS, Task("sums"))
    after = json.loads(json.dumps(before))
    after["metrics"]["acc"] |= {"value": 0.9, "stderr": 0.05}
    acc, norm = benchmarks._compared([Task("sums")], [[before], [after]])
    reach = 1.959964 * (0.1**2 + 0.05**2) ** 0.5
    assert [acc.low, acc.high] == pytest.approx([0.4 - reach, 0.4 + reach])
    assert (acc.group, acc.measure, acc.verdict) == ("sums, 3-shot", "benchmark, acc", "better")
    assert "version 1.0" in acc.note
    assert (norm.low, norm.high) == (None, None)
    (alone, _) = benchmarks._compared([Task("sums")], [[after]])
    assert (alone.before, alone.after, alone.low) == (None, 0.9, pytest.approx(0.9 - 1.959964 * 0.05))


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """A task of the user's own: which number comes next, out of two."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [{"question": f"{n}, {n + 1}, {n + 2},", "choices": [str(n + 3), "banana"], "label": 0} for n in range(12)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "sums.yaml").write_text(f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/sums.jsonl}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 2.0}}
""")
    return folder


@pytest.mark.usefixtures("real_harness")
def test_a_small_task_of_ones_own(world: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("WORLD_SIZE", "1")  # as a process that has trained keeps it: the harness is no rank of that
    monkeypatch.setenv("LOCAL_RANK", "0")
    given = {"tasks": [f"{sums}/sums:1"], "limit": 6, "device": "cpu", "quiet": True}
    model = tmp_path / "My, model=1"  # a comma and an equals sign, which part the harness' arguments
    model.symlink_to(world / "base_hf")
    found = evaluate(model, tmp_path / "out", **given)
    (row,) = found.rows
    assert (row.group, row.measure) == ("sums, 1-shot", "benchmark, acc")
    assert 0 <= row.after <= 1
    assert row.note.endswith("version 2.0 of the task")
    monkeypatch.setattr(benchmarks, "run", None)  # nothing is run twice
    assert evaluate(model, tmp_path / "out", **given).rows == found.rows
    with (sums / "sums.jsonl").open("a") as file:  # another task from here on
        file.write('{"question": "1, 2,", "choices": ["3", "banana"], "label": 0}\n')
    monkeypatch.setattr(benchmarks, "run", lambda *asked: RESULTS)
    assert [each.after for each in evaluate(model, tmp_path / "out", **given).rows] == [0.5, 0.25]


@pytest.mark.usefixtures("real_harness")
def test_an_unknown_task_is_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(CptError, match=r"(?s)ended with \d+, its log is .*no_such_task"):
        evaluate(world / "base_hf", tmp_path / "out", tasks=["no_such_task"], device="cpu", quiet=True)
