"""`nemo-cpt workflow`, in this process."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from nemo_cpt import CptError
from nemo_cpt.cli import app, workflow  # noqa: F401  which registers the command
from nemo_cpt.workflow import Workflow, as_yaml, train
from tests.workflow.conftest import chain


def command(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["workflow", *arguments])
    if isinstance(result.exception, CptError):
        raise result.exception
    return result


@pytest.fixture
def file(folder: Path) -> str:
    (folder / "w.yaml").write_text(as_yaml(chain(folder)))
    return str(folder / "w.yaml")


def test_it_is_looked_at_run_and_compared(file: str, folder: Path) -> None:
    assert "one\tfunctions.py:join\twould run\tnew\t?\t?\t?" in command(file, "--dry-run").stdout
    assert "4/4 four: done in" in command("--until", "four", file).stdout
    assert "Every step is done." in command("run", file, "--dry-run").stdout
    record = json.loads(command(file, "--json").stdout)
    assert {step["state"] for step in record["steps"].values()} == {"done"}
    assert command("compare", file, str(folder / "light.workflow")).stdout == "nothing differs\n"
    other = folder / "other.json"
    other.write_text(json.dumps(record | {"versions": {**record["versions"], "torch": "1"}}))
    assert command("compare", file, str(other), "--json").stdout.count('"version of torch"') == 1


def test_a_kind_is_written_to_edit(tmp_path: Path) -> None:
    assert "nemo-cpt workflow" in command("new", "demo", str(tmp_path / "demo.yaml")).stdout
    shown = command(str(tmp_path / "demo.yaml"), "--dry-run", "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["steps"]["train"]["why"] == "new"


def test_a_dry_run_of_what_would_be_refused_ends_with_3(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    step = train("train", recipe="tiny.continual_pretrain", base="base", data="en", max_steps=2)
    for ending in (".bin", ".idx"):
        (tmp_path / f"en{ending}").touch()
    (tmp_path / "w.yaml").write_text(as_yaml(Workflow("w", [step])))
    shown = command(str(tmp_path / "w.yaml"), "--dry-run")
    assert shown.exit_code == 3
    assert "error: train: base: " in shown.stdout
    assert "It would be refused" in shown.stdout
    assert command(str(tmp_path / "w.yaml"), "--dry-run", "--force").exit_code == 0
    with pytest.raises(CptError, match=r"w is not run \(--force runs it all the same\):\n  train: base: "):
        command(str(tmp_path / "w.yaml"))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["max_steps=3"], "a step's parameters stand in the file"),
        (["executor.time=1"], "is for an --executor, and the steps run here"),
        (["--executor", "slurn"], "there is no executor 'slurn'"),
        (["--executor", "docker"], "jobs on docker see other files than this machine"),
        (["--detach"], "--detach is for jobs on an --executor"),
    ],
)
def test_what_would_do_nothing_is_refused(file: str, folder: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(CptError, match=said):
        command(file, *arguments)
    assert not (folder / "one.txt").exists()
