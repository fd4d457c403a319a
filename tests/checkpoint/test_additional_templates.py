"""Chat templates beside the default one, as transformers saves them: through import, training's copies and export."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nemo_cpt.checkpoint import export_hf, import_hf, make_untrained
from nemo_cpt.checkpoint.folders import TEMPLATES
from nemo_cpt.errors import CptError
from tests.support import small_models as models

TEMPLATES_OF_BASE = {"default": "{{ bos_token }}", "tool_use": "{{ tools }}\n", "rag": "{{ documents }} 文書"}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A model whose tokenizer transformers itself has saved with three templates."""
    folder = models.make("llama31", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES_OF_BASE
    tokenizer.save_pretrained(folder)
    assert {path.name for path in (folder / TEMPLATES).iterdir()} == {"tool_use.jinja", "rag.jinja"}
    return folder


def test_they_go_with_the_tokenizer(hf: Path, tmp_path: Path) -> None:
    nemo = tmp_path / "nemo"
    import_hf(hf, nemo)
    # NeMo copies the tokenizer's folder into a training's checkpoints file by file, and ends at a folder in it.
    for folder in (nemo / "hf", nemo / "context" / "nemo_tokenizer"):
        assert all(path.is_file() for path in folder.iterdir())
    shutil.rmtree(nemo / "hf")  # a training's checkpoint has the context alone
    report = export_hf(nemo, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATES_OF_BASE
    assert {f"{TEMPLATES}/tool_use.jinja", f"{TEMPLATES}/rag.jinja"} < set(report.files)
    assert export_hf(nemo, tmp_path / "out").status == "unchanged"
    import_hf(tmp_path / "out", tmp_path / "again")
    (tmp_path / "out" / TEMPLATES / "rag.jinja").write_text("")
    with pytest.raises(CptError, match=r"its additional_chat_templates/rag.jinja has 0 bytes"):
        export_hf(nemo, tmp_path / "out")
    with pytest.raises(CptError, match=r"rag.jinja of it was written since"):
        import_hf(tmp_path / "out", tmp_path / "again")


def test_a_base_s_folder_has_them_too(hf: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(hf, tmp_path / "bare")
    shutil.rmtree(bare / TEMPLATES)
    import_hf(bare, tmp_path / "nemo")
    export_hf(tmp_path / "nemo", tmp_path / "out", base=hf)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATES_OF_BASE


def test_a_model_from_scratch_has_its_tokenizer_s(hf: Path, tmp_path: Path) -> None:
    make_untrained(tmp_path / "nemo", hf, "tiny")
    export_hf(tmp_path / "nemo", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATES_OF_BASE


def test_names_in_a_checkpoint_lead_nowhere_else(hf: Path, tmp_path: Path) -> None:
    import_hf(hf, tmp_path / "nemo")
    for carried in (tmp_path / "nemo").rglob(f".{TEMPLATES}.json"):
        carried.write_text(json.dumps({"../../escaped.jinja": "text"}))
    export_hf(tmp_path / "nemo", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / TEMPLATES).iterdir()] == ["escaped.jinja"]
    assert not list(tmp_path.glob("*.jinja"))


def test_one_that_is_no_text_is_named(hf: Path, tmp_path: Path) -> None:
    (hf / TEMPLATES / "rag.jinja").write_bytes(b"\xff")
    with pytest.raises(CptError, match=r"chat templates of .*hf cannot be read"):
        import_hf(hf, tmp_path / "nemo")
    assert not (tmp_path / "nemo").exists()
