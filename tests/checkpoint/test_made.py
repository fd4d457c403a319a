"""A rerun of an import, an export, a growth or an untrained model finds its own folder done, and no other's."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nemo_cpt.checkpoint import export_hf, grow_model, import_hf, make_untrained
from nemo_cpt.errors import CptError
from nemo_cpt.vocabulary import grow, train
from tests.checkpoint.test_growing import make, tokenizers
from tests.vocabulary.conftest import CORPUS

__all__ = ["tokenizers"]
Makers = dict[str, tuple[Callable[..., Any], dict[str, Any], Path]]


@pytest.fixture
def makers(tokenizers: tuple[Path, Path], tmp_path: Path) -> Makers:
    """By command: what makes `out` of it, another value of one of its options, and a file that it reads."""
    hf = make("llama31", tmp_path / "hf", shutil.copytree(tokenizers[0], tmp_path / "small"))
    grown, corpus = (shutil.copytree(tokenizers[1], tmp_path / "ja"), shutil.copy(CORPUS / "ja.jsonl", tmp_path))
    import_hf(hf, tmp_path / "nemo")
    small = {"tokens": 50, "min_count": 2}
    return {
        "import": (partial(import_hf, hf), {"ignore_fields": ["head_dim"]}, hf / "config.json"),
        "export": (partial(export_hf, tmp_path / "nemo"), {"dtype": "float32"}, tmp_path / "nemo/weights/.metadata"),
        "grow": (
            partial(grow_model, hf, tokenizer=grown),
            {"initialisation": "zero"},
            next(hf.glob("*.safetensors")),
        ),
        "init": (
            partial(make_untrained, tokenizer=tmp_path / "small", params="tiny"),
            {"seed": 5},
            tmp_path / "small/tokenizer.json",
        ),
        "tokenizer grow": (
            lambda output, **options: grow(str(tmp_path / "small"), corpus, output, **small | options),
            {"tokens": 60},
            Path(corpus),
        ),
        "tokenizer train": (partial(train, corpus, vocabulary_size=512), {"special": ["<a>"]}, Path(corpus)),
    }


@pytest.mark.parametrize("command", ["import", "export", "grow", "init", "tokenizer grow", "tokenizer train"])
def test_a_rerun_finds_it_done(command: str, makers: Makers, tmp_path: Path) -> None:
    run, other, source = makers[command]
    first = run(tmp_path / "out")
    assert first.status == "written"
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = run(tmp_path / "out").as_dict()
    assert again | {"status": "written"} == {name: _listed(value) for name, value in first.as_dict().items()}
    assert again["status"] == "unchanged"
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert run(moved).status == "unchanged"
    (name,) = other
    with pytest.raises(CptError, match=f"moved exists already: it was made with {name}=.*, and this is "):
        run(moved, **other)
    assert {tmp_path / "out" / path.relative_to(moved): path.stat().st_mtime_ns for path in moved.rglob("*")} == stamps
    before = source.stat()
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(CptError, match=f"its .* was another, or {source.name} of it was written since"):
        run(moved)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    made = next(path for path in sorted(moved.rglob("*")) if path.is_file() and not path.name.startswith("."))
    made.write_bytes(made.read_bytes() + b" ")
    with pytest.raises(CptError, match=rf"its {made.relative_to(moved)} has [\d,]+ bytes, and had"):
        run(moved)
    made.write_bytes(made.read_bytes()[:-2] + b" ")
    with pytest.raises(CptError, match=f"its {made.relative_to(moved)} was changed since"):
        run(moved)
    (moved / ".made.json").unlink()
    with pytest.raises(
        CptError, match=r"moved exists already: it holds \w+.*, and does not say what it was made of\. "
    ):
        run(moved)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_what_something_else_made_is_named(makers: Makers, tmp_path: Path) -> None:
    with pytest.raises(CptError, match=r"nemo exists already: `nemo-cpt import` made it\. Give another destination"):
        makers["init"][0](tmp_path / "nemo")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    for name, there in (
        ("file", "is a file"),
        ("link", "is a link that leads nowhere"),
        ("folder", "holds nothing, and"),
    ):
        with pytest.raises(CptError, match=f"{name} exists already: it {there}"):
            makers["init"][0](tmp_path / name)
