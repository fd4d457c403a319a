"""Adapters merged into a NeMo checkpoint: the import of the merged export, in one pass, and as safe."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cpt.checkpoint import export_hf, import_hf, merge, verify
from nemo_cpt.errors import CptError
from nemo_cpt.made import RECORD
from tests.support import small_models as models
from tests.training import jobs


def _checkpoint(folder: Path, run: str) -> Path:
    (path,) = (folder / "runs" / run / "checkpoints").glob("*-last")
    return path


def _files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != RECORD]  # of which command it was
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("run", ["lora", "dora"])
def test_it_is_the_import_of_the_merged_export(run: str, dtype: str | None, nemo_jobs: Path, tmp_path: Path) -> None:
    checkpoint = _checkpoint(nemo_jobs, run)
    report = merge(checkpoint, tmp_path / "merged", dtype=dtype)
    exported = export_hf(checkpoint, tmp_path / "hf", dtype=dtype)
    import_hf(tmp_path / "hf", tmp_path / "imported")
    assert _files(tmp_path / "merged") == _files(tmp_path / "imported")
    assert (report.dtype, report.tensors, report.bytes_written, report.config_changes, report.warnings) == (
        exported.dtype, exported.tensors, exported.bytes_written, exported.config_changes, exported.warnings,
    )  # fmt: skip
    assert Path(report.base) == nemo_jobs / "nemo"


def test_nemo_computes_with_it_what_transformers_does_with_the_export(nemo_jobs: Path, tmp_path: Path) -> None:
    checkpoint = _checkpoint(nemo_jobs, "dora")
    merge(checkpoint, tmp_path / "merged")
    export_hf(checkpoint, tmp_path / "hf")
    job, log = functools.partial(_verify_logits, tmp_path / "merged", tmp_path / "hf"), tmp_path / "log"
    assert jobs.run(job, log=log) == 0, log.read_text()[-3000:]


def _verify_logits(merged: Path, exported: Path) -> None:
    report = verify(merged, exported, logits=True)
    assert report.identical
    assert report.logits_difference is not None


def test_a_tuned_run_takes_its_template_along(nemo_jobs: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(_checkpoint(nemo_jobs, "lora"), tmp_path / "tuned")
    template = {"name": "alpaca-en", "sha256": "", "text": _template(), "stop": ["t3", 3], "tokens": {"t1": 1, "t3": 3}}
    (checkpoint / "run.json").write_text(json.dumps({"step": 3, "template": template}))
    tokenizer = checkpoint / "context" / "hf" / "tokenizer.json"
    definition = json.loads(tokenizer.read_text())
    definition["added_tokens"].append(definition["added_tokens"][-1] | {"id": 3, "content": "t3"})
    tokenizer.write_text(json.dumps(definition))
    assert merge(checkpoint, tmp_path / "merged").chat_template == "alpaca-en"
    assert (tmp_path / "merged" / "hf" / "chat_template.jinja").read_text() == _template()
    export_hf(tmp_path / "merged", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == _template()
    assert verify(checkpoint, tmp_path / "out").identical


def _template() -> str:
    return (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% if m['role'] == 'assistant' %}"
        "{{ 't3' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )


def test_a_whole_model_has_nothing_to_merge(nemo_jobs: Path, tmp_path: Path) -> None:
    with pytest.raises(CptError, match="holds the whole model, not adapters"):
        merge(_checkpoint(nemo_jobs, "full"), tmp_path / "out")


def test_another_base_is_refused_and_nothing_is_left(nemo_jobs: Path, tmp_path: Path) -> None:
    other = models.make("llama31", tmp_path / "other", seed=1, vocab_size=models.MORE_ROWS)
    with pytest.raises(CptError, match="is not what the adapters were trained on"):
        merge(_checkpoint(nemo_jobs, "dora"), tmp_path / "out", base=other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    (tmp_path / "out").mkdir()
    with pytest.raises(CptError, match="exists already"):
        merge(_checkpoint(nemo_jobs, "dora"), tmp_path / "out")


def test_the_command(nemo_jobs: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "nemo_cpt.cli",
        "merge",
        _checkpoint(nemo_jobs, "lora"),
        tmp_path / "out",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dest"] == str(tmp_path / "out")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == json.loads(done.stdout) | {"status": "unchanged"}
    # Of another base's adapters, and of another run's.
    with pytest.raises(CptError, match="exists already: it was made with dtype=None, and this is 'float32'"):
        merge(_checkpoint(nemo_jobs, "lora"), tmp_path / "out", dtype="float32")
    with pytest.raises(CptError, match="exists already: its source was another, or "):
        merge(_checkpoint(nemo_jobs, "dora"), tmp_path / "out")
