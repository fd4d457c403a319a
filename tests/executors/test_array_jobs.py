"""Corpora prepared by many tasks, as an array job on a real cluster of two nodes and as processes of this machine."""

import json
import os
import signal
import threading
from importlib.resources import files
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_cpt.cleaning import clean
from nemo_cpt.cli import app, cleaning  # noqa: F401  registers the command
from nemo_cpt.corpus import prepare, read_manifest
from nemo_cpt.errors import CptError
from nemo_cpt.executors import local, slurm
from nemo_cpt.launching.arrays import as_ranges
from nemo_cpt.launching.in_tasks import Submitted, prepare_in_tasks
from tests.support.corpus_helpers import same_files, write_jsonl
from tests.support.executor_jobs import git, wait_until

TASKS = 4

# Every Python process of a job imports it: the project is in front of its path.
SITE = """
import os, signal, sys
from pathlib import Path

number, folder = os.environ.get("SLURM_ARRAY_TASK_ID", "join"), Path("FOLDER")
if "nemo_cpt.executors.array_task" in sys.orig_argv:
    with open(folder / f"{number}.started", "a") as file:
        file.write(os.environ["SLURMD_NODENAME"] + "\\n")
    (folder / f"{number}.cpus").write_text(os.environ.get("SRUN_CPUS_PER_TASK", ""))
    if (folder / f"{number}.pause").exists():
        from nemo_cpt.corpus.preparing.journal import Journal
        checkpoint = Journal.checkpoint

        def pause_behind_it(journal, *given):
            checkpoint(journal, *given)
            Journal.checkpoint = checkpoint
            (folder / f"{number}.pid").write_text(str(os.getpid()))
            (folder / f"{number}.pause").unlink()
            (folder / f"{number}.paused").touch()
            signal.pause()

        Journal.checkpoint = pause_behind_it
"""
OPTIONS = {"workers": 1, "chunk_bytes": 8_000, "checkpoint_seconds": 0.0, "quiet": True}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with a corpus of one file, a tokenizer, and what one run makes of the two."""
    from nemo_cpt.demo import base

    folder = tmp_path_factory.mktemp("corpus")
    lines = (files("nemo_cpt.demo") / "corpus" / "en.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    base.train_tokenizer(texts, 400).save_pretrained(folder / "tokenizer")
    write_jsonl(folder / "en.jsonl", texts)
    prepare(folder / "en.jsonl", folder / "one", folder / "tokenizer", quiet=True)
    return folder


@pytest.fixture
def watched(project, tmp_path):
    """The folder in which tasks say that they start, and pause if they are asked to."""
    (project / "sitecustomize.py").write_text(SITE.replace("FOLDER", str(tmp_path)))
    git(project, "add", ".")
    git(project, "commit", "-qm", "watched")
    return tmp_path


def starts(folder):
    """On which nodes each task was started, and the join."""
    return {path.stem: path.read_text().split() for path in folder.glob("*.started")}


def kill_once_it_has_paused(folder, number):
    wait_until((folder / f"{number}.paused").exists)
    os.kill(int((folder / f"{number}.pid").read_text()), signal.SIGKILL)


def test_a_killed_task_alone_is_done_again_and_the_bytes_are_one_runs(slurm_here, watched, corpus):
    def command():
        executor = slurm(tasks_per_node=1, time="5", cpus_per_task=4)  # of a node's eight: two tasks on each
        return prepare_in_tasks(
            corpus / "en.jsonl", watched / "nemo_run x" / "en", corpus / "tokenizer", executor, TASKS, **OPTIONS
        )

    (watched / "2.pause").touch()
    killer = threading.Thread(target=kill_once_it_has_paused, args=(watched, 2), daemon=True)
    killer.start()
    with pytest.raises(
        CptError, match=r"1 of 4 tasks did not end well; the same command runs these alone(.|\n)*task 2: "
    ):
        command()
    killer.join()
    wait_until(lambda: slurm_here.jobs() == [])  # the join does not wait for what will never be
    before = starts(watched)
    assert sorted(before) == ["0", "1", "2", "3"]
    assert {node for nodes in before.values() for node in nodes} == {"cpt1", "cpt2"}
    assert (watched / "0.cpus").read_text() == "4"  # srun does not take it from sbatch by itself
    report = command()
    assert report.status == "written"
    after = starts(watched)
    assert {name: len(nodes) for name, nodes in after.items()} == {"0": 1, "1": 1, "2": 2, "3": 1, "join": 1}
    assert same_files(report.prefix, corpus / "one_text_document")
    assert read_manifest(report.prefix)["inputs"] == read_manifest(corpus / "one")["inputs"]
    assert not (watched / "nemo_run x" / "en_text_document.parts").exists()
    assert command().status == "unchanged"
    assert starts(watched) == after


def test_bad_input_is_told_with_its_line_and_the_log_and_a_detached_command_returns(slurm_here, watched, corpus):
    lines = (corpus / "en.jsonl").read_text().splitlines()
    bad = len(lines) - 1
    (watched / "bad.jsonl").write_text("\n".join([*lines[: bad - 1], "no JSON", lines[-1]]) + "\n")

    def command(**options):
        executor = slurm(tasks_per_node=1, time="5", max_restarts=2)
        return prepare_in_tasks(
            watched / "bad.jsonl", watched / "bad", corpus / "tokenizer", executor, 2, **OPTIONS | options
        )

    with pytest.raises(CptError) as raised:
        command()
    said = str(raised.value)
    assert "1 of 2 tasks did not end well" in said
    assert f"bad.jsonl, line {bad}, byte offset" in said
    log = said.partition("The last lines of ")[2].partition(":\n")[0]
    assert f"line {bad}" in Path(log).read_text()
    assert starts(watched)["1"] == starts(watched)["1"][:1]  # what the user must mend is not tried again
    submitted = command(on_error="skip", max_skipped=0.5, detach=True)
    assert isinstance(submitted, Submitted)
    assert (submitted.tasks, submitted.missing) == (2, 1)
    wait_until(lambda: slurm_here.jobs() == [])
    assert read_manifest(watched / "bad")["skipped"] == {"not_json": 1}


def test_a_task_that_is_told_to_stop_comes_back_by_itself(slurm_here, watched, corpus):
    """As ahead of its time limit, or preempted; meanwhile the same command would do nothing but harm."""

    def command():
        executor = slurm(tasks_per_node=1, time="5", cpus_per_task=2)
        arguments = (corpus / "en.jsonl", watched / "en", corpus / "tokenizer", executor, 2)
        return prepare_in_tasks(*arguments, detach=True, **OPTIONS)

    (watched / "1.pause").touch()
    submitted = command()
    wait_until((watched / "1.paused").exists)
    with pytest.raises(CptError, match=f"experiment {submitted.experiment} is making these parts"):
        command()
    array = slurm_here.run("squeue", "-h", "-n", "cpt.tasks", "-o", "%F").split()[0]
    slurm_here.run("scancel", "--signal=TERM", f"{array}_1")
    wait_until(lambda: slurm_here.jobs() == [])
    assert {name: len(nodes) for name, nodes in starts(watched).items()} == {"0": 1, "1": 2, "join": 1}
    assert same_files(watched / "en_text_document", corpus / "one_text_document")
    (log,) = (watched / "home").rglob("log-cpt.tasks_1.out")
    assert "told to stop" in log.read_text()


def test_a_cleaning_finds_duplicates_over_all_tasks(slurm_here, project, tmp_path):
    """By the command line, which returns at once; the last job joins."""
    texts = [
        json.loads(line)["text"] for line in (files("nemo_cpt.demo") / "corpus" / "ja.jsonl").open(encoding="utf-8")
    ]
    texts = ["\n\n".join(texts[start : start + 3]) for start in range(0, len(texts) - 2, 3)]
    write_jsonl(tmp_path / "ja.jsonl", [*texts, texts[0]])
    one = clean(tmp_path / "ja.jsonl", tmp_path / "one", "ja", workers=1, quiet=True)
    assert one.dropped["duplicates"]["exact"]["documents"] == 1
    command = ["clean", str(tmp_path / "ja.jsonl"), "--output", str(tmp_path / "many"), "--language", "ja"]
    command += ["--tasks", "2", "--executor", "slurm", "executor.time=5", "--detach", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    submitted = json.loads(done.stdout)
    assert (submitted["tasks"], submitted["missing"]) == (2, 2)
    wait_until(lambda: slurm_here.jobs() == [])
    for file in ("kept.jsonl", "dropped.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "many" / file).read_bytes()
    assert not (tmp_path / "many" / "cleaning.parts").exists()


def test_processes_of_this_machine_on_an_executor_of_the_users(project, corpus, tmp_path):
    (tmp_path / "where.py").write_text("from nemo_cpt.executors import local\n\ndef here():\n    return local()\n")
    given = (corpus / "en.jsonl", "-o", tmp_path / "en", "-t", corpus / "tokenizer", "--tasks", 2)
    report = json.loads(printed(*given, "--executor", f"{tmp_path / 'where.py'}:here", "--json"))
    assert report["status"] == "written"
    assert same_files(report["prefix"], corpus / "one_text_document")


@pytest.mark.parametrize(
    ("executor", "detach", "says"),
    [
        (lambda: slurm(nodes=2), False, "leave executor.nodes, tasks_per_node, chain and array away"),
        (lambda: slurm(array="0-3"), False, "leave executor.nodes"),
        (lambda: slurm(chain=2), False, "leave executor.nodes"),
        (lambda: local(), True, "--detach is for a scheduler's jobs"),
    ],
)
def test_executors_of_another_shape_are_refused(project, corpus, tmp_path, executor, detach, says):
    with pytest.raises(CptError, match=says):
        prepare_in_tasks(
            corpus / "en.jsonl", tmp_path / "en", corpus / "tokenizer", executor(), 2, detach=detach, **OPTIONS
        )
    assert not list(tmp_path.glob("en*"))


def printed(*arguments):
    done = CliRunner().invoke(app, ["prepare", *map(str, arguments)], catch_exceptions=True)
    return done.stdout if done.exit_code == 0 else str(done.exception)


def test_the_command_line(project, corpus, tmp_path):
    given = (corpus / "en.jsonl", "-o", tmp_path / "en", "-t", corpus / "tokenizer")
    planned = json.loads(printed(*given, "--tasks", 3, "--dry-run", "--json"))
    assert planned["tasks"] == 3
    assert planned["stored"] == (corpus / "en.jsonl").stat().st_size
    said = printed(*given, "executor.cpus_per_task=4", "--executor", "slurm", "--tasks", 100_000, "--dry-run")
    assert "the inputs cannot be cut into 100000" in said
    assert "say how many with --tasks" in printed(*given, "--executor", "slurm")
    assert "say how many with --tasks" in printed(*given, "executor.time=5")
    assert "has no such directive; near: partition" in printed(
        *given, "executor.partiton=x", "-e", "slurm", "--tasks", 2
    )
    assert "tasks is 0" in printed(*given, "--tasks", 0)
    assert "conversations are prepared by one machine" in printed(*given, "--template", "llama3", "--tasks", 2)
    assert not list(tmp_path.glob("en*"))


def test_fewer_tasks_than_asked_for_are_told(project, corpus, tmp_path, capsys):
    write_jsonl(tmp_path / "two.jsonl", ["a line", "another line"])
    prepare_in_tasks(tmp_path / "two.jsonl", tmp_path / "two", corpus / "tokenizer", local(), 9, **OPTIONS)
    shown = capsys.readouterr()
    assert "2 tasks, not 9" in shown.err
    assert "╯\n" in shown.out  # what is printed next begins a line


def test_ranges_of_an_array():
    assert as_ranges([7, 0, 1, 2, 9, 10]) == "0-2,7,9-10"
