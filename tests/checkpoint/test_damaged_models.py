"""Bad input: a CptError that says what is wrong, nothing left that looks finished, the source untouched."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_cpt.checkpoint import export_hf, grow_model, import_hf
from nemo_cpt.errors import CptError
from tests.support import small_models as models


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return models.make("llama31", tmp_path / "hf")


def _digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def _refused(action: Callable[[], object], message: str, dest: Path) -> None:
    with pytest.raises(CptError, match=message):
        action()
    assert not dest.exists()
    assert not list(dest.parent.glob(".*partial*"))


def _refuse_import(hf: Path, message: str) -> None:
    before = _digest(hf)
    dest = hf.parent / "nemo"
    _refused(lambda: import_hf(hf, dest), message, dest)
    assert _digest(hf) == before


def _shards(hf: Path) -> list[Path]:
    return sorted(hf.glob("*.safetensors"))


def _edit(hf: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = next(path for path in _shards(hf) if name in load_file(path))
    every = load_file(path)
    every[name] = change(every[name])
    save_file(every, path, metadata={"format": "pt"})


def _set(hf: Path, **fields: object) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("keep", [0, 5, 60, 0.5, -1])
def test_truncated_shard(hf: Path, keep: float) -> None:
    path = _shards(hf)[1]
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep % size)
    _refuse_import(hf, re.escape(f"{path} is not a whole safetensors file"))


def test_garbage_in_the_header(hf: Path) -> None:
    data = bytearray(_shards(hf)[0].read_bytes())
    data[8:40] = b"x" * 32
    _shards(hf)[0].write_bytes(data)
    _refuse_import(hf, "not a whole safetensors file")


def test_missing_shard(hf: Path) -> None:
    path = _shards(hf)[2]
    path.unlink()
    _refuse_import(hf, re.escape(f"{path} is missing though the index names it"))


def test_index_names_a_tensor_that_no_shard_holds(hf: Path) -> None:
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = _shards(hf)[0].name
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    _refuse_import(hf, r"shards lack, model\.layers\.9\.mlp\.up_proj")


def test_index_that_points_outside_the_folder(hf: Path) -> None:
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    _refuse_import(hf, "no usable weight_map")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.3.self_attn.v_proj.weight"])
def test_a_weight_that_is_no_number(hf: Path, name: str, value: float) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[-1, -1] = value
        return tensor

    _edit(hf, name, spoil)
    _refuse_import(hf, rf"{re.escape(name)} has 1 of \d+ values that are NaN or infinite")


def test_large_weights_whose_sum_overflows_are_no_damage(tmp_path: Path) -> None:
    hf = models.make("llama2", tmp_path / "hf")  # float16: 250 x 48 x 1000 is beyond its range
    _edit(hf, "model.embed_tokens.weight", lambda tensor: torch.full_like(tensor, 1000.0))
    assert import_hf(hf, tmp_path / "nemo").dtype == "float16"


def test_config_that_does_not_match_the_shapes(hf: Path) -> None:
    _set(hf, intermediate_size=96)
    _refuse_import(hf, r"shape \(80, 48\), config\.json asks for \(96, 48\)")


def test_config_with_too_many_and_too_few_layers(hf: Path) -> None:
    _set(hf, num_hidden_layers=5)
    _refuse_import(hf, r"model\.layers\.4\.self_attn\.q_proj\.weight is missing")
    _set(hf, num_hidden_layers=3)
    _refuse_import(hf, r"model\.layers\.3\.\S+ has no place")


def test_untied_head_in_a_config_that_ties(hf: Path) -> None:
    _set(hf, tie_word_embeddings=True)
    _refuse_import(hf, r"lm_head\.weight has no place")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "gptq"}),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"] * 2),
        ("layer_types", 5),
        ("layer_types", [["full_attention"]]),
        ("sliding_window", 4096),
        ("architectures", ["OtherLlamaForCausalLM"]),
        ("auto_map", {"AutoModelForCausalLM": "modeling.OtherLlamaForCausalLM"}),
        ("hidden_act", None),
        ("final_logit_softcapping", 30.0),
        ("embedding_multiplier", 12.0),
    ],
)
def test_a_field_that_changes_the_forward_pass(hf: Path, field: str, value: object) -> None:
    _set(hf, **{field: value})
    _refuse_import(hf, rf"field '{field}' with value .* is refused")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_key_value_heads", "2"),
        ("num_key_value_heads", 0),
        ("num_hidden_layers", True),
        ("head_dim", 0),
        ("head_dim", 15),
        ("tie_word_embeddings", "false"),
        ("rope_scaling", "linear"),
        ("rms_norm_eps", [1e-5]),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", None),
        ("max_position_embeddings", 0.5),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [2, "</s>"]),
        ("eos_token_id", {"id": 2}),
        ("eos_token_id", True),
    ],
)
def test_a_field_of_another_type(hf: Path, field: str, value: object) -> None:
    _set(hf, **{field: value})
    _refuse_import(hf, rf"({field}.* cannot be |head size of 15 is refused)")


def test_an_unknown_field_can_be_allowed_by_name(hf: Path, tmp_path: Path) -> None:
    _set(hf, made_with="someone's tool")
    _refuse_import(hf, "field 'made_with'")
    import_hf(hf, tmp_path / "nemo", ignore_fields=["made_with"])


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0}, {"type": "dynamic", "factor": 2.0}])
def test_rope_scaling_that_megatron_lacks(hf: Path, rope: dict[str, object]) -> None:
    _set(hf, rope_scaling=rope)
    _refuse_import(hf, "rope scaling of type")


def test_other_architectures_and_no_config(hf: Path) -> None:
    _set(hf, model_type="gemma2")
    _refuse_import(hf, "model_type 'gemma2' is not supported")
    (hf / "config.json").unlink()
    _refuse_import(hf, r"config\.json does not exist")


def test_a_bare_gpt2_is_refused_with_the_cure(tmp_path: Path) -> None:
    hf = models.make("gpt2", tmp_path / "hf")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in models.tensors(hf).items()}
    for path in hf.glob("model*"):
        path.unlink()
    save_file(bare, hf / "model.safetensors")
    _refuse_import(hf, "Save it once with transformers' GPT2LMHeadModel")
    models.make("gpt2", tmp_path / "dropout", attn_pdrop=0.1)
    _refuse_import(tmp_path / "dropout", "'attn_pdrop' with value 0.1 is refused")


def test_no_tokenizer(hf: Path) -> None:
    (hf / "tokenizer.json").unlink()
    _refuse_import(hf, "holds no tokenizer")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_small_file_that_was_cut_short(hf: Path, name: str) -> None:
    content = (hf / name).read_bytes()
    (hf / name).write_bytes(content[: len(content) // 2])
    _refuse_import(hf, rf"{name} is no JSON \(.*\), as a file that was cut short: download it again")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["[1]", "null", '"text"'])
def test_a_small_file_that_holds_something_else(hf: Path, name: str, content: str) -> None:
    (hf / name).write_text(content)
    _refuse_import(hf, rf"{name} holds a (list|NoneType|str), not a JSON object: download it again")


def test_generation_settings_that_end_replies_with_no_id(hf: Path) -> None:
    (hf / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    _refuse_import(hf, r"generation_config.json: eos_token_id cannot be '</s>'; it is a token's id, or a list of them")


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/nemo_cpt_pickle_ran",)


def test_pickled_weights_are_not_opened(hf: Path) -> None:
    for path in hf.glob("model*"):
        path.unlink()
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    _refuse_import(hf, "pickled weights only")


def test_a_checkpoint_whose_metadata_would_run_code(hf: Path, tmp_path: Path) -> None:
    import_hf(hf, tmp_path / "nemo")
    Path("/tmp/nemo_cpt_pickle_ran").unlink(missing_ok=True)
    (tmp_path / "nemo" / "weights" / ".metadata").write_bytes(pickle.dumps(_Bomb()))
    out = tmp_path / "out"
    _refused(lambda: export_hf(tmp_path / "nemo", out), r"refers to posix\.system", out)
    assert not Path("/tmp/nemo_cpt_pickle_ran").exists()


def test_existing_destination(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "nemo").mkdir()
    with pytest.raises(CptError, match="exists already"):
        import_hf(hf, tmp_path / "nemo")
    assert not list((tmp_path / "nemo").iterdir())


@pytest.fixture
def imported(hf: Path, tmp_path: Path) -> Path:
    import_hf(hf, tmp_path / "nemo")
    return tmp_path / "nemo"


@pytest.mark.parametrize("place", ["weights/out", "context/out", "hf/out", "out", "weights/../out"])
def test_what_is_made_of_a_checkpoint_has_no_place_within_it(imported: Path, tmp_path: Path, place: str) -> None:
    """It would be read as a part of it, and go with it when the run thins its checkpoints."""
    before = sorted(tmp_path.rglob("*"))
    (link := tmp_path / "link").symlink_to(imported)
    for source in (imported, imported / "weights", link):
        with pytest.raises(CptError, match=r"lies within .*a checkpoint that is read for it"):
            export_hf(source, imported / place)
    with pytest.raises(CptError, match="lies within"):
        export_hf(imported, link / place)
    with pytest.raises(CptError, match="lies within"):
        grow_model(imported, imported / place, tmp_path / "hf")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, link])
    # A model's folder may hold what is made of it.
    import_hf(tmp_path / "hf", tmp_path / "hf" / "nemo")


def test_unfinished_checkpoint(imported: Path, tmp_path: Path) -> None:
    (imported / "weights" / "metadata.json").unlink()
    _refused(lambda: export_hf(imported, tmp_path / "out"), "no finished checkpoint", tmp_path / "out")


@pytest.mark.parametrize("change", ["truncate", "remove"])
def test_damaged_checkpoint(imported: Path, tmp_path: Path, change: str) -> None:
    path = imported / "weights" / "__0_0.distcp"
    if change == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    _refused(lambda: export_hf(imported, tmp_path / "out"), "cannot be read", tmp_path / "out")


def test_checkpoint_without_the_files_of_its_base(imported: Path, tmp_path: Path) -> None:
    shutil.rmtree(imported / "hf")
    shutil.rmtree(imported / "context" / "nemo_tokenizer")
    _refused(lambda: export_hf(imported, tmp_path / "out"), "Give base=", tmp_path / "out")
    export_hf(imported, tmp_path / "out", base=tmp_path / "hf")


def test_checkpoint_that_diverged(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN in the Megatron weights, as a diverged training leaves it."""
    _edit(hf, "model.embed_tokens.weight", lambda tensor: tensor.index_fill(0, torch.tensor([3]), torch.nan))
    with monkeypatch.context() as patch:
        patch.setattr("nemo_cpt.checkpoint.nemo_writer.check_finite", lambda *args: None)
        import_hf(hf, tmp_path / "nemo")
    _refused(
        lambda: export_hf(tmp_path / "nemo", tmp_path / "out"), "48 of 12000 values that are NaN", tmp_path / "out"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_without_room_is_refused_before_writing(hf: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(60 * 2**20))
    _refused(lambda: import_hf(hf, small_disk / "nemo"), "are needed", small_disk / "nemo")


def test_a_disk_that_fills_half_way(tmp_path: Path, small_disk: Path) -> None:
    """Another process takes the room after the check."""
    hf = models.make("llama31", tmp_path / "wide", hidden_size=512, intermediate_size=2048)
    room: list[Path] = []

    def take_the_rest(done: int, total: int) -> None:
        if not room:
            room.append(small_disk / "other")
            free = shutil.disk_usage(small_disk).free
            room[0].write_bytes(bytes(free - 2 * 2**20))

    dest = small_disk / "nemo"
    _refused(lambda: import_hf(hf, dest, progress=take_the_rest), "No space left on device", dest)


def test_exit_code_2_and_one_line_on_stderr(hf: Path, tmp_path: Path) -> None:
    _set(hf, hidden_act="gelu")
    command = [sys.executable, "-W", "ignore", "-m", "nemo_cpt.cli", "import", str(hf), str(tmp_path / "nemo")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("nemo-cpt: ")
    assert "Traceback" not in done.stderr
