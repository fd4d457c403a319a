"""DoRA with trained embeddings: stopped, resumed, exported, merged, and a base of the next training."""

import functools
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

from nemo_cpt.checkpoint import export_hf, import_hf
from nemo_cpt.checkpoint.chat_template import instruction_template
from nemo_cpt.compatibility import check_resumed
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.bits_per_byte import sequences_loss
from nemo_cpt.inference.transformers_engine import TransformersEngine
from nemo_cpt.recipes import continual, tiny
from nemo_cpt.training.callbacks import StopAtStep
from nemo_cpt.training.data import BlendDataModule
from nemo_cpt.training.guards import check
from nemo_cpt.training.metrics import read_metrics
from nemo_cpt.training.run_folder import newest_whole
from tests.training import jobs

STEPS = 16  # enough that the next training does not begin with a loss near that of random weights
TEMPLATE = {"name": "mine", "sha256": "0", "stop": ["<eos>", 1], "tokens": {"<eos>": 1}, "text": "{{ messages }}"}


class TunedDataModule(BlendDataModule):
    """Stands for a data module of conversations: it says which template they were prepared with."""

    template = TEMPLATE


def recipe_of(world: Path, blend: Any, base: Path, name: str, **changes: Any) -> run.Partial:
    settings = {"seq_length": 64, "global_batch_size": 8, "max_steps": STEPS, "val_check_interval": 8} | changes
    tokenizer = str(world / "base/hf")
    return tiny.continual_pretrain(
        str(base), blend, name=name, directory=str(world / "runs"), tokenizer=tokenizer, **settings
    )


def train_dora(world: Path, blend: Any, stop_at: int | None) -> None:
    recipe = recipe_of(world, blend, world / "base", "dora", lr=1e-2)
    recipe.model.config.recompute_granularity, recipe.model.config.recompute_method = "full", "block"
    recipe.model.config.recompute_num_layers = 3
    if stop_at:
        recipe.trainer.callbacks.append(run.Config(StopAtStep, step=stop_at))
    run.run(continual.with_lora(recipe, rank=8, embeddings_lr=5e-3, peft_scheme="dora"), direct=True)


def tune(world: Path, blend: Any) -> None:
    recipe = recipe_of(world, blend, world / "merged", "tuned", max_steps=2)
    recipe.data = run.Config(TunedDataModule, **recipe.data.__arguments__)
    run.run(recipe, direct=True)


def metrics(world: Path, name: str, key: str = "reduced_train_loss") -> dict[int, float]:
    return {line["step"]: line[key] for line in read_metrics(world / "runs" / name) if key in line}


def checkpoint_of(world: Path, name: str) -> Path:
    newest = newest_whole(world / "runs" / name / "checkpoints")
    assert newest is not None
    return newest.path


@pytest.fixture(scope="module")
def dora(world: Path, blend: Any) -> Path:
    """The last checkpoint of a run that was stopped in the middle and resumed."""
    for stop_at in (5, None):
        log = world / "dora.log"
        assert jobs.run(functools.partial(train_dora, world, blend, stop_at), log=log) == 0, log.read_text()[-3000:]
    return checkpoint_of(world, "dora")


def test_dora_trains_resumes_and_is_exported_as_trained(world: Path, dora: Path) -> None:
    losses = metrics(world, "dora")
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.5
    assert json.loads((dora / "run.json").read_text())["settings"]["adapters"]["peft"] == "DoRAWithEmbeddings"
    export_hf(dora, world / "dora_hf")
    engine = TransformersEngine(world / "dora_hf", device="cpu")
    loss = sequences_loss(engine, world / "ds/ja_validation", seq_length=64, samples=8).loss
    assert loss == pytest.approx(metrics(world, "dora", "val_loss_ja")[STEPS], abs=1e-4)


def test_dora_goes_on_with_its_own_base_alone(world: Path, dora: Path) -> None:
    check_resumed(dora, world / "base")
    import_hf(world / "dora_hf", world / "other_base")
    with pytest.raises(CptError, match="which has other weights"):
        check_resumed(dora, world / "other_base")


def test_adapters_as_a_base_are_merged_by_the_command_that_the_refusal_names(
    world: Path, blend: Any, dora: Path
) -> None:
    with pytest.raises(CptError, match=r"holds a run's adapters .* `nemo-cpt merge .* DEST`") as refused:
        check(recipe_of(world, blend, dora, "tuned"))
    command = str(refused.value).partition("`")[2].partition("`")[0]
    words = command.replace("DEST", str(world / "merged")).split()
    done = subprocess.run([sys.executable, "-m", "nemo_cpt.cli", *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    log = world / "tuned.log"
    assert jobs.run(functools.partial(tune, world, blend), log=log) == 0, log.read_text()[-3000:]
    trained = metrics(world, "dora", "val_loss_ja")[STEPS]
    assert metrics(world, "tuned", "val_loss_ja")[0] == pytest.approx(trained, abs=1e-4)
    template = instruction_template(checkpoint_of(world, "tuned"))
    assert template is not None
    assert (template.name, template.text, template.stop) == ("mine", "{{ messages }}", ("<eos>", 1))


def test_a_run_on_texts_hands_on_the_template_of_its_start(world: Path, dora: Path) -> None:
    from nemo_cpt.training.record import _template

    tuned = checkpoint_of(world, "tuned")
    start = types.SimpleNamespace(path=str(tuned))
    strategy = types.SimpleNamespace(restore_config=start)
    texts = types.SimpleNamespace(datamodule=object(), strategy=strategy, ckpt_path=None)
    assert _template(texts) == TEMPLATE
    assert _template(types.SimpleNamespace(**vars(texts) | {"ckpt_path": f"{dora}/weights"})) is None
    assert _template(types.SimpleNamespace(**vars(texts) | {"ckpt_path": f"{tuned}/weights"})) == TEMPLATE


def test_an_unknown_scheme_is_refused(world: Path, blend: Any) -> None:
    with pytest.raises(CptError, match="peft_scheme is 'ptuning': it can be lora or dora"):
        continual.with_lora(recipe_of(world, blend, world / "base", "x"), rank=8, peft_scheme="ptuning")
