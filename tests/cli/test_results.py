"""`nemo-cpt ls` and `rm`: what runs have left, and thinning them out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cpt import CptError
from nemo_cpt.checkpoint import import_hf
from nemo_cpt.launching import results
from nemo_cpt.training.metrics import append_metrics
from tests.support import small_models
from tests.support.executor_jobs import held_by_another_process

LOSSES = {0: 9.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 4.5}  # by step: the best one is not the newest


def nemo_cpt(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemo_cpt.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    import_hf(small_models.make("llama31", folder / "hf"), folder / "nemo")
    return folder / "nemo"


@pytest.fixture
def world(tmp_path: Path, checkpoint: Path) -> Path:
    """A folder with `results/ja`, of which steps 2, 4, 6 and 8 of 10 were saved, and `results/en`, with none."""
    folder = tmp_path / "results" / "ja"
    for step, loss in LOSSES.items():
        append_metrics(folder, {"step": step, "val_loss_ja": loss, "val_loss_en": loss / 2})
        if step:
            saved = folder / "checkpoints" / f"steps={step}-val_loss={loss:.4f}"
            shutil.copytree(checkpoint, saved)
            record = {"step": step, "settings": {"schedule": {"max_steps": 10}}}
            (saved / "run.json").write_text(json.dumps(record))
    append_metrics(folder, {"step": 9, "reduced_train_loss": 4.0})
    (folder / "checkpoints" / "steps=8-val_loss=4.5000-last").symlink_to("steps=8-val_loss=4.5000")
    append_metrics(tmp_path / "results" / "en", {"step": 0, "val_loss_en": 3.0})
    return tmp_path


def steps(world: Path) -> list[int]:
    return [each.step for each, _ in results.every_checkpoint(results.run("ja", world / "results"))]


def test_runs_are_listed(world: Path) -> None:
    en, ja = json.loads(nemo_cpt("ls", "--json", cwd=world).stdout)["runs"]
    assert (ja["state"], ja["step"], ja["max_steps"], ja["newest"]) == ("stopped", 8, 10, "steps=8-val_loss=4.5000")
    assert ja["masks"] == en["masks"] == []
    assert (ja["first_losses"], ja["losses"]) == ({"ja": 9.0, "en": 4.5}, {"ja": 4.5, "en": 2.25})
    assert ja["size"] == sum(path.lstat().st_size for path in (world / "results/ja").rglob("*") if not path.is_dir())
    assert (en["state"], en["step"], en["max_steps"], en["newest"]) == ("nothing saved", 0, None, None)
    printed = nemo_cpt("ls", cwd=world).stdout
    assert "ja\tstopped\t8 of 10\tja 9.0000 -> 4.5000, en 4.5000 -> 2.2500" in printed


def test_losses_that_a_run_masked_are_told_from_others(world: Path) -> None:
    path = world / "results/ja/checkpoints/steps=8-val_loss=4.5000/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": {"data": {"eod_mask_loss": True}}}))
    listed = nemo_cpt("ls", cwd=world)
    said = "ja: its losses are masked, what follows a document's end is not counted (eod_mask_loss)"
    assert said in listed.stderr
    assert listed.stderr.count("masked") == 1


def test_a_run_is_running_while_a_job_holds_it_and_finished_at_max_steps(world: Path) -> None:
    folder = world / "results/ja"
    with held_by_another_process(folder):
        assert (results.Run(folder).state, results.Run(folder).step) == ("running", 9)  # the one measured last
    newest = folder / "checkpoints/steps=8-val_loss=4.5000/run.json"
    newest.write_text(newest.read_text().replace('"max_steps": 10', '"max_steps": 8'))
    assert results.Run(folder).state == "finished"
    (folder / "metrics/run.json").write_text('{"max_steps": 20}')  # it was started again, to train on
    assert (results.Run(folder).state, results.Run(folder).max_steps) == ("stopped", 20)


def test_checkpoints_of_a_run_are_listed(world: Path) -> None:
    folder = world / "results/ja/checkpoints"
    os.truncate(next((folder / "steps=6-val_loss=4.0000/weights").glob("*.distcp")), 10)
    (folder / "steps=4-val_loss=3.0000-unfinished").touch()
    (folder / "damaged").mkdir()
    (folder / "steps=2-val_loss=5.0000").rename(folder / "damaged/steps=2-val_loss=5.0000-abc")
    for name in ("ja", "results/ja"):
        found = json.loads(nemo_cpt("ls", name, "--json", cwd=world).stdout)["checkpoints"]
        states = {each["step"]: each["state"] for each in found}
        assert "holds 10 of at least" in states.pop(6)
        assert states == {8: "whole", 4: "unfinished", 2: "set aside as damaged"}
        assert [each["step"] for each in found if each["newest"]] == [8]
        assert found[0]["links"] == ["steps=8-val_loss=4.5000-last"]
        assert found[0]["losses"] == {"ja": 4.5, "en": 2.25}


def test_thinning_lists_first_and_keeps_the_newest_and_the_best(world: Path) -> None:
    listed = nemo_cpt("rm", "ja", "--keep", "2", cwd=world)
    assert "steps=2-val_loss" in listed.stdout
    assert "would go; --yes removes it" in listed.stdout
    assert steps(world) == [8, 6, 4, 2]
    done = nemo_cpt("rm", "ja", "--keep", "2", "--yes", cwd=world)
    assert done.returncode == 0, done.stderr
    assert steps(world) == [8, 4]
    assert nemo_cpt("rm", "ja", "--keep", "2", "--yes", cwd=world).stdout.endswith("nothing to remove\n")
    assert nemo_cpt("rm", "ja", "--keep", "1", "--yes", cwd=world).returncode == 0
    assert steps(world) == [8]
    left = sorted(path.name for path in (world / "results/ja/checkpoints").iterdir())
    assert left == ["steps=8-val_loss=4.5000", "steps=8-val_loss=4.5000-last"]


def test_losses_of_other_samples_make_no_checkpoint_the_best(world: Path) -> None:
    run = results.run("ja", world / "results")
    for each, _ in results.every_checkpoint(run):
        record = each.record | {"settings": {"validation": {"batches": {"ja": 1 + (each.step > 4)}}}}
        (each.path / "run.json").write_text(json.dumps(record))
    run = results.run("ja", world / "results")
    assert [each.step for each in run.best_first(each for each, _ in results.every_checkpoint(run))] == [6, 8, 4, 2]


def test_a_loss_that_was_no_number_is_told_and_is_nobodys_best(world: Path) -> None:
    folder = world / "results/ja"
    append_metrics(folder, {"step": 6, "val_loss_ja": None, "val_loss_en": 2.0})  # None was NaN
    append_metrics(folder, {"step": 9, "val_loss_ja": None, "val_loss_en": 2.5})
    (folder / "checkpoints/steps=6-val_loss=4.0000").rename(folder / "checkpoints/steps=6-val_loss=nan")
    run = results.run("ja", world / "results")
    assert [each.step for each in run.best_first(each for each, _ in results.every_checkpoint(run))] == [4, 8, 2, 6]
    assert "ja 9.0000 -> nan, en 4.5000 -> 2.5000" in nemo_cpt("ls", cwd=world).stdout
    listed = nemo_cpt("ls", "--json", cwd=world).stdout
    assert json.loads(listed, parse_constant=pytest.fail)["runs"][1]["losses"] == {"ja": None, "en": 2.5}


def test_the_newest_whole_one_stays_where_a_newer_one_is_damaged(world: Path) -> None:
    folder = world / "results/ja/checkpoints"
    os.truncate(next((folder / "steps=8-val_loss=4.5000/weights").glob("*.distcp")), 10)
    (folder / "steps=2-val_loss=5.0000-unfinished").touch()
    assert nemo_cpt("rm", "ja", "--keep", "1", "--yes", cwd=world).returncode == 0
    assert [path.name for path in folder.iterdir()] == ["steps=6-val_loss=4.0000"]  # nor the link or the marker


def test_the_export_of_a_run_is_that_of_its_newest_whole_checkpoint(world: Path) -> None:
    os.truncate(next((world / "results/ja/checkpoints/steps=8-val_loss=4.5000/weights").glob("*.distcp")), 10)
    done = nemo_cpt("export", "results/ja", "out", cwd=world)
    assert done.returncode == 0, done.stderr
    chosen = "results/ja/checkpoints/steps=6-val_loss=4.0000"
    assert f"the newest whole checkpoint of results/ja is {chosen}\n" in done.stderr
    assert (world / "out/config.json").is_file()
    done = nemo_cpt("export", "results/en", "other", cwd=world)
    assert (done.returncode, "is a run without a whole checkpoint" in done.stderr) == (2, True)


def test_what_is_in_use_stays(world: Path, checkpoint: Path) -> None:
    run = results.run("ja", world / "results")
    with held_by_another_process(run.folder), pytest.raises(CptError, match="is in use by process"):
        results.remove(run, 1)
    adapters = world / "results/lora/checkpoints/steps=1/weights"
    adapters.mkdir(parents=True)
    (adapters / "adapter_metadata.json").write_text(
        json.dumps({"model_ckpt_path": str(run.folder / "checkpoints/steps=4-val_loss=3.0000")})
    )
    with pytest.raises(CptError, match=r"steps=4-val_loss=3.0000 is the base of .*lora"):
        results.remove(run, 1)
    assert steps(world) == [8, 6, 4, 2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ls", "jaa"], "there is no run 'jaa' in results; near: ja"),
        (["ls", "home"], "home holds no run: a run's folder has checkpoints or metrics in it\n"),
        (["ls", "results"], "it is a folder of runs: name one of en, ja with --directory results"),
        (["ls", "-d", "nowhere"], "there is no folder nowhere with runs"),
        (["ls", "-d", "results/ja"], "is one itself, `nemo-cpt ls results/ja`"),
        (["rm", "ja", "--keep", "0"], "--keep 0: give 1 or more"),
        (["rm", "en", "--keep", "1", "--yes"], "has no whole checkpoint: nothing of it is removed"),
    ],
)
def test_bad_input(world: Path, arguments: list[str], says: str) -> None:
    (world / "home").mkdir()
    done = nemo_cpt(*arguments, cwd=world)
    assert done.returncode == 2
    assert says in done.stderr


def test_listing_imports_neither_torch_nor_nemo(world: Path) -> None:
    code = (
        "import sys; sys.argv = ['nemo-cpt', *sys.argv[1:]]\nimport atexit\n"
        "atexit.register(lambda: print([m for m in ('torch', 'nemo', 'nemo_run') if m in sys.modules]))\n"
        "from nemo_cpt.cli import main; main()"
    )
    environ = os.environ | {"NEMORUN_HOME": str(world / "home")}
    for arguments in (["ls"], ["ls", "ja"], ["rm", "ja", "--keep", "1", "--yes"], ["status"], ["logs"]):
        command = [sys.executable, "-c", code, *arguments]
        printed = subprocess.run(command, capture_output=True, text=True, cwd=world, env=environ).stdout
        assert printed.rstrip().endswith("[]"), arguments
