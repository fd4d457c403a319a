"""The index of a dataset: of its present content, whole or absent, whatever starts or dies beside it."""

import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
import torch
from nemo.utils import AppState

from nemo_cpt.corpus import Blend
from nemo_cpt.errors import CptError
from nemo_cpt.recipes import tiny
from nemo_cpt.training import index_cache
from nemo_cpt.training.datasets import VALIDATION
from nemo_cpt.training.metrics import read_metrics
from tests.training import jobs
from tests.training.small_datasets import dataset, documents, expected, sequences, write

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "ds" / "ja_text_document"


@pytest.fixture(params=["beside the data", "in a shared folder"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    return {} if request.param == "beside the data" else {"path_to_cache": str(tmp_path / "shared")}


def indices(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".index", ".part"))


def holds_all(built: Any, texts: list[list[int]]) -> bool:
    """Whether a dataset reads these documents whole; any others, or a part of them, would differ."""
    return sequences(built) == expected(built, texts) and set(built.document_index) == set(range(len(texts)))


@pytest.mark.parametrize("longer", [True, False])
def test_data_that_were_made_again_are_read_whole(prefix: Path, options: dict, longer: bool) -> None:
    old, new = documents(1, 20), documents(2, 60 if longer else 10)
    assert holds_all(dataset(write(prefix, old), samples=60, **options), old)
    write(prefix, new)
    for suffix in (".bin", ".idx"):
        os.utime(f"{prefix}{suffix}", (0, 0))  # put there by hand, older than the index
    assert holds_all(dataset(str(prefix), samples=60, **options), new)
    assert holds_all(dataset(str(prefix), samples=60, split=VALIDATION, **options), new)


def test_a_part_of_a_blend_that_was_made_again_is_read_whole(tmp_path: Path, options: dict) -> None:
    en, ja = documents(1), documents(2)
    prefixes = [write(tmp_path / "en", en), write(tmp_path / "ja", ja)]
    dataset(*prefixes, samples=200, **options)
    write(tmp_path / "ja", ja := documents(3, 60))
    again = dataset(*prefixes, samples=200, **options)
    assert [holds_all(part, texts) for part, texts in zip(again.datasets, (en, ja), strict=True)] == [True, True]


def test_the_next_run_reads_what_the_last_one_built(prefix: Path, options: dict, tmp_path: Path) -> None:
    texts = documents(1)
    write(prefix, texts)
    first = sequences(dataset(str(prefix), **options))
    kept = indices(tmp_path)
    assert len(kept) == 1
    before = kept[0].stat()
    assert sequences(dataset(str(prefix), **options)) == first
    assert kept[0].stat() == before
    with_other_samples = dataset(str(prefix), samples=90, **options)
    assert holds_all(with_other_samples, texts)
    assert len(indices(tmp_path)) == 2


def test_nothing_is_written_with_an_empty_name(prefix: Path, tmp_path: Path) -> None:
    texts = documents(1)
    assert holds_all(dataset(write(prefix, texts), path_to_cache=""), texts)
    assert {path.name for path in tmp_path.rglob("*")} == {"ds", "ja_text_document.bin", "ja_text_document.idx"}


def test_only_its_own_stale_files_are_removed(prefix: Path, options: dict, tmp_path: Path) -> None:
    dataset(write(prefix, documents(1)), **options)
    (stale,) = indices(tmp_path)
    others = {
        stale.with_name("labels.npy"): pickle.dumps({"a": 1}),
        stale.with_name("half.npy"): b"\x93NUMPY",
        stale.with_name("0" * 32 + "-GPTDataset-train-document_index.npy"): b"\x93NUMPY",
        stale.with_name("mine.index"): b"",
        stale.with_name("mine.part"): b"",
        stale.parent.parent / "labels.npy": b"",
        stale.parent / "deeper" / stale.name: b"",
    }
    for path, content in others.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    leftover = stale.with_name("0" * 32 + ".part")
    leftover.write_bytes(b"of a killed process")
    dataset(write(prefix, documents(2)), **options)
    assert not stale.exists()
    assert not leftover.exists()
    assert {path: path.read_bytes() for path in others} == others


def test_an_index_in_use_stays_until_it_is_not(prefix: Path, options: dict, tmp_path: Path) -> None:
    old = dataset(write(prefix, documents(1)), **options)
    (stale,) = indices(tmp_path)
    dataset(write(prefix, documents(2)), **options)
    assert stale.exists()
    del old
    gc.collect()
    dataset(write(prefix, documents(3)), **options)
    assert not stale.exists()


def test_datasets_of_one_name_in_a_shared_folder_keep_their_indices(tmp_path: Path) -> None:
    shared = {"path_to_cache": str(tmp_path / "shared")}
    for name in ("one", "two"):
        dataset(write(tmp_path / name / "ja", documents(1 if name == "one" else 2)), **shared)
    assert len(indices(tmp_path / "shared")) == 2


@pytest.mark.parametrize("kept", [0, 5, 40, 200, -4, -1])
def test_a_damaged_index_is_built_again(prefix: Path, tmp_path: Path, kept: int) -> None:
    texts = documents(1)
    dataset(write(prefix, texts))
    (index,) = indices(tmp_path)
    whole = index.read_bytes()
    index.write_bytes(whole[:kept])
    assert holds_all(dataset(str(prefix)), texts)
    assert index.read_bytes() == whole
    assert indices(tmp_path) == [index]


class Job:
    """A process that builds a dataset, and stops at a chosen point until it is told to go on."""

    def __init__(self, point: str, prefix: Path, texts: list[list[int]]):
        self.reached, self.go_on = FORK.Event(), FORK.Event()
        self.process = FORK.Process(target=self._work, args=(point, prefix, texts))
        self.process.start()
        assert self.reached.wait(60)

    def _work(self, point: str, prefix: Path, texts: list[list[int]]) -> None:
        for owner, name in (index_cache, "_store"), (os, "fsync"), (os, "link"), (index_cache, "_tidy"):
            if name == point:
                setattr(owner, name, self._stop_before(getattr(owner, name)))
        assert holds_all(dataset(str(prefix)), texts)

    def _stop_before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def stop(*args: Any) -> Any:
            self.reached.set()
            self.go_on.wait()
            return call(*args)

        return stop

    def finish(self) -> int | None:
        self.go_on.set()
        self.process.join(60)
        return self.process.exitcode

    def kill(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()


POINTS = ["_store", "fsync", "link", "_tidy"]  # before writing, half written, written, in place


@pytest.mark.parametrize("point", POINTS)
def test_two_jobs_that_start_together_both_read_their_data(prefix: Path, tmp_path: Path, point: str) -> None:
    texts = documents(1)
    write(prefix, texts)
    first = Job(point, prefix, texts)
    assert holds_all(dataset(str(prefix)), texts)
    assert first.finish() == 0
    assert len(indices(tmp_path)) == 1


@pytest.mark.parametrize("point", POINTS)
def test_a_job_on_new_data_leaves_one_on_the_old_alone(prefix: Path, tmp_path: Path, point: str) -> None:
    """The second job tidies up while the first is at work with the data that it opened."""
    old, new = documents(1), documents(2)
    write(prefix, old)
    first = Job(point, prefix, old)
    for suffix in (".bin", ".idx"):
        os.rename(f"{prefix}{suffix}", f"{prefix}.old{suffix}")
    built = dataset(write(prefix, new))
    assert holds_all(built, new)
    assert first.finish() == 0
    assert holds_all(dataset(str(prefix)), new)


@pytest.mark.parametrize("point", POINTS)
def test_what_a_killed_job_left_is_passed_over_and_removed(prefix: Path, tmp_path: Path, point: str) -> None:
    texts = documents(1)
    write(prefix, texts)
    Job(point, prefix, texts).kill()
    assert holds_all(dataset(str(prefix), samples=50), texts)  # another index beside it
    assert not list(tmp_path.rglob("*.part"))


def test_a_part_in_use_is_not_a_leftover(prefix: Path, tmp_path: Path) -> None:
    texts = documents(1)
    write(prefix, texts)
    job = Job("fsync", prefix, texts)
    dataset(str(prefix), samples=50)
    assert len(list(tmp_path.rglob("*.part"))) == 1
    assert job.finish() == 0


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """A function that makes a mounted folder read-only, and the folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs a file system that can be mounted read-only, and root for that")

    def protect() -> Path:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        return disk

    try:
        yield protect
    finally:
        gc.collect()
        subprocess.run(["umount", "-l", str(disk)], check=True)


@contextlib.contextmanager
def run_folder(folder: Path | None) -> Iterator[None]:
    state = AppState()
    before, state._log_dir = state.log_dir, folder
    try:
        yield
    finally:
        state._log_dir = before


def test_data_that_cannot_be_written_keep_their_index_in_the_runs_folder(
    tmp_path: Path, read_only: Callable[[], Path], caplog: pytest.LogCaptureFixture
) -> None:
    texts = documents(1)
    prefix = write(tmp_path / "disk/ja", texts)
    read_only()
    with run_folder(tmp_path / "run"):
        first = dataset(prefix)
        assert holds_all(first, texts)
        (kept,) = indices(tmp_path / "run" / "index_cache")
        assert sequences(dataset(prefix)) == sequences(first)
    with run_folder(None):
        assert holds_all(dataset(prefix), texts)
    assert "ja/cache (Read-only file system)" in caplog.text
    assert f"kept in {kept.parent}" in caplog.text


def test_an_index_beside_data_that_cannot_be_written_is_read(tmp_path: Path, read_only: Callable[[], Path]) -> None:
    prefix = write(tmp_path / "disk/ja", documents(1))
    built = sequences(dataset(prefix))
    read_only()
    with run_folder(tmp_path / "run"):
        assert sequences(dataset(prefix)) == built
    assert not (tmp_path / "run").exists()


def test_a_named_folder_that_cannot_be_written_is_refused(tmp_path: Path, read_only: Callable[[], Path]) -> None:
    prefix = write(tmp_path / "ds/ja", documents(1))
    named = str(read_only())
    with pytest.raises(CptError, match=r"cannot be written to .*disk/ja-.*Read-only.*data\.index_mapping_dir=FOLDER"):
        dataset(prefix, path_to_cache=named)


def test_a_full_disk_leaves_no_part(tmp_path: Path, read_only: Callable[[], Path]) -> None:
    texts = documents(1)
    prefix = write(tmp_path / "disk/ja", texts)
    with contextlib.suppress(OSError), open(tmp_path / "disk/full", "wb", buffering=0) as full:
        while full.write(bytes(2**16)):
            pass
    with run_folder(tmp_path / "run"):
        assert holds_all(dataset(prefix, samples=3000), texts)
    assert indices(tmp_path / "disk") == []


def two_ranks(prefix: str, texts: list[list[int]], caches: list[str]) -> None:
    torch.distributed.init_process_group("gloo")
    assert holds_all(dataset(prefix, path_to_cache=caches[torch.distributed.get_rank()]), texts)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("own_disks", [False, True])  # of the ranks' nodes, which do not see each other's files
def test_every_rank_finds_or_builds_its_index(prefix: Path, tmp_path: Path, own_disks: bool) -> None:
    texts = documents(1)
    write(prefix, texts)
    caches = [str(tmp_path / f"cache{rank * own_disks}") for rank in range(2)]
    log = tmp_path / "log"
    assert jobs.run(functools.partial(two_ranks, str(prefix), texts, caches), 2, log) == 0, log.read_text()
    assert len(indices(tmp_path)) == 1 + own_disks


def train(world: Path, data: Path, name: str, wait_for: Path | None = None) -> None:
    """Train two steps; where there is something to wait for, in the middle of writing the index."""
    if wait_for:
        sync = os.fsync

        def sync_late(descriptor: int) -> None:
            (world / f"{name}_is_writing").touch()
            while not wait_for.exists():
                time.sleep(0.05)
            sync(descriptor)

        index_cache.os.fsync = sync_late
    recipe = tiny.continual_pretrain(
        str(world / "base"), Blend({str(data / "ja_train"): 1.0}, {"ja": str(data / "ja_validation")}), name=name,
        directory=str(world / "runs"), seq_length=64, global_batch_size=8, max_steps=2, val_check_interval=2,
    )  # fmt: skip
    run.run(recipe, direct=True)


def losses(world: Path, name: str) -> list[float]:
    lines = read_metrics(world / "runs" / name)
    return [line["reduced_train_loss"] for line in lines if "reduced_train_loss" in line]


def copy_datasets(world: Path, folder: Path) -> Path:
    """The datasets without an index."""
    folder.mkdir(exist_ok=True)
    for file in (world / "ds").glob("ja_*.*"):
        shutil.copy(file, folder)
    return folder


def test_two_trainings_that_start_together_on_fresh_data_both_train(world: Path, tmp_path: Path) -> None:
    data = copy_datasets(world, tmp_path / "fresh")
    done, log = tmp_path / "second_is_done", tmp_path / "log"
    first = jobs.launch(functools.partial(train, world, data, "first", wait_for=done), log=log)
    while not (world / "first_is_writing").exists():
        assert first[0].is_alive(), log.read_text()[-3000:]
        time.sleep(0.05)
    assert jobs.run(functools.partial(train, world, data, "second"), log=log) == 0, log.read_text()[-3000:]
    done.touch()
    assert jobs.wait(first, log) == 0, log.read_text()[-3000:]
    assert losses(world, "first") == losses(world, "second")
    assert len(losses(world, "first")) == 2


def test_a_training_reads_data_that_cannot_be_written(
    world: Path, tmp_path: Path, read_only: Callable[[], Path]
) -> None:
    data = copy_datasets(world, tmp_path / "disk")
    read_only()
    log = tmp_path / "log"
    assert jobs.run(functools.partial(train, world, data, "read_only"), log=log) == 0, log.read_text()[-3000:]
    assert len(losses(world, "read_only")) == 2
    kept = world / "runs/read_only/index_cache"
    assert len(indices(kept)) == 2
    assert f"(Read-only file system): it is kept in {kept}" in log.read_text()
