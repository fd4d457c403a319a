"""Base, data, vocabulary and disk, on real ones."""

import json
import os
import shutil
from pathlib import Path

import pytest

from nemo_cpt.checkpoint.architecture import parse_config, read_architecture
from nemo_cpt.corpus import Blend
from nemo_cpt.doctor import Examination, Job, Place, inputs
from nemo_cpt.doctor.job import checkpoints_at_once, exports_kept
from nemo_cpt.errors import CptError
from nemo_cpt.planning import checkpoint_size
from nemo_cpt.recipe_models import model_config
from tests.support.executor_jobs import held_by_another_process

LLAMA31_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
TINY = model_config(Path("recipes/tiny.py"))


def job(world: Path, *train: str, **changes) -> Job:
    validation = {"ja": str(world / "ds/held_out")}
    data = Blend(train={str(world / "ds" / name): 1.0 for name in train or ("ja", "en")}, validation=validation)
    return Job("r", **{"base": str(world / "base"), "data": data, "directory": world / "runs" / "one"} | changes)


def test_a_sound_job(world):
    examination = Examination(job(world))
    checks = (inputs.base, inputs.data, inputs.vocabulary, inputs.run_folder, inputs.disk)
    findings = [check(examination) for check in checks]
    assert {each.state for each in findings} == {"ok"}
    assert "ja 50%" in findings[1].found
    assert "holds no checkpoint yet" in findings[3].found


def test_what_a_blend_will_do_to_the_model(world):
    ja = str(world / "ds/ja")
    long = inputs.data(Examination(job(world, "ja", global_batch_size=4, seq_length=64, max_steps=9)))
    assert long.state == "warning"
    assert "ja_text_document is repeated" in long.cure
    assert inputs.data(Examination(job(world, "ja", global_batch_size=1, seq_length=64, max_steps=1))).state == "ok"
    held_in = inputs.data(Examination(job(world, data=Blend(train={ja: 1.0}, validation={"ja": ja}))))
    assert (held_in.state, "The validation set 'ja'" in held_in.found) == ("error", True)
    for blend, cure in (
        (Blend(train={ja: 1.0}), "no validation set"),
        (Blend(train={ja: 1.0}, validation={"ja": str(world / "ds/held_out")}, caution="It forgets."), "It forgets."),
    ):
        found = inputs.data(Examination(job(world, data=blend)))
        assert found.state == "warning"
        assert cure in found.cure


def test_a_base_that_is_not_there_or_foreign(world, tmp_path):
    absent = inputs.base(Examination(job(world, base=str(tmp_path / "none"))))
    assert (absent.state, absent.found) == ("error", f"the base {tmp_path}/none is not there")
    assert absent.cure.startswith("import it first with `nemo-cpt import")
    unimported = inputs.base(Examination(job(world, base=str(world / "hf"))))
    assert (unimported.state, unimported.found) == ("error", f"the base {world}/hf is a Hugging Face model")
    assert unimported.cure.startswith(f"`nemo-cpt import {world}/hf ")
    (tmp_path / "results/a/checkpoints").mkdir(parents=True)
    run = inputs.base(Examination(job(world, base=str(tmp_path / "results/a"))))
    assert (run.state, run.found) == ("error", f"the base {tmp_path}/results/a is a run's folder")
    assert run.cure == "give one of its checkpoints, of which none is whole"
    steps = tmp_path / "results/a/checkpoints/steps=9"
    shutil.copytree(world / "base", steps)
    (steps / "run.json").write_text('{"step": 9}')
    assert inputs.base(Examination(job(world, base=str(tmp_path / "results/a")))).cure.endswith(f"base={steps}")
    foreign = inputs.base(Examination(job(world, base=str(world / "ds"))))
    assert (foreign.state, "not a NeMo 2.0 checkpoint" in foreign.found) == ("error", True)


def test_a_base_that_is_short_unfinished_or_without_tokenizer(world, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(world / "base", copy)
    (tmp_path / "base-unfinished").touch()
    assert "not written to its end" in inputs.base(Examination(job(world, base=str(copy)))).found
    (tmp_path / "base-unfinished").unlink()
    assert inputs.base(Examination(job(world, base=str(copy)))).state == "ok"
    weights = max(copy.glob("weights/*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(weights, weights.stat().st_size // 2)
    short = inputs.base(Examination(job(world, base=str(copy))))
    assert (short.state, short.cure) == ("error", "copy or import it again")
    weights.unlink()
    assert inputs.base(Examination(job(world, base=str(copy)))).cure == "copy or import it again"
    shutil.rmtree(copy / "weights")
    shutil.copytree(world / "base" / "weights", copy / "weights")
    (copy / "hf" / "tokenizer.json").unlink()
    assert inputs.base(Examination(job(world, base=str(copy)))).state == "ok"  # the context has it too
    for path in copy.glob("context/*/tokenizer.json"):
        path.unlink()
    bare = Examination(job(world, base=str(copy)))
    assert "holds no tokenizer" in inputs.base(bare).found
    assert inputs.base(Examination(job(world, base=str(copy), tokenizer=str(world / "hf")))).state == "ok"


@pytest.fixture
def resumed(world, tmp_path):
    """A run's folder with a checkpoint of step 5."""
    checkpoint = tmp_path / "run" / "checkpoints" / "steps=5"
    shutil.copytree(world / "base", checkpoint)
    return checkpoint


def test_a_base_is_whole_whatever_dtype_its_configuration_says(world, tmp_path):
    """Weights of two bytes under `dtype: float32`, as some models of the hub have them: an import casts nothing."""
    copy = Path(shutil.copytree(world / "base", tmp_path / "base"))
    configuration = copy / "hf" / "config.json"
    configuration.write_text(json.dumps(json.loads(configuration.read_text()) | {"dtype": "float32"}))
    assert inputs.base(Examination(job(world, base=str(copy)))).state == "ok"


def test_a_checkpoint_that_is_not_the_recipes(world, resumed):
    """The words are those of the job's own refusal, `compatibility.check_resumed`."""

    def look(**changes):
        given = {"directory": resumed.parents[1], "max_steps": 9, "model": TINY} | changes
        return inputs.run_folder(Examination(job(world, **given)))

    assert (look().state, look().found) == ("ok", f"goes on from {resumed}, step 5")
    with pytest.raises(CptError) as refused:
        look(model=TINY | {"num_layers": 3})
    assert str(refused.value).startswith(f"the run was trained as another model up to {resumed}, num_hidden_layers")
    with pytest.raises(CptError, match=r"the run is another base's than .*num_layers. is 4 in the checkpoint and 5"):
        look(base=str(world / "deeper"))
    assert look(max_steps=5).found.startswith(f"the run is finished: {resumed} has step 5 of max_steps 5")
    assert look(place=Place("docker", same_files=False)).state == "skipped"
    (resumed / "weights" / "common.pt").unlink()
    with pytest.raises(CptError, match=r"no checkpoint of this run .* is whole"):
        look()


def test_data_are_compared_with_the_checkpoint_that_is_resumed(world, resumed):
    """The base may be gone; the tokenizer is the checkpoint's."""
    given = {"directory": resumed.parents[1], "base": "gone"}
    assert inputs.vocabulary(Examination(job(world, **given))).state == "ok"
    assert inputs.vocabulary(Examination(job(world, "other", **given))).state == "error"


def test_a_folder_that_another_job_holds(world, tmp_path):
    with held_by_another_process(tmp_path) as holder:
        here = inputs.run_folder(Examination(job(world, directory=tmp_path)))
        queued = inputs.run_folder(Examination(job(world, directory=tmp_path, place=Place("slurm", here=False))))
    assert (here.state, here.found.startswith(f"{tmp_path} is in use by process {holder} on ")) == ("error", True)
    assert (queued.state, queued.found) == ("warning", here.found)


def test_data_that_is_not_there_or_short(world, tmp_path):
    absent = inputs.data(Examination(job(world, "ja", "none")))
    assert absent.state == "error"
    assert "none_text_document.idx" in absent.found
    for end in (".idx", ".bin"):
        shutil.copy(world / f"ds/ja_text_document{end}", tmp_path / f"ja_text_document{end}")
    os.truncate(tmp_path / "ja_text_document.bin", 3)
    short = inputs.data(Examination(job(world, data=Blend(train={str(tmp_path / "ja"): 1.0}))))
    assert short.state == "error"
    assert "ja_text_document.bin" in short.found


def test_another_vocabulary(world):
    found = inputs.vocabulary(Examination(job(world, "ja", "other")))
    assert found.state == "error"
    assert found.found.endswith("other_hf, which is not the base's (251 tokens against 250)")
    assert found.cure.startswith("prepare it again")
    foreign = job(world, data=Blend(train={str(world / "ds/other"): 1.0}), tokenizer=str(world / "other_hf"))
    found = inputs.vocabulary(Examination(foreign))
    assert (found.state, "other_hf is not that of the base" in found.found) == ("error", True)


def test_another_file_of_the_same_tokenizer_is_known_by_its_ids(world, tmp_path):
    shutil.copytree(world / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert inputs.vocabulary(Examination(job(world, tokenizer=str(tmp_path / "hf")))).state == "ok"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {"t0": 7, "t7": 0}
    path.write_text(json.dumps(content))
    found = inputs.vocabulary(Examination(job(world, tokenizer=str(tmp_path / "hf"))))
    assert (found.state, "begins with the ids 7 7 7" in found.found) == ("error", True)


def test_a_dataset_without_manifest_is_judged_by_its_ids(world, tmp_path):
    import numpy as np

    for end in (".idx", ".bin"):
        shutil.copy(world / f"ds/ja_text_document{end}", tmp_path / f"ja_text_document{end}")
    own = job(world, data=Blend(train={str(tmp_path / "ja"): 1.0}))
    assert inputs.vocabulary(Examination(own)).state == "warning"
    tokens = np.memmap(tmp_path / "ja_text_document.bin", dtype="uint16", mode="r+")
    tokens[3] = 250
    tokens.flush()
    found = inputs.vocabulary(Examination(own))
    assert (found.state, "holds the token id 250" in found.found) == ("error", True)


def test_parameters_are_counted_to_the_last(world):
    from safetensors import safe_open

    counted = 0
    for path in (world / "hf").glob("*.safetensors"):
        with safe_open(path, "np") as file:
            counted += sum(_product(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert checkpoint_size.parameters(read_architecture(world / "hf")) == counted
    assert checkpoint_size.parameters(parse_config(LLAMA31_8B, "here")) == 8_030_261_248  # as the model's card has it


def test_adapters_are_counted_as_peft_counts_them():
    """Rank 32 on all linear layers of Llama-3.1-8B; PEFT's separate q, k, v, gate and up have more rows of A."""
    arch = parse_config(LLAMA31_8B, "here")
    fused = 32 * 32 * ((4096 + 6144) + (4096 + 4096) + (4096 + 28672) + (14336 + 4096))
    assert checkpoint_size.checkpoint_bytes(arch, 32) == 14 * fused
    whole = 2 * 128_256 * 4096
    assert checkpoint_size.checkpoint_bytes(arch, 32, trained_embeddings=True) == 14 * (fused + whole)
    assert checkpoint_size.checkpoint_bytes(arch, None) == 14 * checkpoint_size.parameters(arch)


def _product(shape):
    number = 1
    for size in shape:
        number *= size
    return number


def test_a_disk_that_is_too_small(world, monkeypatch):
    usage = shutil.disk_usage(world)
    checkpoint = checkpoint_size.checkpoint_bytes(read_architecture(world / "hf"), None, on_cpu=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * checkpoint - 1))
    assert inputs.disk(Examination(job(world, checkpoints=3))).state == "ok"
    assert inputs.disk(Examination(job(world, checkpoints=4, lora_rank=4))).state == "ok"
    found = inputs.disk(Examination(job(world, checkpoints=4)))
    assert found.state == "error"
    assert "log.ckpt.save_top_k=1)" in found.cure
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * checkpoint - 1))
    for kept in (1, 2):  # fewer than one cannot be kept, and one would not fit, either
        assert "save_top_k" not in inputs.disk(Examination(job(world, checkpoints=kept + 2))).cure
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * checkpoint - 1))
    gpu = job(world, checkpoints=4, gpus_per_node=1)  # bf16 with fp32 states takes 14 bytes, not 12
    assert inputs.disk(Examination(gpu)).state == "error"
    assert inputs.disk(Examination(job(world, checkpoints=0, gpus_per_node=1))).state == "ok"  # it writes none
    for number in range(2):  # a run that goes on overwrites what it has
        (world / "runs" / "one" / "checkpoints" / f"steps={number}").mkdir(parents=True, exist_ok=True)
    assert inputs.disk(Examination(job(world, checkpoints=4))).state == "ok"
    shutil.rmtree(world / "runs")


@pytest.mark.parametrize(("sizes", "most"), [((12, 2, 2), 4), ((4, 2, 2), 2), ((0, 2, 2), 4), ((12, 2, -1), 6)])
def test_beside_the_best_checkpoints_lie_the_last_and_the_one_being_written(sizes, most):
    assert checkpoints_at_once(*sizes) == most


def test_exports_beside_the_training_take_the_disk_too(world, monkeypatch):
    usage, arch = shutil.disk_usage(world), read_architecture(world / "hf")
    checkpoint = checkpoint_size.checkpoint_bytes(arch, None, on_cpu=True)
    room = 2 * checkpoint + 3 * checkpoint_size.export_bytes(arch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room))
    assert inputs.disk(Examination(job(world, checkpoints=2, exports=3))).state == "ok"
    found = inputs.disk(Examination(job(world, checkpoints=2, exports=4)))
    assert (found.state, "export_keep=1" in found.cure) == ("error", True)
    assert [exports_kept(100, *each) for each in ((None, None), (30, None), (30, 2), (200, 2))] == [0, 4, 3, 1]


def test_a_directory_that_cannot_be_written(world, tmp_path):
    (tmp_path / "file").touch()
    found = inputs.disk(Examination(job(world, directory=tmp_path / "file" / "run")))
    assert (found.state, "directory=" in found.cure) == ("error", True)


@pytest.mark.parametrize("check", [inputs.base, inputs.data, inputs.vocabulary, inputs.disk])
def test_other_files_are_not_looked_at(world, check):
    elsewhere = Place("kubernetes", here=False, same_packages=False, same_files=False)
    found = check(Examination(job(world, base="/none", place=elsewhere)))
    assert found.state == "skipped"
