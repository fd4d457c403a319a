"""A disk that is full during a training: one line that says so, the last checkpoint whole, and nothing lost later."""

import contextlib
import logging
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_cpt.errors import CptError
from nemo_cpt.training import run_lock
from nemo_cpt.training.full_disk import say_which_disk_is_full
from nemo_cpt.training.run_folder import newest_whole
from tests.support.interruptions import Hit, Runs, Setting


@pytest.fixture(scope="module")
def runs(world: Path, blend: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """On a file system of 120 MB, with an unbroken run of 33."""
    disk = tmp_path_factory.mktemp("disk")
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "none", disk], check=False).returncode
    ):
        pytest.skip("needs to mount a small file system")
    try:
        made = Runs(world, blend, disk, tmp_path_factory.mktemp("logs"))
        assert made.start("unbroken", Setting()) == 0, made.log("unbroken").read_text()[-3000:]
        yield made
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize(
    ("name", "setting", "hit", "kept"),
    [
        ("record", Setting(), Hit("marker", 3, "FULL"), None),
        ("context", Setting(), Hit("context", 6, "FULL"), 3),
        ("weights", Setting(), Hit("weights", 6, "FULL", call=3), 3),
        ("asynchronous_weights", Setting(asynchronous=True), Hit("weights", 6, "FULL", call=3), 3),
        ("common", Setting(), Hit("common", 6, "FULL"), 3),
        ("metadata", Setting(asynchronous=True), Hit("metadata", 3, "FULL", call=2), 3),  # of step 6
        ("last", Setting(), Hit("config", 8, "FULL"), 6),
        ("metrics", Setting(), Hit("on_train_batch_start", 6, "FULL"), 6),
        ("two_ranks", Setting(processes=2), Hit("weights", 6, "FULL", ranks=(1,)), 3),
    ],
)
def test_it_is_said_and_nothing_is_lost(runs: Runs, name: str, setting: Setting, hit: Hit, kept: int | None) -> None:
    (runs.folder / "ballast").unlink(missing_ok=True)
    assert runs.start(name, setting, hit) == 2, runs.log(name).read_text()[-3000:]
    said = runs.log(name).read_text()
    checkpoints = runs.folder / name / "checkpoints"
    newest = newest_whole(checkpoints)
    assert "Traceback" not in said
    assert "No space left on device" in said
    assert list(checkpoints.glob("*-unfinished")) == []
    if kept is None:
        assert newest is None
        assert "No checkpoint was written yet" in said
    else:
        assert newest is not None
        assert newest.step == kept
        assert f"{newest.path} is whole, and the same command goes on from its step {kept}" in said
    (runs.folder / "ballast").unlink()
    assert runs.start(name, setting) == 0, runs.log(name).read_text()[-3000:]
    if setting.processes == 1:
        assert runs.differences(name, "unbroken") == []
    shutil.rmtree(runs.folder / name)  # room for the next


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """Files of this process have no room, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_rank_that_asks_when_rank_0_has_made_room_says_it_too(tmp_path: Path) -> None:
    said, lock = "cannot be written any more: ", run_lock.hold(tmp_path)

    def fail(text: str, clear_away: bool) -> None:
        with say_which_disk_is_full(tmp_path, tmp_path, clear_away=clear_away):
            raise RuntimeError(text)

    def fail_after_rank_0() -> None:
        with say_which_disk_is_full(tmp_path, tmp_path, clear_away=False):
            with pytest.raises(CptError, match=said), no_room():
                fail("a writer ended", clear_away=True)
            raise RuntimeError("a peer is gone")

    with pytest.raises(CptError, match=said):
        fail_after_rank_0()
    with say_which_disk_is_full(tmp_path, tmp_path, clear_away=True):
        pass  # the next start
    with pytest.raises(RuntimeError, match="something else"):
        fail("something else", clear_away=False)
    lock.release()


def test_a_log_file_without_room_does_not_complain_line_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger, file = logging.Logger("test"), logging.FileHandler("/dev/full")
    logger.addHandler(file)
    with say_which_disk_is_full(tmp_path, tmp_path, clear_away=False):
        logger.warning("lost")
    assert capsys.readouterr().err == ""
    logger.warning("lost")
    assert "Logging error" in capsys.readouterr().err
    with contextlib.suppress(OSError):
        file.close()
