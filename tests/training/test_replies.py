"""Replies asked within a training: what the exported model says, and not a loss that differs."""

import functools
import json
import types
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from nemo.utils import AppState

from nemo_cpt.errors import CptError
from nemo_cpt.evaluation import evaluate, report
from nemo_cpt.evaluation.callback import EvaluateReplies
from nemo_cpt.evaluation.reading import Asked
from nemo_cpt.inference import Sampling
from nemo_cpt.inference.transformers_engine import TransformersEngine
from nemo_cpt.recipes import tiny
from nemo_cpt.training.metrics import REPLIES_FILE, read_lines, read_metrics
from tests.training import jobs

QUESTIONS = ["日本の首都は?", "Once upon a time", "猫"]
TOKENS = 6


@pytest.fixture(scope="module")
def prompts(world: Path) -> Path:
    path = world / "ja_questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": each, "language": "ja"}) + "\n" for each in QUESTIONS))
    return path


def test_replies_come_behind_a_line_that_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppState(), "log_dir", tmp_path)
    file = tmp_path / REPLIES_FILE
    file.parent.mkdir()
    file.write_text('{"step": 0, "id": "", "prompt": "日本の')
    trainer = types.SimpleNamespace(global_step=2, loggers=[])
    EvaluateReplies()._keep(trainer, [Asked("", "日本の首都は?")], ["東京"])
    assert [(line["step"], line["reply"]) for line in read_lines(tmp_path, REPLIES_FILE)] == [(2, "東京")]


def train(world: Path, blend: Any, name: str, prompts: Path | None, **changes: Any) -> None:
    settings = {"seq_length": 64, "global_batch_size": 8, "max_steps": 4, "val_check_interval": 2} | changes
    recipe = tiny.continual_pretrain(str(world / "base"), blend, name=name, directory=str(world / "runs"), **settings)
    if prompts:
        recipe.trainer.callbacks.append(run.Config(EvaluateReplies, prompts=str(prompts), max_tokens=TOKENS))
    run.run(recipe, direct=True)


def start(world: Path, blend: Any, name: str, prompts: Path | None, processes: int = 1, **changes: Any) -> None:
    log = world / f"{name}.log"
    job = functools.partial(train, world, blend, name, prompts, processes=processes, **changes)
    assert jobs.run(job, processes, log=log) == 0, log.read_text()[-3000:]


def replies(world: Path, name: str) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for line in (world / "runs" / name / REPLIES_FILE).read_text("utf-8").splitlines():
        read = json.loads(line)
        found.setdefault(read["step"], []).append(read["reply"])
    return found


@pytest.fixture(scope="module")
def asked(world: Path, blend: Any, prompts: Path) -> str:
    start(world, blend, "asked", prompts, seed=0)
    return "asked"


def test_losses_are_the_same_with_it_and_without(world: Path, blend: Any, asked: str) -> None:
    start(world, blend, "not_asked", None, seed=0)
    with_it, without = (read_metrics(world / "runs" / name) for name in (asked, "not_asked"))
    names = ("reduced_train_loss", "grad_norm", "lr", "val_loss_ja", "val_loss_en")
    measured = [
        [{name: line[name] for name in names if name in line} for line in lines] for lines in (with_it, without)
    ]
    assert measured[0] == measured[1]
    assert any("reduced_train_loss" in line for line in measured[0])


def test_before_the_first_step_they_are_the_bases(world: Path, asked: str) -> None:
    engine = TransformersEngine(world / "base_hf", device="cpu")
    found = dict(engine.generate(QUESTIONS, Sampling(max_tokens=TOKENS)))
    assert replies(world, asked)[0] == [found[at].text for at in range(len(QUESTIONS))]
    assert list(replies(world, asked)) == [0, 2, 4]


def test_the_share_is_logged(world: Path, asked: str) -> None:
    shares = {
        line["step"]: line["replies_in_ja"] for line in read_metrics(world / "runs" / asked) if "replies_in_ja" in line
    }
    assert shares
    assert set(shares) <= {0, 2, 4}
    assert all(0 <= share <= 1 for share in shares.values())


def test_tensor_parallel_ranks_say_the_same(world: Path, blend: Any, prompts: Path, asked: str) -> None:
    start(world, blend, "asked_two", prompts, processes=2, tensor_model_parallel_size=2)
    assert replies(world, "asked_two")[0] == replies(world, asked)[0]


def test_what_cannot_be_done_is_refused_with_its_reason(world: Path, blend: Any, prompts: Path) -> None:
    log = world / "refused.log"
    job = functools.partial(train, world, blend, "refused", prompts, processes=2, pipeline_model_parallel_size=2)
    assert jobs.run(job, 2, log=log) == 2
    assert "cannot ask a model with pipeline_model_parallel_size 2" in log.read_text()


def test_an_evaluation_of_the_run_reads_what_it_validated_on(world: Path, asked: str, tmp_path: Path) -> None:
    """Named nothing: the sets that the run validated on, and the loss is the training's own."""
    given = {"max_tokens": 2, "limit": 3, "device": "cpu", "quiet": True, "against": world / "base_hf"}
    found = evaluate(world / "runs" / asked, tmp_path, **given | {"limit": None}, prompts=[], losses=_validated(world))
    rows = {(row.group, row.measure): row for row in found.rows}
    measured = {line["step"]: line for line in read_metrics(world / "runs" / asked) if "val_loss_ja" in line}
    for name in ("ja", "en"):
        row = rows[name, "loss, nats per token"]
        assert row.before == pytest.approx(measured[0][f"val_loss_{name}"], abs=1e-4)
        assert row.after == pytest.approx(measured[4][f"val_loss_{name}"], abs=1e-4)
        assert "as in the training" in rows[name, "bits per byte"].note
    default = evaluate(world / "runs" / asked, tmp_path / "default", **given)
    assert {row.group for row in default.rows} == {"ja", "en", "ja (none)", "en (none)"}


def _validated(world: Path) -> list[str]:
    return [f"{name}={world}/ds/{name}_validation" for name in ("ja", "en")]


def test_the_series_over_a_runs_checkpoints(world: Path, asked: str, tmp_path: Path) -> None:
    found = evaluate(
        None, tmp_path, checkpoints_of=world / "runs" / asked, against=world / "base_hf", losses=_validated(world),
        device="cpu", quiet=True,
    )  # fmt: skip
    assert [each["step"] for each in found.models] == [0, 2, 4]
    (line,) = (each for each in found.series if (each["group"], each["measure"]) == ("ja", "bits per byte"))
    row = next(row for row in found.rows if (row.group, row.measure) == ("ja", "bits per byte"))
    assert line["steps"] == [0, 2, 4]
    assert (line["values"][0], line["values"][-1]) == (row.before, row.after)
    for path in report.write(found, tmp_path):
        assert path.stat().st_size
    assert "Over the steps" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize("numbers", [{"every": 0}, {"limit": 0}, {"max_tokens": 0}])
def test_numbers_that_cannot_be(numbers: dict[str, int]) -> None:
    with pytest.raises(CptError, match="have to be 1 or more"):
        EvaluateReplies(**numbers)
