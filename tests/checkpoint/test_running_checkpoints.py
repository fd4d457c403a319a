"""A checkpoint that a run is writing, replacing or removing is not exported, and the message says which it is."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_cpt.checkpoint import export_hf, import_hf, verify
from nemo_cpt.errors import CptError
from tests.support import small_models as models


@pytest.fixture
def nemo(tmp_path: Path) -> Path:
    import_hf(models.make("llama31", tmp_path / "hf"), tmp_path / "run--last")
    return tmp_path / "run--last"


def _replace(nemo: Path) -> None:
    other = nemo.with_name("other")
    shutil.copytree(nemo, other)
    shutil.rmtree(nemo)
    other.rename(nemo)


def _begin_removal(nemo: Path) -> None:
    Path(f"{nemo}-unfinished").touch()


@pytest.mark.parametrize("change", [shutil.rmtree, _replace, _begin_removal])
def test_changed_while_it_is_read(change: Callable[[Path], None], nemo: Path) -> None:
    steps: list[int] = []

    def interfere(done: int, total: int) -> None:
        steps.append(done)
        if len(steps) == 3:
            change(nemo)

    with pytest.raises(CptError, match="was replaced or removed while it was read: a run goes on there"):
        export_hf(nemo, nemo.parent / "out", progress=interfere)
    assert len(steps) >= 3
    assert not (nemo.parent / "out").exists()
    assert not list(nemo.parent.glob(".*"))


def test_being_written(nemo: Path) -> None:
    _begin_removal(nemo)
    link = nemo.with_name("last")
    link.symlink_to(nemo.name)
    for path in (nemo, nemo / "weights", link):
        for action in (
            lambda path: export_hf(path, nemo.parent / "out"),
            lambda path: verify(path, nemo.parent / "hf", logits=False),
        ):
            with pytest.raises(CptError, match=r"is being written or removed by a run, or was left half"):
                action(path)
    assert not (nemo.parent / "out").exists()


def test_a_link_that_is_pointed_elsewhere_meanwhile(nemo: Path) -> None:
    """`-last` moves on to the next checkpoint; the one that it meant at the start is exported, whole."""
    link, other = nemo.with_name("last"), nemo.with_name("other")
    link.symlink_to(nemo.name)
    import_hf(models.make("llama31", nemo.with_name("other_hf"), rope_theta=10000.0), other)

    def move_on(done: int, total: int) -> None:
        if not other.with_name("new").exists():
            other.with_name("new").symlink_to(other.name)
            os.replace(other.with_name("new"), link)
            other.with_name("new").touch()

    export_hf(link, nemo.parent / "out", progress=move_on)
    assert link.resolve() == other
    models.assert_same_weights(nemo.with_name("hf"), nemo.parent / "out")
