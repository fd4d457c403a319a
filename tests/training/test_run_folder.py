"""Which checkpoint of a run counts, and what happens to those that do not."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nemo_run as run
import pytest
from nemo.collections.llm.peft import LoRA

from nemo_cpt.catalog.build import build_recipe
from nemo_cpt.checkpoint.weights_digest import BASE_WEIGHTS, weights_digest
from nemo_cpt.corpus import Blend
from nemo_cpt.doctor import Examination, Place, inputs
from nemo_cpt.doctor.built import job_of
from nemo_cpt.errors import CptError
from nemo_cpt.launching.task import nothing_to_train
from nemo_cpt.training.checkpoints import RunCheckpoint
from nemo_cpt.training.metrics import append_metrics, read_metrics
from nemo_cpt.training.run_folder import (
    DUE,
    EXPORTED,
    EXPORTS,
    STARTS,
    Checkpoint,
    based_on,
    checkpoints,
    damaged_since,
    finished,
    newest_whole,
)
from tests.support.interruptions import Runs, Setting

DAMAGES = {
    "cut": lambda path: os.truncate(path / "weights/__0_1.distcp", 1000),
    "deleted": lambda path: (path / "weights/__0_0.distcp").unlink(),
    "metadata emptied": lambda path: (path / "weights/.metadata").write_bytes(b""),
    "metadata deleted": lambda path: (path / "weights/.metadata").unlink(),
    "no metadata.json": lambda path: (path / "weights/metadata.json").unlink(),
    "metadata.json cut": lambda path: (path / "weights/metadata.json").write_text('{"shar'),
    "common.pt cut": lambda path: os.truncate(path / "weights/common.pt", 2000),
}


@pytest.fixture(scope="module")
def runs(world: Path, blend: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(world, blend, tmp_path_factory.mktemp("folder"))
    assert made.start("whole", Setting()) == 0, made.log("whole").read_text()[-3000:]
    return made


@pytest.fixture
def folder(runs: Runs, tmp_path: Path) -> Path:
    """A copy of a run's checkpoints, of steps 3, 6 and 8."""
    return Path(shutil.copytree(runs.folder / "whole/checkpoints", tmp_path / "run/checkpoints", symlinks=True))


def of_step(folder: Path, step: int) -> Path:
    (found,) = (each.path for each in checkpoints(folder) if each.step == step)
    return found


def test_links_and_unfinished_ones_do_not_count(folder: Path) -> None:
    assert [each.step for each in checkpoints(folder)] == [8, 6, 3]
    of_step(folder, 8).with_name(of_step(folder, 8).name + "-unfinished").touch()
    assert [each.step for each in checkpoints(folder)] == [6, 3]
    assert damaged_since(folder) == []  # it was being written when its run was killed, which is no damage


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_and_its_fault_named(folder: Path, damage: str) -> None:
    DAMAGES[damage](of_step(folder, 8))
    assert newest_whole(folder).step == 6
    (found,) = damaged_since(folder)
    assert found.step == 8
    assert str(found.path) in found.fault


def test_the_newest_is_the_one_of_the_highest_step_whatever_its_time(folder: Path) -> None:
    for step, stamp in ((8, 100), (6, 300), (3, 200)):
        for path in (of_step(folder, step), *of_step(folder, step).rglob("*")):
            os.utime(path, (stamp, stamp))
    assert newest_whole(folder).step == 8
    renamed = of_step(folder, 3).rename(folder / "best")  # a name that does not say
    assert Checkpoint(renamed).step == 3
    (renamed / "run.json").unlink()
    assert Checkpoint(renamed).step == -1


def test_a_run_of_an_older_version_says_its_step_by_its_name(folder: Path) -> None:
    for each in checkpoints(folder):
        (each.path / "run.json").unlink()
    assert [each.step for each in checkpoints(folder)] == [8, 6, 3]


def kept_of_a_previous_run(folder: Path, save_top_k: int) -> dict[int, float]:
    """Step and loss of what the `save_top_k` best are taken from when a run is resumed."""
    checkpoint = RunCheckpoint(dirpath=folder, monitor="val_loss", mode="min", save_top_k=save_top_k)
    checkpoint.nemo_topk_check_previous_run()
    found = {Checkpoint(Path(path)).step: float(value) for path, value in checkpoint.best_k_models.items()}
    if len(found) == save_top_k:
        worst = max(found, key=found.__getitem__)
        assert Checkpoint(Path(checkpoint.kth_best_model_path)).step == worst
        assert float(checkpoint.kth_value) == pytest.approx(found[worst])
    return found


def test_a_resumed_run_keeps_the_best_by_their_own_names(tmp_path: Path, folder: Path) -> None:
    moved = folder.rename(tmp_path / "val_loss=0.1")  # where NeMo would look for the value
    assert sorted(kept_of_a_previous_run(moved, 2)) == [6, 8]
    assert [each.step for each in checkpoints(moved)] == [8, 6]


def test_a_run_that_validates_on_other_samples_lets_its_earlier_checkpoints_go_first(folder: Path) -> None:
    """Whatever their losses were, and in each of its later starts: the worst of them first, then those of its own."""
    now = of_step(folder, 3)
    record = json.loads((now / "run.json").read_bytes())
    record["settings"]["validation"]["batches"] = {"ja": 2, "en": 2}
    (now / "run.json").write_text(json.dumps(record))
    checkpoint = RunCheckpoint(dirpath=folder, monitor="val_loss", mode="min", save_top_k=3)
    checkpoint.nemo_topk_check_previous_run()
    losses = {Checkpoint(Path(path)).step: float(loss) for path, loss in checkpoint.best_k_models.items()}
    checkpoint._rank_last_unless_validated_on(record["settings"]["validation"])
    found = {Checkpoint(Path(path)).step: float(loss) for path, loss in checkpoint.best_k_models.items()}
    assert found[3] == losses[3] < 1e5 < min(found[6], found[8])
    worst = max((6, 8), key=losses.__getitem__)
    assert Checkpoint(Path(checkpoint.kth_best_model_path)).step == worst
    assert float(checkpoint.kth_value) == found[worst]


def test_a_resumed_run_thins_no_copy_that_somebody_put_beside_its_own(folder: Path) -> None:
    own = of_step(folder, 3)
    copies = [shutil.copytree(own, own.with_name(own.name + end)) for end in ("-copy", ".old")]
    assert sorted(kept_of_a_previous_run(folder, 2)) == [6, 8]
    assert all(copy.is_dir() for copy in copies)


def test_a_checkpoint_that_adapters_were_trained_on_is_not_thinned(folder: Path, capsys: Any) -> None:
    base = of_step(folder, 3)
    lora = folder.parents[1] / "lora/checkpoints/steps=2"
    (lora / "weights").mkdir(parents=True)
    (lora / "weights/adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": f"/elsewhere/{base}-last"}))
    (lora / "run.json").write_text(json.dumps({"step": 2, BASE_WEIGHTS: weights_digest(base)}))
    assert kept_of_a_previous_run(folder, 2).keys() == {6, 8}
    checkpoint = RunCheckpoint(dirpath=folder, save_top_k=2)
    checkpoint.async_save = False
    for step in (3, 6):
        checkpoint._remove_checkpoint(SimpleNamespace(is_global_zero=True), str(of_step(folder, step)), True)
    assert [each.step for each in checkpoints(folder)] == [8, 3]
    assert f"{base.name} is kept beyond save_top_k: it is the base of {lora.parents[1]}" in capsys.readouterr().out


def test_nor_one_that_adapters_are_trained_on_that_are_not_saved_yet(folder: Path) -> None:
    base, starts = of_step(folder, 3), folder.parents[1] / "lora" / STARTS
    for peft, user in (("LoRA", starts.parents[1]), (None, None)):  # who trains every weight has read its base
        append_metrics(starts.parents[1], {"base": str(base), "settings": {"adapters": {"peft": peft}}}, STARTS)
        with starts.open("a") as file:
            file.write('{"base": "')  # of a start that a full disk cut off
        assert based_on(base, folder.parents[1]) == user


def test_a_resumed_run_keeps_the_newest_although_it_is_the_worst(folder: Path) -> None:
    newest = of_step(folder, 8)
    newest.rename(newest.with_name("steps=8-val_loss=9.5000"))
    assert sorted(kept_of_a_previous_run(folder, 2)) == [3, 6]
    assert [each.step for each in checkpoints(folder)] == [8, 6, 3]
    assert sorted(kept_of_a_previous_run(folder, 1)) == [6]
    assert [each.step for each in checkpoints(folder)] == [8, 6]


def test_finished(folder: Path) -> None:
    assert "has step 8 of max_steps 8" in finished(folder, 8)
    assert finished(folder, 9) is None
    assert finished(folder, -1) is None  # without a limit
    record = of_step(folder, 8) / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"validation_pending": True}))
    assert finished(folder, 8) is None
    assert finished(folder / "nothing", 8) is None


def test_a_run_that_owes_an_export_is_not_finished(folder: Path) -> None:
    link = folder.with_name(EXPORTS) / f"{EXPORTED}8"
    link.mkdir(parents=True)
    assert finished(folder, 8) is None
    link.rename(link.with_name(f"{DUE}8"))
    assert finished(folder, 8) is None
    assert finished(folder, 8, exporting=False)  # a start without export_every makes none
    link.with_name(f"{DUE}8").rename(link.with_name("step-8"))
    assert "has step 8 of max_steps 8" in finished(folder, 8)


def test_a_finished_run_hears_of_a_misspelt_field(folder: Path, world: Path, blend: Any) -> None:
    given = {"base": str(world / "base"), "data": blend, "max_steps": 8, "val_check_interval": 3}
    given |= {"directory": str(folder.parent.parent), "name": folder.parent.name, "global_batch_size": 8}
    said = nothing_to_train("tiny.continual_pretrain", given, ["trainer.log_every_n_steps=5"])
    assert said.endswith(
        "give a larger max_steps, and extend=rewarm, stretch or keep: what becomes of the learning rate"
    )
    # It made none, and a finished run makes none.
    exported = nothing_to_train("tiny.continual_pretrain", given | {"save_every": 3, "export_every": 3}, [])
    assert exported.endswith(
        "it exported nothing while it trained: `nemo-cpt export` makes its checkpoints' exports now"
    )
    with pytest.raises(CptError, match=r"optim.config.lrr: OptimizerConfig has no field lrr; near: lr"):
        nothing_to_train("tiny.continual_pretrain", given, ["optim.config.lrr=1"])


def test_a_finished_run_is_not_taken_for_one_that_trained_otherwise(
    folder: Path, world: Path, blend: Any, tmp_path: Path
) -> None:
    given = {"base": str(world / "base"), "data": blend, "max_steps": 8, "val_check_interval": 3, "seq_length": 64}
    given |= {"directory": str(folder.parent.parent), "name": folder.parent.name, "global_batch_size": 8}
    moved = shutil.copytree(world / "ds", tmp_path / "elsewhere")
    copied = Blend({str(moved / Path(prefix).name): share for prefix, share in blend.train.items()})
    # Of what decides the weights nothing is different: where the data are, how they are validated, fewer steps.
    for same in ({}, {"data": copied}, {"val_check_interval": 2, "micro_batch_size": 2}, {"max_steps": 5}):
        assert "the run is finished" in nothing_to_train("tiny.continual_pretrain", given | same, [])
    for other, words in (
        ({"lr": 5e-3}, r"lr 0.001 -> 0.005 .*another name="),
        ({"seed": 7}, "seed 1234 -> 7"),
        ({"global_batch_size": 4}, "global_batch_size 8 -> 4"),
        ({"data": Blend(dict.fromkeys(blend.train, 1.0))}, r"train \[\[0.75, 'ja_train:"),
    ):
        with pytest.raises(CptError, match=f"is finished, and was trained otherwise than this asks for: {words}"):
            nothing_to_train("tiny.continual_pretrain", given | other, [])
    with pytest.raises(CptError, match=r"lr 0\.001 -> 0\.02"):
        nothing_to_train("tiny.continual_pretrain", given, ["optim.config.lr=0.02"])


def test_a_run_that_cannot_go_on_so_is_refused_before_it_is_launched(folder: Path, world: Path, blend: Any) -> None:
    given = {"base": str(world / "base"), "data": blend, "max_steps": 12, "val_check_interval": 3, "seq_length": 64}
    given |= {"directory": str(folder.parent.parent), "name": folder.parent.name, "global_batch_size": 8}
    for other, words in (
        ({}, r"max_steps 8 -> 12\. Say what becomes of the learning rate: extend=rewarm"),
        ({"extend": "keep", "seq_length": 32}, "seq_length 64 -> 32"),
        ({"extend": "keep", "data": Blend(dict.fromkeys(blend.train, 1.0))}, r"train \[\[0.75, 'ja_train:"),
    ):
        with pytest.raises(CptError, match=f"started otherwise than it is resumed at step 8: {words}"):
            nothing_to_train("tiny.continual_pretrain", given | other, [])
    for fine in ({"extend": "rewarm", "lr": 5e-3}, {"extend": "keep", "micro_batch_size": 2, "val_check_interval": 5}):
        assert nothing_to_train("tiny.continual_pretrain", given | fine, []) == ""
    assert nothing_to_train("tiny.continual_pretrain", given, ["resume.extend=stretch"]) == ""


def _of_another_machine() -> None:
    raise TypeError("'>=' not supported between instances of 'NoneType' and 'Version'")


def _of_the_users_own(model: Any, data: Any, trainer: Any, log: Any, resume: Any) -> None:
    """A training that may change what it is given before it trains."""


def test_python_hears_so_before_it_launches(folder: Path, world: Path, blend: Any) -> None:
    given = {"base": str(world / "base"), "data": blend, "max_steps": 8, "val_check_interval": 3, "seq_length": 64}
    given |= {"directory": str(folder.parent.parent), "name": folder.parent.name, "global_batch_size": 8}

    def look(**changes: Any) -> Any:
        recipe = build_recipe("tiny.continual_pretrain", given | changes)
        return inputs.run_folder(Examination(job_of(recipe, Place())))

    # Of a real run's record nothing is different, also of what only the built recipe knows.
    assert look().found.startswith("the run is finished: ")
    assert look(max_steps=12, extend="keep", micro_batch_size=2).state == "ok"
    adam = build_recipe("tiny.continual_pretrain", given | {"max_steps": 12, "extend": "keep"})
    adam.optim.config.adam_beta2 = 0.9
    for found, words in (
        (look(lr=5e-3), "was trained otherwise than this asks for: lr 0.001 -> 0.005, min_lr"),
        (look(max_steps=12), "at step 8: max_steps 8 -> 12, warmup_steps 0 -> 1; Say what becomes of"),
        (look(max_steps=12, extend="keep", seed=7), "at step 8: seed 1234 -> 7; Its checkpoints hold"),
        (inputs.run_folder(Examination(job_of(adam, Place()))), "at step 8: adam_beta2 "),
    ):
        assert (found.state, words in str(found)) == ("error", True), str(found)
    # The model's own optimizer and adapters are compared as the job records them, or not at all.
    of_model = build_recipe("tiny.continual_pretrain", given)
    of_model.model.optim, of_model.optim = of_model.optim, None
    assert inputs.run_folder(Examination(job_of(of_model, Place()))).found.startswith("the run is finished: ")
    del of_model.model.optim
    assert inputs.run_folder(Examination(job_of(of_model, Place()))).found.startswith("the run is finished: ")
    of_model.model.model_transform = run.Config(LoRA, dim=8)
    assert "peft None -> LoRA" in str(inputs.run_folder(Examination(job_of(of_model, Place()))))
    elsewhere = build_recipe("tiny.continual_pretrain", given | {"lr": 5e-3})
    elsewhere.optim = run.Config(_of_another_machine)
    assert inputs.run_folder(Examination(job_of(elsewhere, Place()))).found.startswith("the run is finished: ")
    parts = {name: getattr(adam, name) for name in ("model", "data", "trainer", "log", "resume")}
    assert job_of(run.Partial(_of_the_users_own, **parts), Place()).deciding is None
    moved = build_recipe("tiny.continual_pretrain", given | {"lr": 5e-3})
    moved.log.ckpt.dirpath = "elsewhere"
    assert job_of(moved, Place()).deciding is None


def test_a_run_goes_on_from_the_newest_whole_one_and_says_so(runs: Runs) -> None:
    name = "damaged"
    shutil.copytree(runs.folder / "whole", runs.folder / name, symlinks=True)
    DAMAGES["cut"](of_step(runs.folder / name / "checkpoints", 8))
    assert runs.start(name, Setting()) == 0, runs.log(name).read_text()[-3000:]
    said = runs.log(name).read_text()
    assert "weights/__0_1.distcp holds 1000 of at least" in said
    assert "resuming from steps=6" in said
    aside = runs.folder / name / "checkpoints" / "damaged"
    assert [path.name[:8] for path in aside.iterdir()] == ["steps=8-"]
    shutil.rmtree(aside)
    assert runs.differences(name, "whole") == []


def test_without_a_whole_one_it_does_not_begin_anew_by_itself(runs: Runs) -> None:
    name = "all_damaged"
    shutil.copytree(runs.folder / "whole", runs.folder / name, symlinks=True)
    for each in checkpoints(runs.folder / name / "checkpoints"):
        DAMAGES["deleted"](each.path)
    before = runs.left(name)
    assert runs.start(name, Setting()) == 2
    said = runs.log(name).read_text()
    assert "no checkpoint of this run" in said
    assert "Copy one of them again; to train anew from the base instead, remove" in said
    assert runs.left(name) == before


def test_a_finished_run_is_left_alone(runs: Runs) -> None:
    def contents() -> dict[str, float]:
        return {str(path): path.lstat().st_mtime for path in (runs.folder / "whole").rglob("*")}

    before = contents()
    assert runs.start("whole", Setting()) == 0
    assert "the run is finished" in runs.log("whole").read_text()
    assert runs.start("whole", Setting(), lr=5e-3) == 2
    assert "was trained otherwise than this asks for: lr 0.001 -> 0.005, min_lr 0.0001 -> 0.0005" in (
        runs.log("whole").read_text()
    )
    assert contents() == before


def test_a_run_that_validates_on_other_samples_compares_no_more_with_its_earlier_losses(runs: Runs) -> None:
    name = "otherwise"
    shutil.copytree(runs.folder / "whole", runs.folder / name, symlinks=True)
    for step in (6, 8):
        shutil.rmtree(of_step(runs.folder / name / "checkpoints", step))
    assert runs.start(name, Setting(), limit_val_batches=2) == 0, runs.log(name).read_text()[-3000:]
    assert "losses of ja, en are of other samples, and not compared with those before" in runs.log(name).read_text()
    measured = read_metrics(runs.folder / name)
    assert [line["step"] for line in measured if "val_loss_ja" in line] == [6, 8]
    assert [line["step"] for line in measured if "reduced_train_loss" in line] == list(range(1, 9))
    one, other = (newest_whole(runs.folder / each / "checkpoints").record for each in ("whole", name))
    assert one["settings"]["validation"]["batches"] == {"ja": 1, "en": 1}
    assert other["settings"]["validation"]["batches"] == {"ja": 2, "en": 2}
    assert one["base_weights"] == other["base_weights"] == weights_digest(runs.world / "base")


@pytest.mark.parametrize(
    ("name", "changes", "kept"),
    [
        ("no_validation", {"validation": {}}, ["steps=3", "steps=6", "steps=8", "steps=8-last -> steps=8"]),
        ("limit_0", {"limit_val_batches": 0}, ["steps=3", "steps=6", "steps=8", "steps=8-last -> steps=8"]),
        (
            "every_2",
            {"validation": {}, "save_every": 2},
            ["steps=4", "steps=6", "steps=8", "steps=8-last -> steps=8"],
        ),
    ],
)
def test_checkpoints_without_validation(runs: Runs, name: str, changes: dict, kept: list[str]) -> None:
    assert runs.start(name, Setting(), **changes) == 0, runs.log(name).read_text()[-3000:]
    assert runs.left(name)["checkpoints"] == kept


def test_an_interval_beyond_the_end_validates_at_the_end(runs: Runs) -> None:
    assert runs.start("beyond", Setting(), max_steps=3, val_check_interval=15) == 0
    assert "val_check_interval 15 is above max_steps 3: validating and saving once, at the end" in (
        runs.log("beyond").read_text()
    )
    assert [step for step, _ in runs.left("beyond")["validations"]] == [0, 3]
    assert len(runs.left("beyond")["checkpoints"]) == 2  # and the link to it
