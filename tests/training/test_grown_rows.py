"""A grown model's first steps change the new rows alone, and the following ones everything."""

import contextlib
import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nemo_run as run
import numpy as np
import pytest

from nemo_cpt.checkpoint import grow_model, import_hf
from nemo_cpt.checkpoint.architecture import read_architecture
from nemo_cpt.checkpoint.layout import slots
from nemo_cpt.checkpoint.nemo_weights import NemoWeights
from nemo_cpt.corpus import Blend, prepare
from nemo_cpt.errors import CptError
from nemo_cpt.training.changes import changes, check_started_again
from nemo_cpt.training.grown_rows import GrownRowsFirst
from nemo_cpt.training.record import deciding_settings
from nemo_cpt.training.run_folder import Checkpoint
from nemo_cpt.vocabulary import grow
from nemo_cpt.vocabulary.byte_level import read_byte_level
from tests.checkpoint.test_growing import make
from tests.training import jobs
from tests.vocabulary.conftest import CORPUS, small_base

STEPS = 2
ROWS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a grown base in fp32, that of which it grew, and data of both."""
    folder, ja = tmp_path_factory.mktemp("grown_rows"), str(CORPUS / "ja.jsonl")
    tokenizer = small_base(folder / "tokenizer")
    grow(str(tokenizer), ja, folder / "grown", tokens=100, min_count=2)
    import_hf(make("linear_rope", folder / "hf", tokenizer), folder / "old")
    grow_model(folder / "old", folder / "base", folder / "grown")
    for name, made_with in (("ds", folder / "grown"), ("old_ds", tokenizer)):
        prepare(ja, folder / name, made_with, workers=1, quiet=True)
        prepare(str(CORPUS / "en.jsonl"), folder / f"{name}_validation", made_with, workers=1, quiet=True)
    return folder


def _train(work: Path, name: str, base: str, data: str, rank: int | None, max_steps: int, processes: int) -> None:
    import nemo_run as run

    from nemo_cpt.recipes import continual, tiny

    sizes: dict[str, Any] = {"seq_length": 64, "global_batch_size": 8, "max_steps": max_steps, "val_check_interval": 2}
    given: dict[str, Any] = {"warmup_steps": 0, "grown_rows_first": STEPS, "directory": str(work / "runs")}
    blend = Blend(train={str(work / data): 1.0}, validation={"en": str(work / f"{data}_validation")})
    made = tiny.continual_pretrain(
        str(work / base), blend, name=name, model="base", processes=processes, untrained_base=True,
        **({"tensor_model_parallel_size": 2} if processes > 1 else {}), **sizes, **given,
    )  # fmt: skip
    run.run(continual.with_lora(made, rank=rank) if rank else made, direct=True)


def train(work: Path, name: str, base: str = "base", data: str = "ds", rank: int | None = None,
          max_steps: int = STEPS, processes: int = 1) -> tuple[int, str]:  # fmt: skip
    log = work / f"{name}.log"
    job = functools.partial(_train, work, name, base, data, rank, max_steps, processes)
    return jobs.run(job, processes=processes, log=log), log.read_text()[-4000:]


def _weights(work: Path, checkpoint: Path) -> dict[str, np.ndarray]:
    arch = read_architecture(work / "base" / "hf")
    weights = NemoWeights(checkpoint, arch)
    return {slot.name: np.array(weights.read(slot.name), np.float32) for slot in slots(arch)}


@pytest.mark.parametrize("processes", [1, 2])  # the vocabulary cut in two with tensor parallelism
def test_only_the_new_rows_change_in_the_first_steps(processes: int, work: Path) -> None:
    code, log = train(work, f"first_{processes}", processes=processes)
    assert code == 0, log
    (last,) = (work / f"runs/first_{processes}/checkpoints").glob("*-last")
    before, after = _weights(work, work / "base"), _weights(work, last)
    first = read_byte_level(str(work / "tokenizer")).size
    for name, values in before.items():
        old = slice(0, first if name in ROWS else None)
        assert np.array_equal(values[old], after[name][old]), name
        if name in ROWS:
            assert not np.array_equal(values[first:], after[name][first:]), name


def test_everything_changes_after_them(work: Path) -> None:
    code, log = train(work, "then", max_steps=STEPS + 2)
    assert code == 0, log
    (last,) = (work / "runs/then/checkpoints").glob("*-last")
    before, after = _weights(work, work / "base"), _weights(work, last)
    assert not [name for name, values in before.items() if np.array_equal(values, after[name])]


def test_what_has_not_grown_or_is_frozen_is_refused(work: Path) -> None:
    code, log = train(work, "ungrown", base="old", data="old_ds")
    assert code == 2, log
    assert "has not grown" in log
    code, log = train(work, "frozen", rank=4)
    assert code == 2, log
    assert "layer are frozen: train them beside the adapters" in log


def test_a_run_goes_on_with_as_many_steps_as_it_began_with(tmp_path: Path) -> None:
    def settings(*callbacks: Any) -> dict[str, dict[str, Any]]:
        return deciding_settings(SimpleNamespace(), SimpleNamespace(), 8, callbacks)

    began, others = settings(GrownRowsFirst(5)), (settings(), settings(run.Config(GrownRowsFirst, steps=3)))
    assert changes(began, settings(run.Config(GrownRowsFirst, steps=5))) == []
    for step, other in itertools.product((3, 5), others):
        (tmp_path / "run.json").write_text(json.dumps({"step": step, "settings": began}))
        with contextlib.nullcontext() if step == 5 else pytest.raises(CptError, match="step 3: grown_rows_first 5 -> "):
            check_started_again(Checkpoint(tmp_path), other, None, finished=False)
        with pytest.raises(CptError, match="was trained otherwise than this asks for: grown_rows_first 5 -> "):
            check_started_again(Checkpoint(tmp_path), other, None, finished=True)
