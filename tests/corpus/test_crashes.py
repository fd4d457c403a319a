"""Killed at any moment: the next run goes on, and the bytes at the end are the same."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from corpus_helpers import error_of_a_full_disk, same_files, write_jsonl

from nemo_cpt.corpus import prepare, read_index, read_manifest, split
from nemo_cpt.errors import CptError

KILLS = 50
fork = multiprocessing.get_context("fork")  # a started interpreter, so that the kills hit the work and not the imports


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Some 5 MB in three files, one of them compressed."""
    import gzip

    folder = tmp_path_factory.mktemp("corpus")
    noise = random.Random(3)
    for name in "abc":
        made = [noise.choice(texts)[: noise.randrange(20, 2000)] for _ in range(600)]
        write_jsonl(folder / f"{name}.jsonl", made)
    packed = gzip.compress((folder / "b.jsonl").read_bytes())
    (folder / "b.jsonl").unlink()
    (folder / "b.jsonl.gz").write_bytes(packed)
    return folder


def run(corpus: Path, prefix: Path, tokenizer: Path) -> None:
    # The reference tokenizer: slow enough for kills to find it at work; a checkpoint after every round
    prepare(corpus, prefix, tokenizer, fast=False, workers=2, chunk_bytes=20_000, checkpoint_seconds=0, quiet=True)


def start_and_wait_for_a_checkpoint(corpus: Path, prefix: Path, tokenizer: Path) -> multiprocessing.process.BaseProcess:
    process = fork.Process(target=run, args=(corpus, prefix, tokenizer))
    process.start()
    wait_for_a_checkpoint(prefix)
    return process


def wait_for_a_checkpoint(prefix: Path) -> None:
    lengths = Path(f"{prefix}_text_document.lens.part")
    while not (lengths.exists() and lengths.stat().st_size):
        time.sleep(0.002)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, corpus: Path, small: Path) -> tuple[str, float]:
    """The dataset of an undisturbed run, and how long it took."""
    prefix = tmp_path_factory.mktemp("expected") / "ds"
    begin = time.monotonic()
    run(corpus, prefix, small)
    return f"{prefix}_text_document", time.monotonic() - begin


def is_whole(prefix: str, expected: str) -> bool:
    """Say whether there is an `.idx`; if there is, it and its `.bin` must be whole."""
    if not os.path.exists(prefix + ".idx"):
        return False
    assert read_index(prefix).tokens == read_index(expected).tokens
    assert same_files(prefix, expected)
    return True


def test_fifty_kills_at_random_moments(tmp_path: Path, corpus: Path, small: Path, expected: tuple[str, float]) -> None:
    reference, seconds = expected
    moments = random.Random(time.time_ns())
    kills, finished = 0, 0
    target = tmp_path / "ds"
    while kills < KILLS:
        prefix = f"{target}{finished}_text_document"
        process = fork.Process(target=run, args=(corpus, Path(f"{target}{finished}"), small))
        process.start()
        process.join(moments.uniform(0, seconds / 4))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        assert process.exitcode in (0, -signal.SIGKILL)
        finished += is_whole(prefix, reference)
    report = prepare(corpus, f"{target}{finished}", small, quiet=True)  # fastokens may finish what the reference began
    assert same_files(report.prefix, reference)
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.journal"))
    assert read_manifest(report.prefix)["inputs"] == read_manifest(reference)["inputs"]


def test_a_run_killed_while_it_tidied_up_is_finished(
    tmp_path: Path, corpus: Path, small: Path, expected: tuple[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_cpt.corpus.journal import Journal

    def die(journal: Journal) -> None:
        journal.lens_path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path / "ds", small)
    report = prepare(corpus, tmp_path / "ds", small, quiet=True)
    assert report.status == "resumed"
    assert same_files(report.prefix, expected[0])
    assert not list(tmp_path.glob("*.journal"))


def test_a_dead_worker_is_reported_and_the_next_run_resumes(
    tmp_path: Path, corpus: Path, small: Path, expected: tuple[str, float]
) -> None:
    pipe, theirs = fork.Pipe()

    def job() -> None:
        try:
            run(corpus, tmp_path / "ds", small)
        except CptError as error:
            theirs.send(str(error))

    process = fork.Process(target=job)
    process.start()
    wait_for_a_checkpoint(tmp_path / "ds")
    psutil.Process(process.pid).children()[0].kill()
    process.join()
    assert pipe.poll()
    assert "worker process died with signal 9 (SIGKILL)" in pipe.recv()
    report = prepare(corpus, tmp_path / "ds", small, quiet=True)
    assert report.status == "resumed"
    assert same_files(report.prefix, expected[0])


def test_a_full_disk_is_reported_and_the_next_run_resumes(
    tmp_path: Path, corpus: Path, small: Path, expected: tuple[str, float]
) -> None:
    error = error_of_a_full_disk(lambda: run(corpus, tmp_path / "ds", small), 200_000)
    assert "Cannot write the tokens: File too large" in error
    assert not list(tmp_path.glob("*.idx"))
    report = prepare(corpus, tmp_path / "ds", small, quiet=True)
    assert report.status == "resumed"
    assert same_files(report.prefix, expected[0])


def test_an_unfinished_job_is_not_mistaken_for_another(tmp_path: Path, corpus: Path, small: Path) -> None:
    process = start_and_wait_for_a_checkpoint(corpus, tmp_path / "ds", small)
    with pytest.raises(CptError, match="Another process is writing this output"):
        prepare(corpus, tmp_path / "ds", small, quiet=True, patience=0.1)
    process.kill()
    process.join()
    with pytest.raises(CptError, match="unfinished job that differs in eod"):
        prepare(corpus, tmp_path / "ds", small, append_eod=False, quiet=True)
    report = prepare(corpus, tmp_path / "ds", small, append_eod=False, overwrite=True, quiet=True)
    assert report.status == "written"


@pytest.mark.parametrize("torn", [b"", b"1234abcd {", b"00000000 {}\n", b"\x00" * 300])
def test_a_torn_journal_counts_up_to_its_last_whole_record(
    tmp_path: Path, corpus: Path, small: Path, expected: tuple[str, float], torn: bytes
) -> None:
    process = start_and_wait_for_a_checkpoint(corpus, tmp_path / "ds", small)
    process.kill()
    process.join()
    with open(tmp_path / "ds_text_document.journal", "ab") as journal:
        journal.write(torn)
    with open(tmp_path / "ds_text_document.bin.part", "ab") as tokens:
        tokens.write(b"written, but not vouched for")
    report = prepare(corpus, tmp_path / "ds", small, quiet=True)
    assert report.status == "resumed"
    assert same_files(report.prefix, expected[0])


def run_split(corpus: Path, folder: Path) -> None:
    split(corpus, folder, validation=0.1, test=0.05, drop="near", workers=2, quiet=True)


def test_a_killed_split_leaves_nothing_half_written_and_a_rerun_gives_the_same(tmp_path: Path, corpus: Path) -> None:
    begin = time.monotonic()
    run_split(corpus, tmp_path / "undisturbed")
    duration = time.monotonic() - begin
    expected = {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").glob("*.jsonl")}
    assert sorted(expected) == ["test.jsonl", "train.jsonl", "validation.jsonl"]
    found_at_work, folder, noise = 0, tmp_path / "killed", random.Random(7)
    for _ in range(15):
        process = fork.Process(target=run_split, args=(corpus, folder))
        process.start()
        time.sleep(noise.uniform(0, duration))
        children = psutil.Process(process.pid).children()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        alive = psutil.wait_procs(children, timeout=10)[1]
        for child in alive:
            child.kill()
        assert alive == []  # workers do not outlive their parent
        found_at_work += bool(children)
        whole = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
        assert whole.items() <= expected.items()
        assert whole == expected or not (folder / "split.json").exists()
    assert found_at_work >= 3
    run_split(corpus, folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == expected
    assert sorted(path.name for path in folder.iterdir()) == [*sorted(["split.json", *expected])]
