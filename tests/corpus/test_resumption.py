"""What an interrupted run goes on with: the inputs that it began with, by their content, and what a full disk left."""

import gzip
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nemo_cpt.corpus
from nemo_cpt.corpus import prepare, read_index, read_manifest, split
from nemo_cpt.corpus.preparing.journal import Journal
from nemo_cpt.corpus.reading.sources import InputChangedError
from nemo_cpt.corpus.reading.tally import Tally
from nemo_cpt.errors import CptError
from tests.support.corpus_helpers import error_of_a_full_disk, same_files, write_jsonl
from tests.support.crashes import go_on, lines_of, paused_at

CODE = Path(nemo_cpt.corpus.__file__).parent
ROWS, STOP = 4000, 2500  # rows of the second input, and the one of them that gives no text


def write(path: Path, texts: list[str | None]) -> None:
    """Write texts in the format that the name says; None gives a line without a text."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        return parquet.write_table(pa.table({"text": texts}), path, row_group_size=500)
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return None


def run(inputs: list[Path], prefix: Path, tokenizer: Path, **options: object) -> nemo_cpt.corpus.PrepareReport:
    return prepare(inputs, prefix, tokenizer, chunk_bytes=5000, checkpoint_seconds=0, quiet=True, **options)


@pytest.fixture(params=["jsonl", "jsonl.gz", "parquet"])
def stopped(request: pytest.FixtureRequest, tmp_path: Path, small: Path) -> list[Path]:
    """Three inputs, and a run over them that stopped in the middle of the second, `tmp_path/ds`."""
    inputs = [tmp_path / f"{name}.{request.param}" for name in "abc"]
    for path in inputs:
        texts: list[str | None] = [f"{path.stem} {row:04}" for row in range(ROWS)]
        texts[STOP] = None if path == inputs[1] else texts[STOP]
        write(path, texts)
    with pytest.raises(CptError, match=rf"line {STOP + 1}, .*The next run goes on after [56],\d\d\d documents"):
        run(inputs, tmp_path / "ds", small)
    return inputs


def alter(path: Path, row: int) -> None:
    """Give a row another text of the same length, and the file its old time; the size may stay."""
    before = path.stat()
    texts: list[str | None] = [f"{path.stem} {number:04}" for number in range(ROWS)]
    texts[STOP] = None if path.stem == "b" else texts[STOP]
    texts[row] = f"{path.stem} other"[:6]
    write(path, texts)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.suffix != ".jsonl" or row == STOP or path.stat().st_size == before.st_size


@pytest.mark.parametrize(("which", "row"), [(0, 7), (0, ROWS - 1), (1, 7), (1, STOP - 700)])
def test_what_was_read_and_changed_is_not_mixed_with_the_rest(
    tmp_path: Path, small: Path, stopped: list[Path], which: int, row: int
) -> None:
    alter(stopped[which], row)
    with pytest.raises(InputChangedError, match=rf"{stopped[which].name} .*a mixture of the two.*begin anew with over"):
        run(stopped, tmp_path / "ds", small, on_error="skip")
    fresh = run(stopped, tmp_path / "fresh", small, on_error="skip")
    report = run(stopped, tmp_path / "ds", small, on_error="skip", overwrite=True)
    assert report.status == "written"
    assert same_files(report.prefix, fresh.prefix)
    assert read_manifest(report.prefix)["inputs"] == read_manifest(fresh.prefix)["inputs"]


@pytest.mark.parametrize(("which", "row"), [(1, STOP), (1, ROWS - 1), (2, 0)])
def test_what_was_not_read_yet_may_change(
    tmp_path: Path, small: Path, stopped: list[Path], which: int, row: int
) -> None:
    alter(stopped[which], row)
    mended = stopped[which] == stopped[1] and row == STOP
    report = run(stopped, tmp_path / "ds", small, on_error="stop" if mended else "skip")
    assert report.status == "resumed"
    fresh = run(stopped, tmp_path / "fresh", small, on_error="stop" if mended else "skip")
    assert same_files(report.prefix, fresh.prefix)
    assert read_manifest(report.prefix)["inputs"] == read_manifest(fresh.prefix)["inputs"]


def test_touched_moved_and_further_inputs_are_no_others(tmp_path: Path, small: Path, stopped: list[Path]) -> None:
    os.utime(stopped[0])
    moved = stopped[1].rename(stopped[1].with_name(f"moved.{stopped[1].name}"))
    (tmp_path / "more.jsonl").write_text('{"text": "more"}\n')
    inputs = [stopped[0], moved, stopped[2], tmp_path / "more.jsonl"]
    report = run(inputs, tmp_path / "ds", small, on_error="skip")
    assert (report.status, report.documents) == ("resumed", 3 * ROWS)
    assert same_files(report.prefix, run(inputs, tmp_path / "fresh", small, on_error="skip").prefix)


def test_fewer_and_other_inputs_are_refused(tmp_path: Path, small: Path, stopped: list[Path]) -> None:
    for inputs in (stopped[:1], stopped[1:], [stopped[1], stopped[0], stopped[2]]):
        with pytest.raises(InputChangedError, match="begin anew with overwrite=True"):
            run(inputs, tmp_path / "ds", small, on_error="skip")


def test_a_finished_run_that_was_refused_is_not_finished_with_other_inputs(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [f"{row:04}" for row in range(50)] + [None])
    with pytest.raises(CptError, match=r"1 of 51 lines give no text.*after 50 documents"):
        run([path], tmp_path / "ds", small, on_error="skip")
    kept = path.read_bytes()
    path.write_bytes(kept.replace(b"0007", b"7000"))
    with pytest.raises(InputChangedError, match="a mixture of the two"):
        run([path], tmp_path / "ds", small, on_error="skip", max_skipped=0.1)
    path.write_bytes(kept)
    report = run([path], tmp_path / "ds", small, on_error="skip", max_skipped=0.1)
    assert (report.status, report.documents, report.rates) == ("resumed", 50, {})


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("command", ["prepare", "split"])
def test_an_input_that_is_replaced_while_it_is_read_is_noticed(
    tmp_path: Path, small: Path, kind: str, command: str
) -> None:
    """Half way through: `split` is in the second of its passes then, which must see what the first one saw."""
    path, other = tmp_path / f"a.{kind}", tmp_path / f"other.{kind}"
    write(path, [f"{row:04}" for row in range(ROWS)])
    write(other, [f"{row:04}" for row in reversed(range(ROWS))])
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    ours, theirs = multiprocessing.Pipe()

    def job(output: Path, source: Path = path) -> None:
        try:
            if command == "prepare":
                run([source], output, small, workers=1)
            else:
                split(source, output, validation=0.2, workers=1, quiet=True)
        except CptError as error:
            theirs.send(str(error))

    undisturbed = shutil.copy2(path, tmp_path / f"undisturbed.{kind}")
    lines = lines_of(lambda: job(tmp_path / "counted", undisturbed), CODE)
    process = paused_at(sum(lines.with_workers) // 2, lambda: job(tmp_path / "out"), CODE)
    assert process.exitcode is None
    other.replace(path)
    go_on(process)
    process.join()
    assert ours.poll()
    assert re.search("changed (while it was being read|between two passes). Run again once nothing writes", ours.recv())
    assert not list(tmp_path.glob("out*.idx")) + list((tmp_path / "out").glob("*.jsonl"))


def test_a_file_whose_mode_changes_while_it_is_read_is_no_other(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [f"{row:04}" for row in range(ROWS)])
    lines = lines_of(lambda: run([path], tmp_path / "counted", small), CODE)
    process = paused_at(sum(lines.with_workers) // 2, lambda: run([path], tmp_path / "out", small), CODE)
    path.chmod(0o600)
    go_on(process)
    process.join()
    assert process.exitcode == 0


def test_ctrl_c_between_two_counts_vouches_for_nothing_half_counted(
    tmp_path: Path, texts: list[str], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, counted = write_jsonl(tmp_path / "a.jsonl", texts), []
    add = Tally.add

    def interrupted(*arguments: object) -> list[dict[str, object]]:
        counted.append(add(*arguments))
        if len(counted) == 9:
            raise KeyboardInterrupt
        return counted[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Tally, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run([path], tmp_path / "ds", small)
    report = run([path], tmp_path / "ds", small)
    assert report.status == "resumed"
    assert same_files(report.prefix, run([path], tmp_path / "fresh", small).prefix)


def test_a_short_write_is_written_again_in_its_place(tmp_path: Path) -> None:
    """A full disk takes a part of the lengths, or of the journal's line; when there is room, the whole is written."""
    journal = Journal(str(tmp_path / "ds"), {"job": 1})
    journal.open(discard=False, patience=0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    lengths = np.arange(1, 5, dtype="<i4").tobytes()
    for count, room in enumerate((journal.path.stat().st_size + 40, 5, 16)):
        journal.progress.entries += 4
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16 * count + room if room < 40 else room, limit[1]))
            with pytest.raises(CptError, match=r"Cannot write beside .*Make room and run the same command again"):
                journal.checkpoint(lengths, [], [])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        journal.checkpoint(lengths, [], [])
    journal.close()
    again = Journal(str(tmp_path / "ds"), {"job": 1})
    assert again.open(discard=False, patience=0)
    assert again.progress.entries == 12
    assert again.lens_path.read_bytes() == 3 * lengths
    again.close()


FULL = """
import sys
from pathlib import Path
from nemo_cpt.corpus import prepare
from nemo_cpt.errors import CptError

source, tokenizer, disk = map(Path, sys.argv[1:])
try:
    prepare(source, disk / "ds", tokenizer, workers=2, chunk_bytes=20_000, checkpoint_seconds=CHECKPOINT, quiet=True)
except CptError as error:
    print(error)
"""


@pytest.mark.parametrize("checkpoint", ["0", "1e9"])
def test_on_a_full_disk_the_message_says_what_the_next_run_does(
    tmp_path: Path, texts: list[str], small: Path, checkpoint: str
) -> None:
    """A real one, in a mount namespace of its own: a file system of 300 kB, then one with room for the same files."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs unshare and user namespaces for a small file system")
    source, disk, kept = write_jsonl(tmp_path / "a.jsonl", texts * 40), tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=300k none "{disk}" && "$@"; cp -r "{disk}" "{kept}"'
    job = [sys.executable, "-c", FULL.replace("CHECKPOINT", checkpoint), source, small, disk]
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *job], capture_output=True, text=True)
    promised = "No space left on device. Make room and run the same command again. The next run goes on after "
    assert promised in done.stdout, done.stdout + done.stderr
    documents = int(done.stdout.rsplit(promised, 1)[1].split()[0].replace(",", ""))
    journal = kept / "ds_text_document.journal"
    assert (
        [json.loads(line[9:]) for line in journal.read_bytes().splitlines()][-1]["progress"]["entries"] == documents > 0
    )
    report = prepare(source, kept / "ds", small, quiet=True)
    assert report.status == "resumed"
    assert same_files(report.prefix, prepare(source, tmp_path / "fresh", small, quiet=True).prefix)


def test_a_disk_that_is_full_at_once_leaves_nothing_and_promises_nothing(
    tmp_path: Path, jsonl: Path, small: Path
) -> None:
    error = error_of_a_full_disk(lambda: run([jsonl], tmp_path / "ds", small), 10)
    assert "Make room and run the same command again" in error
    assert "goes on" not in error
    assert not list(tmp_path.glob("ds*"))


def test_what_a_run_killed_while_writing_left_is_removed_by_the_next(
    tmp_path: Path, jsonl: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for end in (".idx.part", ".json.part", ".skipped.jsonl.part"):
        (tmp_path / f"ds_text_document{end}").write_text("torn")
    report = run([jsonl], tmp_path / "ds", small)
    names = sorted(path.name for path in tmp_path.glob("ds*"))
    assert names == [f"ds_text_document.{end}" for end in ("bin", "idx", "json")]
    assert read_index(report.prefix).documents == report.documents
