"""Each guard stops what it is there for, and says what to do."""

import functools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nemo_run as run
import pytest
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import local_layer_spec

from nemo_cpt.checkpoint import export_hf
from nemo_cpt.checkpoint.architecture import read_architecture
from nemo_cpt.checkpoint.context import write_context
from nemo_cpt.corpus import Blend
from nemo_cpt.errors import CptError
from nemo_cpt.launching.task import run_recipe
from nemo_cpt.recipes import parts, tiny
from nemo_cpt.training import guards, record
from nemo_cpt.training.data import BlendDataModule, blend_of
from nemo_cpt.training.resume import check_base
from nemo_cpt.training.run_folder import newest_whole
from tests.training import jobs


def recipe(world: Path, blend: Any, **changes: Any) -> Any:
    return tiny.continual_pretrain(str(world / "base"), blend, directory=str(world / "runs"), seq_length=64, **changes)


def test_a_sound_recipe_passes(world: Path, blend: Any) -> None:
    guards.check(recipe(world, blend))


def test_no_base(world: Path, blend: Any) -> None:
    made = recipe(world, blend)
    made.resume.base = None
    with pytest.raises(CptError, match="no base to continue from"):
        guards.check(made)


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CptError, match=r"is not there: import it first with `nemo-cpt import"):
        check_base(tmp_path / "nothing")


def test_a_base_that_is_a_hugging_face_folder(world: Path) -> None:
    with pytest.raises(CptError, match=r"is a Hugging Face model: `nemo-cpt import .*base_hf"):
        check_base(world / "base_hf")


def test_mock_data(world: Path, blend: Any) -> None:
    made = recipe(world, blend)
    made.data = run.Config(llm.MockDataModule, seq_length=64)
    with pytest.raises(CptError, match="made-up tokens"):
        guards.check(made)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(world: Path, tmp_path: Path, suffix: str) -> None:
    for end in {".bin", ".idx"} - {suffix}:
        (tmp_path / f"ja_text_document{end}").write_bytes((world / f"ds/ja_train_text_document{end}").read_bytes())
    with pytest.raises(CptError, match=rf"ja_text_document\{suffix}"):
        BlendDataModule(paths=[1.0, str(tmp_path / "ja")])


@pytest.mark.parametrize("paths", ["{train:[1.0,ds/ja],validation:[ds/ja]}", ["1.0"], ["ds/ja", 1.0], None])
def test_paths_that_parse_wrongly_are_explained(paths: Any) -> None:
    with pytest.raises(CptError, match=r"data\.paths is .*(weights and prefixes in turn|needs a number)"):
        blend_of(paths)


def test_a_dict_in_a_string_as_a_prefix_is_explained() -> None:
    with pytest.raises(CptError, match="train"):
        Blend(train={"{train:[1.0,ds/ja]}": 1.0}).check()


@pytest.mark.parametrize(
    ("lr", "min_lr", "warmup", "steps", "message"),
    [
        (1e-5, 3e-5, 10, 100, "min_lr 3e-05 is not below lr 1e-05"),  # the stock recipe with lr changed alone
        (1e-5, 1e-5, 10, 100, "is not below lr"),
        (2.5e-5, 2.5e-6, 2000, 100, "warmup_steps 2000 is not below max_steps 100"),
    ],
)
def test_a_schedule_that_never_peaks(lr: float, min_lr: float, warmup: int, steps: int, message: str) -> None:
    with pytest.raises(CptError, match=message):
        guards.check_schedule(lr, SimpleNamespace(min_lr=min_lr, warmup_steps=warmup), steps)


def test_nvte_variables_that_contradict_the_backend() -> None:
    flash = SimpleNamespace(name="flash")
    with pytest.raises(CptError, match="NVTE_FUSED_ATTN=1 contradicts attention_backend=flash"):
        guards.check_environment(flash, {"NVTE_FUSED_ATTN": "1"})
    guards.check_environment(flash, {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0"})


@pytest.mark.parametrize("loss", [math.log(128256), math.log(128256) - 0.4, float("nan")])
def test_a_first_loss_of_random_weights(loss: float) -> None:
    with pytest.raises(CptError, match="weights were not restored"):
        guards.check_first_loss(loss, 128256)
    guards.check_first_loss(2.3, 128256)
    if math.isfinite(loss):
        guards.check_first_loss(loss, 128256, untrained_base=True)


def test_a_base_that_has_barely_been_trained_is_said_to_be(world: Path, blend: Any) -> None:
    with pytest.raises(CptError, match="barely been trained, give untrained_base=true"):
        guards.check_first_loss(math.log(512), 512)
    (given,) = (each for each in recipe(world, blend, untrained_base=True).trainer.callbacks
                if each.__fn_or_cls__ is guards.Guards)  # fmt: skip
    assert given.untrained_base


def test_the_job_itself_refuses_random_weights(world: Path, blend: Any) -> None:
    log = world / "random.log"
    assert jobs.run(functools.partial(_train_from_random_weights, world, blend), log=log) == 2
    printed = log.read_text()
    assert "the first training loss is" in printed
    assert "Traceback" not in printed.split("the first training loss is")[-1]
    assert not list((world / "runs" / "random" / "checkpoints").glob("*"))


def _train_from_random_weights(world: Path, blend: Any) -> None:
    made = recipe(world, blend, name="random", max_steps=4, val_check_interval=2, global_batch_size=8)
    made.resume.base = str(world / "base")
    made.trainer.strategy.ckpt_load_strictness = None
    from nemo_cpt.training.cpu import CpuStrategy

    CpuStrategy.selective_restore = lambda self: None  # what a run that silently restored nothing does
    run.run(made, direct=True)


def test_a_rope_base_is_changed_on_purpose_or_not_at_all(world: Path, blend: Any) -> None:
    """Meant, it is trained with and reaches config.json; the run goes on with that and on that base alone."""
    log = world / "rope.log"
    meant = functools.partial(_train_with_a_rope_base, world, blend, "longer", "base", 5e6)
    assert jobs.run(functools.partial(meant, ()), log=log) == 2, log.read_text()[-3000:]
    assert "rope_theta (NeMo: rotary_base) is 5000000.0 in the recipe and 500000.0 in the base" in log.read_text()
    assert jobs.run(functools.partial(meant, ("rope_theta",)), log=log) == 0, log.read_text()[-3000:]
    newest = newest_whole(world / "runs/longer/checkpoints")
    assert newest is not None
    export_hf(newest.path, world / "longer_hf")
    assert read_architecture(world / "longer_hf").rope_theta == 5e6

    back = functools.partial(_train_with_a_rope_base, world, blend, "longer", "base", 5e5, (), 4)
    assert jobs.run(back, log=log) == 2, log.read_text()[-3000:]
    assert "rope_theta (NeMo: rotary_base) is 500000.0 in the recipe and 5000000.0 in the checkpoint" in log.read_text()
    _make_deeper(world / "base", world / "deeper")
    elsewhere = functools.partial(_train_with_a_rope_base, world, blend, "longer", "deeper", 5e6, ("rope_theta",), 4)
    assert jobs.run(elsewhere, log=log) == 2, log.read_text()[-3000:]
    assert "num_hidden_layers (NeMo: num_layers) is 5 in the recipe and 4 in the checkpoint" in log.read_text()


def _train_with_a_rope_base(
    world: Path, blend: Any, name: str, base: str, rotary_base: float, unlike_base: tuple[str, ...], max_steps: int = 2
) -> None:
    made = tiny.continual_pretrain(
        str(world / base), blend, model=parts.model_like(str(world / base), seq_length=64), name=name,
        directory=str(world / "runs"), seq_length=64, global_batch_size=8, max_steps=max_steps, val_check_interval=2,
        unlike_base=unlike_base, extend="stretch",
    )  # fmt: skip
    made.model.config.rotary_base = rotary_base
    run.run(made, direct=True)


def _make_deeper(base: Path, deeper: Path) -> None:
    """A base that says that it has a layer more."""
    shutil.copytree(base, deeper, ignore=shutil.ignore_patterns("context"))
    path = deeper / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 5}))
    (deeper / "context").mkdir()
    architecture = read_architecture(deeper / "hf")
    write_context(deeper / "context", architecture.with_dtype("float32"), deeper / "hf")


def test_test_sets_and_a_dataset_named_twice(world: Path, blend: Any) -> None:
    with pytest.raises(CptError, match="a training reads no test sets"):
        recipe(world, Blend(train=blend.train, test=blend.validation))
    made = recipe(world, blend)
    made.data.paths = [0.5, "ds/ja", 0.5, "ds/ja_text_document"]
    with pytest.raises(CptError, match="names one dataset twice"):
        guards.check(made)


def test_a_recipe_refuses_a_global_batch_that_does_not_divide(world: Path, blend: Any) -> None:
    with pytest.raises(CptError, match="global_batch_size 6 is not a multiple of micro_batch_size 2 x data parallel 2"):
        recipe(world, blend, processes=2, global_batch_size=6, micro_batch_size=2)


def test_a_recipe_by_name_is_checked_before_it_starts(world: Path, blend: Any) -> None:
    arguments = {"base": str(world / "base"), "data": blend, "directory": str(world / "runs"), "seq_length": 64}
    with pytest.raises(CptError, match="global_batch_size 7 is not a multiple of micro_batch_size 2"):
        run_recipe("tiny.continual_pretrain", arguments | {"micro_batch_size": 2}, ["data.global_batch_size=7"])
    with pytest.raises(CptError, match=r"no field globl_batch_size; near: global_batch_size"):
        run_recipe("tiny.continual_pretrain", arguments, ["data.globl_batch_size=7"])


def test_a_training_that_diverged_is_said_to_have(tmp_path: Path) -> None:
    trainer = SimpleNamespace(
        global_step=5,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.5}])],
        checkpoint_callback=SimpleNamespace(dirpath=tmp_path),
    )
    found = RuntimeError("Unexpected result nan (message='found NaN in local grad norm for bucket #0 in backward pass")
    guard, heard = guards.Guards(), []
    later = SimpleNamespace(on_exception=lambda trainer, module, error: heard.append(error.message))
    trainer.callbacks = [guard, later]
    with pytest.raises(CptError, match=r"step 6 has .* learning rate of 0.5: the training has diverged. Begin again"):
        guard.on_exception(trainer, None, found)
    assert ["step 6 has" in each for each in heard] == [True]  # what writes down how the run ended, and ends exports
    assert "Go on from steps=3, which is whole, with a smaller lr=" in guards.diverged(6, 0.5, "steps=3")
    assert "the base's weights are damaged" in guards.diverged(1, 0.5, None)
    guard.on_exception(trainer, None, RuntimeError("another"))


def test_fp8_needs_ada_or_later() -> None:
    guards.check_fp8((8, 9))
    guards.check_fp8((9, 0))
    with pytest.raises(CptError, match=r"this one has 8\.0.*bf16"):
        guards.check_fp8((8, 0))
    guards.check_fp8((9, 0), "blockwise")
    with pytest.raises(CptError, match=r"9\.0 \(Hopper\) or later, scaled in blocks; this one has 8\.9"):
        guards.check_fp8((8, 9), "blockwise")
    with pytest.raises(CptError, match="there is none here"):
        guards.check_fp8(None)


def test_a_sequence_that_context_parallelism_cannot_cut(world: Path, blend: Any) -> None:
    made = recipe(world, blend, processes=4, context_parallel_size=4)
    made.trainer.devices = 4
    made.data.seq_length = 60
    with pytest.raises(CptError, match=r"seq_length 60 cannot be cut into 2 x context_parallel_size = 8 .*56 could be"):
        guards.check(made)


def test_resets_that_would_change_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = llm.Llama2Config7B(apply_rope_fusion=False)
    learnt = llm.GPTConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    on_cpu = llm.Llama2Config7B(apply_rope_fusion=False, transformer_layer_spec=local_layer_spec)
    positions = SimpleNamespace(reset_position_ids=True)
    with pytest.raises(CptError, match="reset_position_ids=True would change nothing: rotary embeddings count from"):
        guards.check_resets(positions, rotary)
    guards.check_resets(positions, learnt)  # GPT-2's positions are looked up
    monkeypatch.setattr(record, "HAVE_TE", True)
    masked = SimpleNamespace(reset_attention_mask=True, create_attention_mask=True)
    with pytest.raises(CptError, match="reset_attention_mask=True would change nothing: Transformer Engine's causal"):
        guards.check_resets(masked, rotary)
    guards.check_resets(masked, on_cpu)
    monkeypatch.setattr(record, "HAVE_TE", False)
    guards.check_resets(masked, rotary)
