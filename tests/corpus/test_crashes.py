"""Killed at any point: the next run goes on, and the bytes at the end are the same."""

import multiprocessing
import os
import random
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

import psutil
import pytest

import nemo_cpt.corpus
from nemo_cpt.corpus import prepare, read_index, read_manifest, split
from nemo_cpt.corpus.preparing.encode import Encoded, Work
from nemo_cpt.corpus.preparing.workers import Pool
from nemo_cpt.corpus.reading.chunks import Task
from nemo_cpt.errors import CptError
from tests.support.corpus_helpers import error_of_a_full_disk, same_files, write_jsonl
from tests.support.crashes import Lines, go_on, killed_at, lines_of, paused_at

KILLS = 50
CODE = Path(nemo_cpt.corpus.__file__).parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Some 2 MB in three files, one of them compressed."""
    import gzip

    folder = tmp_path_factory.mktemp("corpus")
    noise = random.Random(3)
    for name in "abc":
        made = [noise.choice(texts)[: noise.randrange(20, 2000)] for _ in range(250)]
        write_jsonl(folder / f"{name}.jsonl", made)
    packed = gzip.compress((folder / "b.jsonl").read_bytes())
    (folder / "b.jsonl").unlink()
    (folder / "b.jsonl.gz").write_bytes(packed)
    return folder


def run(corpus: Path, prefix: Path, tokenizer: Path) -> None:
    # The reference tokenizer: slow enough for kills to find it at work; a checkpoint after every round
    prepare(corpus, prefix, tokenizer, fast=False, workers=2, chunk_bytes=20_000, checkpoint_seconds=0, quiet=True)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory, corpus: Path, small: Path) -> Lines:
    """How many lines of the corpus package an undisturbed run goes through."""
    return lines_of(lambda: run(corpus, tmp_path_factory.mktemp("counted") / "ds", small), CODE)


def start_and_pause_half_way(corpus: Path, prefix: Path, tokenizer: Path, lines: Lines) -> BaseProcess:
    process = paused_at(sum(lines.with_workers) // 2, lambda: run(corpus, prefix, tokenizer), CODE)
    assert Path(f"{prefix}_text_document.lens.part").stat().st_size
    return process


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, corpus: Path, small: Path) -> str:
    """The dataset of an undisturbed run."""
    prefix = tmp_path_factory.mktemp("expected") / "ds"
    run(corpus, prefix, small)
    return f"{prefix}_text_document"


def is_whole(prefix: str, expected: str) -> bool:
    """Say whether there is an `.idx`; if there is, it and its `.bin` must be whole."""
    if not os.path.exists(prefix + ".idx"):
        return False
    assert read_index(prefix).tokens == read_index(expected).tokens
    assert same_files(prefix, expected)
    return True


def test_fifty_kills(tmp_path: Path, corpus: Path, small: Path, lines: Lines, expected: str) -> None:
    """At fifty lines of the code, from its first one to the last step of its tidying up."""
    target = tmp_path / "ds"
    kills, finished = 0, 0
    while kills < KILLS:
        line = 1 + lines.count * (kills % 10) // 10 + kills  # a tenth further each time: resumed runs get somewhere
        got_there, _ = killed_at(line, lambda: run(corpus, Path(f"{target}{finished}"), small), CODE)  # noqa: B023
        kills += got_there
        finished += is_whole(f"{target}{finished}_text_document", expected)
    # Also those that are whole: a kill may have hit the tidying up behind the last file: how many lines a run takes
    # before that depends on its workers. fastokens may finish what the reference began.
    reports = [prepare(corpus, f"{target}{number}", small, quiet=True) for number in range(finished + 1)]
    assert all(same_files(report.prefix, expected) for report in reports)
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.journal"))
    report = reports[-1]
    assert read_manifest(report.prefix)["inputs"] == read_manifest(expected)["inputs"]


def test_a_run_killed_while_it_tidied_up_is_finished(
    tmp_path: Path, corpus: Path, small: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_cpt.corpus.preparing.journal import Journal

    def die(journal: Journal) -> None:
        journal.lens_path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path / "ds", small)
    report = prepare(corpus, tmp_path / "ds", small, quiet=True)
    assert report.status == "resumed"
    assert same_files(report.prefix, expected)
    assert not list(tmp_path.glob("*.journal"))


def test_a_dead_worker_is_reported_and_the_next_run_resumes(
    tmp_path: Path, corpus: Path, small: Path, lines: Lines, expected: str
) -> None:
    pipe, theirs = multiprocessing.Pipe()

    def job() -> None:
        try:
            run(corpus, tmp_path / "ds", small)
        except CptError as error:
            theirs.send(str(error))

    process = paused_at(sum(lines.with_workers) // 2, job, CODE)
    psutil.Process(process.pid).children()[0].kill()
    go_on(process)
    process.join()
    assert pipe.poll()
    assert "worker process died with signal 9 (SIGKILL)" in pipe.recv()
    report = prepare(corpus, tmp_path / "ds", small, quiet=True)
    assert report.status == "resumed"
    assert same_files(report.prefix, expected)


def test_a_worker_that_has_ended_is_asked_why() -> None:
    """It may have said so just before it was sent something."""

    def fail(task: Task) -> tuple[Encoded, list[list[bytes]]]:
        raise CptError("the disk is full")

    pool = Pool(1, cast(Work, fail), [])
    task = Task(0, 0, "a", 0, 0, None, 0, "", False, 0, "")
    pool.give(pool.workers[0], task)
    pool.workers[0].process.join()
    with pytest.raises(CptError, match="the disk is full"):
        pool.write(pool.workers[0], 0, [])
    pool.stop()


def test_a_full_disk_is_reported_and_the_next_run_resumes(
    tmp_path: Path, corpus: Path, small: Path, expected: str
) -> None:
    error = error_of_a_full_disk(lambda: run(corpus, tmp_path / "ds", small), 200_000)
    assert "Cannot write the tokens: File too large" in error
    assert not list(tmp_path.glob("*.idx"))
    report = prepare(corpus, tmp_path / "ds", small, quiet=True)
    assert report.status == "resumed"
    assert same_files(report.prefix, expected)


def test_an_unfinished_job_is_not_mistaken_for_another(tmp_path: Path, corpus: Path, small: Path, lines: Lines) -> None:
    process = start_and_pause_half_way(corpus, tmp_path / "ds", small, lines)
    with pytest.raises(CptError, match="Another process is writing this output"):
        prepare(corpus, tmp_path / "ds", small, quiet=True, patience=0)
    process.kill()
    process.join()
    with pytest.raises(CptError, match="unfinished job that differs in eod"):
        prepare(corpus, tmp_path / "ds", small, append_eod=False, quiet=True)
    report = prepare(corpus, tmp_path / "ds", small, append_eod=False, overwrite=True, quiet=True)
    assert report.status == "written"


@pytest.mark.parametrize("torn", [b"", b"1234abcd {", b"00000000 {}\n", b"\x00" * 300])
def test_a_torn_journal_counts_up_to_its_last_whole_record(
    tmp_path: Path, corpus: Path, small: Path, lines: Lines, expected: str, torn: bytes
) -> None:
    process = start_and_pause_half_way(corpus, tmp_path / "ds", small, lines)
    process.kill()
    process.join()
    with open(tmp_path / "ds_text_document.journal", "ab") as journal:
        journal.write(torn)
    with open(tmp_path / "ds_text_document.bin.part", "ab") as tokens:
        tokens.write(b"written, but not vouched for")
    report = prepare(corpus, tmp_path / "ds", small, quiet=True)
    assert report.status == "resumed"
    assert same_files(report.prefix, expected)


def run_split(corpus: Path, folder: Path) -> None:
    split(corpus, folder, validation=0.1, test=0.05, drop="near", workers=2, quiet=True)


def test_a_killed_split_leaves_nothing_half_written_and_a_rerun_gives_the_same(tmp_path: Path, corpus: Path) -> None:
    lines = lines_of(lambda: run_split(corpus, tmp_path / "undisturbed"), CODE)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").glob("*.jsonl")}
    assert sorted(expected) == ["test.jsonl", "train.jsonl", "validation.jsonl"]
    begin, end = lines.with_workers
    points = [1 + lines.count * each // 8 for each in range(8)] + [
        begin + (end - begin) * each // 8 for each in range(8)
    ]
    found_at_work, folder = 0, tmp_path / "killed"
    for point in points:
        _, workers = killed_at(point, lambda: run_split(corpus, folder), CODE)
        alive = psutil.wait_procs(workers, timeout=60)[1]
        for child in alive:
            child.kill()
        assert alive == []  # workers do not outlive their parent
        found_at_work += bool(workers)
        whole = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
        assert whole.items() <= expected.items()
        assert whole == expected or not (folder / "split.json").exists()
    assert found_at_work >= 3
    run_split(corpus, folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == expected
    assert sorted(path.name for path in folder.iterdir()) == [*sorted(["split.json", *expected])]
