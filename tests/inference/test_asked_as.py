"""Named chat templates, exports whose replies would go wrong, and the checkpoints of a run that is going on."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_cpt.checkpoint import import_hf
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.candidates import Candidate, warnings_of
from nemo_cpt.inference import Sampling, models
from nemo_cpt.inference.asked_as import reply_warnings
from nemo_cpt.inference.models import find_model, open_transformers

HELLO = [{"role": "user", "content": "京都とは?"}]


@pytest.fixture
def broken(make_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of an export with other ends, and perhaps without its template."""

    def make(ends: Any, template: bool = True) -> Path:
        folder = tmp_path / "export"
        shutil.copytree(make_model("llama"), folder)
        for settings in (folder / "generation_config.json", folder / "config.json"):
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": ends}))
        if not template:
            (folder / "chat_template.jinja").unlink()
        return folder

    return make


@pytest.mark.parametrize(
    ("ends", "template", "says"),
    [
        ([1, 2], True, None),
        (2, True, r"answers of its chat template end with <eos> \(1\), and eos_token_id in .* is 2"),
        (1, False, None),  # a base model
        (3, False, r"texts of its tokenizer end with <eos> \(1\)"),
        (2, False, r"ends replies at <end>, as chat templates write it, and has no chat template"),
        (None, True, "names no eos_token_id"),
    ],
)
def test_a_broken_export_is_seen(
    broken: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, ends: Any, template: bool, says: str | None
) -> None:
    folder = broken(ends, template)
    monkeypatch.setattr("nemo_cpt.inference.asked_as.TURN_ENDS", ("<end>",))
    if says is None:
        assert reply_warnings(folder) == []
        return
    (warning,) = reply_warnings(folder)
    assert re.search(says, warning)
    said: list[str] = []
    open_transformers(folder, say=said.append)
    assert said == [f"warning: {warning}"]  # as chat and serve say it
    assert warning in warnings_of([Candidate("after", str(folder))])  # and evaluate, with its report


def test_a_named_template_and_where_its_replies_end(broken: Callable[..., Path], tmp_path: Path) -> None:
    folder = broken(1, template=False)
    engine = open_transformers(folder, template="alpaca-ja")
    assert "### 指示:\n京都とは?" in engine.tokenizer.decode(engine.encode(HELLO))
    assert engine.chat_stop == ("### 指示:",)
    assert engine.request(HELLO, Sampling(stop=("a",))).sampling.stop == ("a", "### 指示:")
    assert engine.request("text", Sampling(stop=("a",))).sampling.stop == ("a",)
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0]['content'] }}")
    assert open_transformers(folder, template=str(own)).chat_stop == ()
    with pytest.raises(CptError, match=r"there is no chat template alpaca-xx .* name one of alpaca-en"):
        open_transformers("nowhere", template="alpaca-xx")


@pytest.fixture
def run(make_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with two checkpoints, and one that is being written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for step, shape in ((20, "llama"), (40, "mistral_window"), (60, "llama")):
        import_hf(make_model(shape), tmp_path / "run" / "checkpoints" / f"model-step={step}-last")
    (tmp_path / "run" / "checkpoints" / "model-step=60-last-unfinished").touch()
    return tmp_path / "run"


def test_the_newest_complete_checkpoint_is_named_with_its_step(run: Path) -> None:
    said: list[str] = []
    found = find_model(run, say=said.append)
    assert found.name == f"{run} at step 40"
    assert said[0] == f"the newest complete checkpoint of {run} is model-step=40-last, step 40"
    assert json.loads((found.folder / "config.json").read_text())["model_type"] == "mistral"


def test_a_checkpoint_that_the_run_replaces_while_it_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run writes step 60 and thins out step 40 while that is exported: step 60 is taken."""
    checkpoints, export = run / "checkpoints", models.export_hf

    def goes_on(source: Path, *arguments: Any) -> Any:
        if "40" in source.name:
            (checkpoints / "model-step=60-last-unfinished").unlink()
            source.rename(checkpoints / ".removed-40")
        return export(source, *arguments)

    monkeypatch.setattr(models, "export_hf", goes_on)
    said: list[str] = []
    assert find_model(run, say=said.append).name == f"{run} at step 60"
    assert "the run has replaced model-step=40-last meanwhile" in said


def test_an_export_that_fails_for_another_reason_says_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise CptError("no room on the disk")

    monkeypatch.setattr(models, "export_hf", fail)
    with pytest.raises(CptError, match="no room on the disk"):
        find_model(run)


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CptError, match="is a run that has no complete checkpoint yet"):
        find_model(tmp_path)
