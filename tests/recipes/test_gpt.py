"""Pretraining from scratch: steps, rates and batches by their sources, and a run from random weights to an export."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_cpt import catalog
from nemo_cpt.catalog.matching import recipes_for
from nemo_cpt.checkpoint import make_untrained
from nemo_cpt.checkpoint.provenance import read_provenance
from nemo_cpt.compatibility import check_model, read_base
from nemo_cpt.corpus import Blend, prepare
from nemo_cpt.doctor import Examination, inputs
from nemo_cpt.errors import CptError
from nemo_cpt.launching import yaml_file
from nemo_cpt.launching.description import describe
from nemo_cpt.planning import recipe_reader
from nemo_cpt.recipes import continual, gpt
from nemo_cpt.vocabulary import train
from tests.training import jobs
from tests.vocabulary.conftest import CORPUS


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a model of random weights and datasets, all of the demo's corpus."""
    folder = tmp_path_factory.mktemp("scratch")
    languages = [str(CORPUS / f"{language}.jsonl") for language in ("ja", "en")]
    train(languages, folder / "tokenizer", 1024)
    make_untrained(folder / "base", folder / "tokenizer", "tiny")
    make_untrained(folder / "gpt2", folder / "tokenizer", "tiny", shape="gpt2", max_position_embeddings=128)
    for part, text in zip(("train", "validation"), languages, strict=True):
        prepare(text, folder / part, folder / "tokenizer", workers=1, quiet=True)
    return folder


def blend(work: Path) -> Blend:
    return Blend(train={str(work / "train"): 1.0}, validation={"validation": str(work / "validation")})


@pytest.mark.parametrize(
    ("recipe", "steps", "warmup", "batch", "lr"),
    [
        (gpt.pretrain, 4_730, 473, 512, 6e-4),
        (gpt.pretrain_350m, 13_351, 715, 512, 3e-4),
        (gpt.pretrain_1_3b, 24_796, 357, 512, 2e-4),
    ],
)
def test_schedules_are_their_sources(
    recipe: Any, steps: int, warmup: int, batch: int, lr: float, work: Path, tmp_path: Path
) -> None:
    from nemo_run.core.serialization.yaml import YamlSerializer

    made = recipe(str(work / "base"), blend(work))
    assert (made.trainer.max_steps, made.optim.lr_scheduler.max_steps) == (steps, steps)
    assert (made.optim.lr_scheduler.warmup_steps, made.data.global_batch_size) == (warmup, batch)
    assert (made.optim.config.lr, made.optim.lr_scheduler.min_lr) == (lr, pytest.approx(lr / 10))
    assert made.data.seq_length == made.model.config.seq_length
    (tmp_path / "recipe.yaml").write_text(YamlSerializer().serialize(made))
    assert yaml_file.load(tmp_path / "recipe.yaml") == made


def test_what_is_given_goes_before(work: Path) -> None:
    made = gpt.pretrain(str(work / "base"), blend(work), max_steps=7, global_batch_size=16, lr=1e-3, warmup_steps=2)
    assert (made.trainer.max_steps, made.data.global_batch_size, made.optim.lr_scheduler.warmup_steps) == (7, 16, 2)
    with pytest.raises(CptError, match="it can be 124M"):
        gpt.pretrain(str(work / "base"), blend(work), params="7B")
    for wrong in ("global_batch_size", "max_steps", "seq_length"):
        with pytest.raises(CptError, match=f"{wrong}=0: give {wrong}=1 or more"):
            gpt.pretrain(str(work / "base"), blend(work), **{wrong: 0})


def test_the_launcher_knows_the_steps_and_a_base_of_another_size(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"base": str(work / "base"), "data": blend(work)}
    job = describe(catalog.recipe("gpt.pretrain_350m"), arguments, [], "local", [])
    assert (job.max_steps, job.global_batch_size, job.settings.lr) == (13_351, 512, 3e-4)
    assert job.settings.num_layers == 4  # the base's
    found = inputs.base(Examination(job))
    assert found.state == "warning"
    said = "its schedule is for 350M parameters (the base has "
    assert said in found.found
    gpt.pretrain_350m(**arguments)
    assert said in capsys.readouterr().err
    fits = recipes_for(work / "base")["gpt.pretrain_350m"][1]
    assert fits.startswith(said)
    for name in ("gpt.pretrain", "tiny.continual_pretrain"):  # which take the base's own shape, whichever that is
        given = arguments | {"base": str(work / "gpt2")} | ({"model": "base"} if name.startswith("tiny") else {})
        job = describe(catalog.recipe(name), given | {"seq_length": 64}, [], "local", [])
        assert inputs.base(Examination(job)).state == ("warning" if name == "gpt.pretrain" else "ok")
        with pytest.raises(CptError, match="has learnt 128 positions"):
            describe(catalog.recipe(name), given | {"seq_length": 256}, [], "local", [])


def test_learnt_positions_are_the_bases_and_no_sequence_is_longer(work: Path, tmp_path: Path) -> None:
    from nemo_run.core.serialization.yaml import YamlSerializer

    made = gpt.pretrain(str(work / "gpt2"), blend(work), seq_length=64)
    assert (made.data.seq_length, made.model.config.seq_length) == (64, 128)
    assert check_model(read_base(work / "gpt2"), made.model.config) == []
    (tmp_path / "recipe.yaml").write_text(YamlSerializer().serialize(made))
    assert yaml_file.load(tmp_path / "recipe.yaml") == made
    assert {"biases of linear layers", "learnt positions"} <= set(recipe_reader.read(made).unmodelled)
    with pytest.raises(CptError, match="has learnt 128 positions"):
        gpt.pretrain(str(work / "gpt2"), blend(work), seq_length=256)
    with pytest.raises(CptError, match="adapters on GPT-2's layers cannot be exported"):
        continual.with_lora(made)
    made.model.config.seq_length = 64
    with pytest.raises(CptError, match=r"max_position_embeddings \(NeMo: seq_length\) is 64 in the recipe and 128"):
        check_model(read_base(work / "gpt2"), made.model.config)
    llama = gpt.pretrain(str(work / "base"), blend(work), seq_length=64)
    for base, other in (("gpt2", llama), ("base", made)):
        with pytest.raises(CptError, match="is not that of its base"):
            check_model(read_base(work / base), other.model.config)


def _train(work: Path, base: str) -> None:
    import nemo_run as run

    from nemo_cpt.training.cpu import on_cpu

    sizes: dict[str, Any] = {"seq_length": 64, "global_batch_size": 8, "micro_batch_size": 8, "max_steps": 30}
    places = {"directory": str(work / "runs"), "val_check_interval": 30, "name": base}
    made = gpt.pretrain(str(work / base), blend(work), lr=3e-3, **sizes, **places)
    made.data.reset_position_ids = base == "gpt2"  # learnt positions alone are looked up by these
    run.run(on_cpu(made), direct=True)


@pytest.mark.parametrize("base", ["base", "gpt2"])
def test_a_run_learns_from_random_weights_and_is_exported(base: str, work: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_cpt.checkpoint import export_hf, verify
    from nemo_cpt.evaluation.bits_per_byte import sequences_loss
    from nemo_cpt.evaluation.loss_sets import training_record
    from nemo_cpt.inference.transformers_engine import TransformersEngine
    from nemo_cpt.training.masks import masks_of

    log = work / f"{base}.log"
    assert jobs.run(functools.partial(_train, work, base), log=log) == 0, log.read_text()[-3000:]
    lines = (work / "runs" / base / "metrics/steps.jsonl").read_text().splitlines()
    losses = [each["reduced_train_loss"] for each in map(json.loads, lines) if "reduced_train_loss" in each]
    assert losses[0] == pytest.approx(math.log(1024), abs=0.3)
    assert losses[-1] < losses[0] - 0.7
    (last,) = (work / "runs" / base / "checkpoints").glob("*-last")
    exported = work / f"{base}_hf"
    export_hf(last, exported, dtype="float32")
    assert read_provenance(exported).from_scratch
    assert len(read_provenance(exported).trainings) == 1
    model, tokenizer = (kind.from_pretrained(exported) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 1024
    found = verify(last, exported)
    assert found.identical
    assert found.logits_difference is not None
    assert found.logits_difference <= 1e-5 * (found.largest_logit or 0)
    record, engine = training_record(exported), TransformersEngine(exported, device="cpu")
    masks = masks_of(record)
    assert masks == (("reset_position_ids",) if base == "gpt2" else ())
    shape = {"seq_length": 64, "samples": record["validated_on"]["samples"]}
    loss, plain = (
        sequences_loss(engine, work / "validation", **shape, **dict.fromkeys(each, True)).loss for each in (masks, ())
    )
    validated = [each["val_loss_validation"] for each in map(json.loads, lines) if "val_loss_validation" in each]
    assert loss == pytest.approx(validated[-1], abs=1e-4)
    assert (abs(plain - loss) > 1e-3) == (base == "gpt2")
    assert type(model).__name__ == {"base": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[base]
