"""nemo-cpt import, export and verify, as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

from nemo_cpt.checkpoint import import_hf
from tests.support import small_models as models


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "nemo_cpt.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_import_export_verify(tmp_path: Path) -> None:
    hf = models.make("qwen25", tmp_path / "hf")
    imported = _run("import", hf, tmp_path / "nemo", "--json")
    assert json.loads(imported.stdout)["model_type"] == "qwen2"
    assert "Importing:" in imported.stderr

    exported = _run("export", tmp_path / "nemo", tmp_path / "back", "--json")
    assert "tokenizer.json" in json.loads(exported.stdout)["files"]
    models.assert_same_weights(hf, tmp_path / "back")

    verified = _run("verify", tmp_path / "nemo", tmp_path / "back", "--no-logits", "--json")
    assert verified.returncode == 0
    assert json.loads(verified.stdout)["identical"] is True

    other = models.make("qwen25", tmp_path / "other", hidden_size=48, rope_theta=1.0)
    (path,) = [path for path in other.glob("*00001-of*")]
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    table = _run("verify", tmp_path / "nemo", other, "--no-logits")
    assert table.returncode == 1
    assert "identical\tno\n" in table.stdout


def test_verify_prints_its_report_alone(tmp_path: Path) -> None:
    """NeMo tells of Llama 3.1's rotary scaling on stdout, packages warn of what they lack, transformers draws a bar."""
    hf = models.make("llama31", tmp_path / "hf")
    import_hf(hf, tmp_path / "nemo")
    command = [sys.executable, "-m", "nemo_cpt.cli", "verify", tmp_path / "nemo", hf, "--json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    assert (report["identical"], report["longest_prompt"], done.stderr) == (True, 256, "")


def test_help_and_the_package_need_neither_torch_nor_nemo() -> None:
    code = (
        "import sys, nemo_cpt.checkpoint, nemo_cpt.cli.checkpoint;"
        "print({'torch', 'nemo', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
