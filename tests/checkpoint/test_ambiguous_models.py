"""Folders of which one reader could take another model than the next: read as transformers does, or refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from nemo_cpt.catalog.matching import recipes_for
from nemo_cpt.checkpoint import export_hf, grow_model, import_hf, verify
from nemo_cpt.compatibility import read_base
from nemo_cpt.doctor.inputs import base_architecture
from nemo_cpt.errors import CptError
from nemo_cpt.inference import open_engine
from tests.support import small_models as models

FP16, FP32 = torch.float16, torch.float32


def _made_single(shape: str, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A model in one weights file, its tensors changed."""
    changed = {name: change(name, tensor) for name, tensor in models.tensors(models.make(shape, folder)).items()}
    for path in folder.glob("model*"):
        path.unlink()
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=FP32)
    with torch.no_grad():
        return model(torch.arange(30)[None]).logits


def test_of_one_file_and_shards_that_is_read_which_transformers_loads(tmp_path: Path) -> None:
    hf = models.make("llama31", tmp_path / "hf")
    doubled = {name: 2 * tensor for name, tensor in models.tensors(hf).items()}
    save_file(doubled, hf / "model.safetensors", metadata={"format": "pt"})
    (warning,) = import_hf(hf, tmp_path / "nemo").warnings
    assert "holds model.safetensors, which is read, as by transformers, and model.safetensors.index.json" in warning
    export_hf(tmp_path / "nemo", tmp_path / "back")
    assert torch.equal(_logits(tmp_path / "back"), _logits(hf))
    report = verify(tmp_path / "nemo", hf, logits=False)
    assert (report.identical, report.warnings) == (True, (warning,))


def test_an_index_of_the_one_file_is_no_other_model(tmp_path: Path) -> None:
    hf = _made_single("llama3", tmp_path / "hf", lambda _, tensor: tensor)
    index = {"metadata": {}, "weight_map": dict.fromkeys(models.tensors(hf), "model.safetensors")}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert import_hf(hf, tmp_path / "nemo").warnings == ()
    (hf / "model.safetensors.index.json").write_text("{}")
    assert "and model.safetensors.index.json" in import_hf(hf, tmp_path / "other").warnings[0]


def _adapter_beside(hf: Path) -> None:
    (hf / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))


@pytest.mark.parametrize("taker", ["import", "grow", "verify", "ask", "recipes"])
def test_adapters_beside_a_model_are_not_passed_over(taker: str, tmp_path: Path) -> None:
    hf = models.make("smollm2", tmp_path / "hf")
    import_hf(hf, tmp_path / "nemo")
    _adapter_beside(hf)
    takers: dict[str, Callable[[], Any]] = {
        "import": lambda: import_hf(hf, tmp_path / "out"),
        "grow": lambda: grow_model(hf, tmp_path / "out", hf),
        "verify": lambda: verify(tmp_path / "nemo", hf),
        "ask": lambda: open_engine(hf),
        "recipes": lambda: recipes_for(hf),
    }
    with pytest.raises(CptError, match=r"beside a model: with peft, transformers loads someone/base with them"):
        takers[taker]()
    for path in hf.glob("model*"):
        path.unlink()
    with pytest.raises(CptError, match=r"to be added to someone/base, and no model\. Of a run's, `nemo-cpt export"):
        takers[taker]()
    assert not (tmp_path / "out").exists()


def test_an_older_import_beside_adapters_is_compared_as_any_other(tmp_path: Path) -> None:
    hf = models.make("llama3", tmp_path / "hf")
    import_hf(hf, tmp_path / "nemo")
    before = read_base(tmp_path / "nemo").architecture, base_architecture(tmp_path / "nemo")
    for folder in (tmp_path / "nemo" / "hf", tmp_path / "nemo" / "context" / "nemo_tokenizer"):
        _adapter_beside(folder)
    assert None not in before
    assert (read_base(tmp_path / "nemo").architecture, base_architecture(tmp_path / "nemo")) == before


def test_an_export_has_no_adapters_of_its_base(tmp_path: Path) -> None:
    """Of an import of an older version, which carries what lay beside the model."""
    hf = models.make("llama3", tmp_path / "hf")
    import_hf(hf, tmp_path / "nemo")
    _adapter_beside(tmp_path / "nemo" / "hf")
    export_hf(tmp_path / "nemo", tmp_path / "back")
    assert not (tmp_path / "back" / "adapter_config.json").exists()
    assert torch.equal(_logits(tmp_path / "back"), _logits(hf))


@pytest.mark.parametrize(
    ("wide", "dtype", "widened"),
    [
        (r"norm", FP32, 0),  # all layers' alike: each kind is one tensor of Megatron's, and keeps its dtype
        (r"layers\.1\.input_layernorm", FP32, 3),
        (r"up_proj", FP32, 4),
        (r"k_proj", FP32, 8),
        (r"v_proj", FP16, 12),
    ],
)
def test_weights_of_several_dtypes_keep_every_bit(wide: str, dtype: torch.dtype, widened: int, tmp_path: Path) -> None:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.float() * 1.001).to(dtype) if re.search(wide, name) else tensor

    hf = _made_single("llama31", tmp_path / "hf", change)
    warnings = import_hf(hf, tmp_path / "nemo").warnings
    assert bool(warnings) == bool(widened)
    assert not widened or f"({widened} in all)" in warnings[0]
    assert verify(tmp_path / "nemo", hf, logits=False).identical

    # config.json says bfloat16: the report names what was cast to it.
    report = export_hf(tmp_path / "nemo", tmp_path / "back")
    assert (report.dtype, report.cast_from) == ("bfloat16", "float32")
    export_hf(tmp_path / "nemo", tmp_path / "wide", dtype="float32")
    for name, tensor in models.tensors(hf).items():
        assert torch.equal(models.tensors(tmp_path / "wide")[name], tensor.float()), name


def test_verify_sees_tensors_that_have_no_place(tmp_path: Path) -> None:
    hf = models.make("llama32", tmp_path / "hf")
    import_hf(hf, tmp_path / "nemo")
    embedding = models.tensors(hf)["model.embed_tokens.weight"]
    for head, same in ((embedding, True), (2 * embedding, False)):
        other = _made_single("llama32", tmp_path / f"same={same}", lambda name, tensor: tensor)
        save_file(
            models.tensors(other) | {"lm_head.weight": head.clone()}, other / "model.safetensors", {"format": "pt"}
        )
        if same:
            assert verify(tmp_path / "nemo", other, logits=False).identical
            continue
        with pytest.raises(CptError, match=r"lm_head\.weight has no place"):
            verify(tmp_path / "nemo", other, logits=False)


def test_verify_says_that_a_tokenizer_is_another_one(tmp_path: Path) -> None:
    hf = models.make("llama3", tmp_path / "hf")
    import_hf(hf, tmp_path / "nemo")
    assert not verify(tmp_path / "nemo", hf, logits=False).warnings
    path = hf / "tokenizer.json"
    path.write_text(path.read_text().replace('"t5"', '"t_5"'))
    (warning,) = verify(tmp_path / "nemo", hf, logits=False).warnings
    assert f"{path} is not the one that {tmp_path / 'nemo'} carries" in warning


TAKERS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "import": lambda place, nemo, dest: import_hf(place, dest),
    "verify": lambda place, nemo, dest: verify(nemo, place),
    "grow": lambda place, nemo, dest: grow_model(place, dest, nemo / "hf"),
    "export": lambda place, nemo, dest: export_hf(place, dest),
    "export --base": lambda place, nemo, dest: export_hf(nemo, dest, base=place),
}
PLACES = {
    "nothing": r"there is no (folder|base) .*nowher; near: .*nowhere",
    "file": r"is a file|is no NeMo checkpoint: it has no folder|config\.json is not in",
    "empty": r"config\.json does not exist|is no NeMo checkpoint: it has no folder|config\.json is not in",
    "other": r"is a NeMo checkpoint|is a Hugging Face folder, and a NeMo checkpoint is asked for",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    import_hf(models.make("smollm2", folder / "hf"), folder / "nemo")
    (folder / "nowhere").mkdir()
    (folder / "file").write_text("text")
    (folder / "empty").mkdir()
    return folder


_TAKE_BOTH = ("grow", "export --base")


@pytest.mark.parametrize(
    ("taker", "kind"),
    [(taker, kind) for taker in TAKERS for kind in PLACES if kind != "other" or taker not in _TAKE_BOTH],
)
def test_a_path_that_is_something_else_is_named_as_it_is(taker: str, kind: str, world: Path, tmp_path: Path) -> None:
    others = {"nothing": "nowher", "other": "hf" if taker == "export" else "nemo"}
    with pytest.raises(CptError, match=PLACES[kind]):
        TAKERS[taker](world / others.get(kind, kind), world / "nemo", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_of_the_hub_is_told_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CptError, match=r"nemo-cpt download someone/Model-1B models/Model-1B"):
        import_hf("someone/Model-1B", tmp_path / "out")
