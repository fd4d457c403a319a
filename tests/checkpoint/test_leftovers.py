"""What a killed import, export or merge left is removed by the next one of its kind; nothing else is."""

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nemo_cpt.checkpoint import export_hf, import_hf, merge
from nemo_cpt.corpus.atomic_folders import new_folder
from nemo_cpt.errors import CptError
from nemo_cpt.made import RECORD
from tests.support import small_models as models

# Writes, says where, and waits to be killed: the progress is called inside the block that fills the folder.
WRITER = """
import signal, sys
from pathlib import Path
from nemo_cpt.checkpoint import {function}

def stop(done, total):
    print(*Path(sys.argv[2]).parent.glob(".*.partial-*"), flush=True)
    signal.pause()

{function}(sys.argv[1], sys.argv[2], progress=stop)
"""


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return models.make("llama31", tmp_path / "hf")


def _start(function: str, source: Path, dest: Path) -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-c", WRITER.format(function=function), str(source), str(dest)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def _kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def _partials(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.partial-*"))


def test_of_an_import_and_of_an_export(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for function, source, name in (("import_hf", hf, "nemo [1]"), ("export_hf", tmp_path / "nemo [1]", "out")):
        process, partial = _start(function, source, tmp_path / name)
        _kill(process)
        assert _partials(tmp_path) == [partial]
        (import_hf if function == "import_hf" else export_hf)(source, tmp_path / name)
        assert _partials(tmp_path) == []
        assert f"Removing {partial}, which a killed command left" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / name).glob(".*")] == [RECORD]


def test_of_a_merge(nemo_jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = (nemo_jobs / "runs" / "lora" / "checkpoints").glob("*-last")
    process, partial = _start("merge", source, tmp_path / "out")
    _kill(process)
    assert not (tmp_path / "out").exists()
    merge(source, tmp_path / "out")
    assert f"Removing {partial}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_that_is_being_written_is_left(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process, partial = _start("import_hf", hf, tmp_path / "nemo")
    import_hf(hf, tmp_path / "nemo")
    assert capsys.readouterr().err == ""
    assert _partials(tmp_path) == [partial]
    _kill(process)


def test_what_is_not_ours_is_left(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign, other = tmp_path / ".nemo.partial-mine", tmp_path / ".nemo2.partial-0123abcd"
    for folder in (foreign, other):
        folder.mkdir()
    (foreign / "notes.txt").write_text("mine")
    (other / ".owner").write_text(socket.gethostname())  # another destination's
    elsewhere = tmp_path / ".nemo.partial-89abcdef"
    elsewhere.mkdir()
    (elsewhere / ".owner").write_text("another-machine")
    import_hf(hf, tmp_path / "nemo")
    assert _partials(tmp_path) == [elsewhere, foreign, other]
    assert "is being written on another-machine; it is not touched" in capsys.readouterr().err


def test_room_is_made_before_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".new.partial-0123abcd"
    left.mkdir()
    (left / ".owner").write_text(socket.gethostname())
    (left / "weights").write_bytes(bytes(1000))
    seen: list[bool] = []
    monkeypatch.setattr("nemo_cpt.corpus.atomic_folders._check_free_space", lambda *args: seen.append(left.exists()))
    with new_folder(tmp_path / "new", 1) as folder:
        (folder / "file").touch()
    assert seen == [False]
    assert os.listdir(tmp_path / "new") == ["file"]


@pytest.mark.parametrize("room", [0, 2**10, 2**15])
def test_a_full_disk_in_an_import_or_export_is_one_line_and_leaves_nothing(hf: Path, tmp_path: Path, room: int) -> None:
    import_hf(hf, tmp_path / "nemo")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for convert, source in ((import_hf, hf), (export_hf, tmp_path / "nemo")):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
            with pytest.raises(CptError, match=r"out could not be written: .*File too large.*Nothing is left of it"):
                convert(source, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "nemo"]


def test_two_at_once_leave_one_whole(tmp_path: Path) -> None:
    """Both start before either ends; the second to finish says so, and removes nothing of the first's."""
    inside, outcomes = threading.Barrier(2), []

    def write(text: str) -> None:
        try:
            with new_folder(tmp_path / "new", 1) as folder:
                inside.wait()
                (folder / "file").write_text(text)
            outcomes.append(text)
        except CptError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (written,) = [text for text in outcomes if text in ("one", "two")]
    (refused,) = [text for text in outcomes if text not in ("one", "two")]
    assert (tmp_path / "new" / "file").read_text() == written
    assert "was made by another process meanwhile" in refused
    assert _partials(tmp_path) == []
