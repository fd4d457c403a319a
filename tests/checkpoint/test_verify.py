"""verify sees constants as well as weights, hands transformers what it understands, and runs nobody's code."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from nemo_cpt.checkpoint import export_hf, import_hf, verify
from nemo_cpt.checkpoint.architecture import read_architecture
from nemo_cpt.checkpoint.verification import _long_prompt
from nemo_cpt.cli.checkpoint import verify_command
from nemo_cpt.errors import CptError
from tests.support import small_models as models


def _imported(shape: str, folder: Path, **changes: Any) -> tuple[Path, Path]:
    hf = models.make(shape, folder / "hf", **changes)
    import_hf(hf, folder / "nemo")
    return folder / "nemo", hf


def _edit(hf: Path, **fields: Any) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | fields))


def test_a_mistral_without_a_window_has_none(tmp_path: Path) -> None:
    nemo, hf = _imported("mistral", tmp_path, max_position_embeddings=32768)
    report = verify(nemo, hf, logits=True)
    assert report.identical
    _edit(hf, sliding_window=128)  # the logits see it as well as the number does
    report = verify(nemo, hf, logits=True)
    assert report.constants == (
        "sliding_window (NeMo: window_size) is none in the checkpoint's context and 128 in config.json",
    )
    assert report.logits_difference > 1e-4
    assert not report.identical
    assert not verify(nemo, hf, logits=False).identical


@pytest.mark.parametrize(
    ("shape", "fields", "name"),
    [
        ("llama31", {"rope_theta": 5e6}, "rope_theta"),
        ("llama31", {"rope_scaling": None}, "rope_scaling"),
        ("llama3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("qwen2", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ],
)
def test_constants_are_compared(shape: str, fields: dict[str, Any], name: str, tmp_path: Path) -> None:
    nemo, hf = _imported(shape, tmp_path)
    assert verify(nemo, hf, logits=False).identical
    _edit(hf, **fields)
    report = verify(nemo, hf, logits=False)
    assert not report.differences
    assert [each.split()[0] for each in report.constants] == [name]
    assert not report.identical


def test_an_export_of_another_dtype_is_compared_after_the_cast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nemo, hf = _imported("qwen25", tmp_path)  # in fp32
    export_hf(nemo, tmp_path / "out", dtype="bfloat16")
    report = verify(nemo, tmp_path / "out", logits=True)
    assert (report.identical, report.cast, report.differences) == (True, "float32 -> bfloat16", ())
    assert "`nemo-cpt export --dtype float32` writes every bit" in report.warnings[0]
    assert verify(nemo, hf).cast is None

    (weights,) = (tmp_path / "out").glob("*.safetensors")
    save_file({name: each + 1 for name, each in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(typer.Exit):
        verify_command(nemo, tmp_path / "out")
    told = capsys.readouterr()
    assert "logits were not compared, since what they are reckoned from differs" in told.err
    (line,) = [each for each in told.out.splitlines() if each.startswith("differences")]
    assert re.fullmatch(r"differences\t(model\.\S+: [\d,]+ of [\d,]+ values, by \S+ at most; ){5}and \d+ more .*", line)


def test_rope_parameters_of_transformers_5(tmp_path: Path) -> None:
    _, hf = _imported("llama31", tmp_path)
    config = json.loads((hf / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling")}
    (hf / "config.json").write_text(json.dumps(config))
    import_hf(hf, tmp_path / "again")
    assert verify(tmp_path / "again", hf, logits=True).identical


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"sliding_window": 8}, 256),
        ({"sliding_window": 4096, "max_position_embeddings": 32768}, 4096 + 32),
        ({"sliding_window": 16000, "max_position_embeddings": 32768}, 5792),  # 0.5 GiB of attention scores
        (
            {"sliding_window": 4096, "max_position_embeddings": 32768, "num_hidden_layers": 8, "vocab_size": 128256},
            1046,
        ),
        ({"sliding_window": None, "max_position_embeddings": 100}, 100),
    ],
)
def test_the_long_prompt_reaches_what_there_is_to_see(changes: dict[str, Any], length: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", **models._SIZES, **changes}))
    arch = read_architecture(tmp_path)
    assert len(_long_prompt(arch, 100_000)) == length
    assert len(_long_prompt(arch, 8 * 10**9)) == min(length, 125)


def test_what_no_prompt_reached_is_said(tmp_path: Path) -> None:
    nemo, hf = _imported("mistral", tmp_path, sliding_window=300)
    assert not verify(nemo, hf, logits=True).warnings
    report = verify(nemo, hf, logits=True, prompts=["t5 t6"])
    assert (report.longest_prompt, report.identical) == (2, True)
    assert "window of 300 was compared as a number" in report.warnings[0]


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    nemo, hf = _imported("llama31", tmp_path)
    torch.save(_Bomb(tmp_path / "ran"), nemo / "weights" / "common.pt")
    assert verify(nemo, hf, logits=True).identical  # it is not opened

    context = nemo / "context" / "io.json"
    honest = context.read_text()
    llama = "nemo.collections.llm.gpt.model.llama"
    for module, name in (("os", "system"), (llama, "json.loads"), (llama, "teardown")):
        context.write_text(
            honest.replace(f'"{llama}", "name": "Llama31Config"',
                           f'"{module}", "name": "{name}"')
        )  # fmt: skip
        assert context.read_text() != honest
        with pytest.raises(CptError, match="logits are compared of NeMo's own"):
            verify(nemo, hf, logits=True)
    context.write_text(honest)

    (nemo / "weights" / ".metadata").write_bytes(pickle.dumps(_Bomb(tmp_path / "ran")))
    with pytest.raises(CptError, match=r"refers to posix\.system"):
        verify(nemo, hf, logits=True)
    assert not (tmp_path / "ran").exists()
