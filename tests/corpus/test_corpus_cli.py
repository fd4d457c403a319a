"""The commands prepare, inspect, split and fetch, run as a user runs them."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

from nemo_cpt.cleaning import clean
from nemo_cpt.cleaning.rules import Rules
from nemo_cpt.corpus import prepare
from nemo_cpt.corpus.fetching.known_corpora import CORPORA


def nemo_cpt(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemo_cpt.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_split_prepare_and_inspect(tmp_path: Path, jsonl: Path, small: Path, texts: list[str]) -> None:
    held_out = nemo_cpt("split", jsonl, "-o", tmp_path / "sets", "--validation", "0.1", "--json")
    documents = json.loads(held_out.stdout)["documents"]
    assert sum(documents.values()) == len(texts)

    arguments = ("prepare", tmp_path / "sets" / "train.jsonl", "-o", tmp_path / "ds", "-t", small)
    first = nemo_cpt(*arguments)
    assert (first.returncode, "(written)" in first.stdout) == (0, True)
    again = json.loads(nemo_cpt(*arguments, "--json").stdout)
    assert (again["status"], again["documents"]) == ("unchanged", documents["train"])

    shown = nemo_cpt("inspect", tmp_path / "ds", "-t", small)
    assert f"documents\t{documents['train']:,}" in shown.stdout.splitlines()
    as_json = json.loads(nemo_cpt("inspect", tmp_path / "ds", "--json").stdout)
    assert as_json["tokens"] == again["tokens"]


def test_a_split_says_what_it_leaves_out(tmp_path: Path) -> None:
    asked = [{"instruction": f"Question {number % 40}", "output": f"Answer {number}"} for number in range(120)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    options = ("--json-key", "instruction", "--validation", "0.3")
    shown = nemo_cpt("split", tmp_path / "a.jsonl", "-o", tmp_path / "sets", *options).stdout
    held_out = len((tmp_path / "sets" / "validation.jsonl").read_text().splitlines())
    assert held_out > 1
    assert f"repeated\t{2 * held_out} held-out copies of others, of which a drawn set has one" in shown.splitlines()


def on_a_terminal(*arguments: object) -> str:
    """Run a command on a terminal of 60 columns and return what it shows there."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "nemo_cpt.cli", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "60", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_paths_are_shown_whole(tmp_path: Path, jsonl: Path, small: Path) -> None:
    prefix = tmp_path / "[ja]-8b" / ("a-long-name-" * 8) / "ds[bold]"
    done = nemo_cpt("prepare", jsonl, "-o", prefix, "-t", small)
    assert f"dataset\t{prefix}_text_document (written)" in done.stdout.splitlines()
    piped = nemo_cpt("inspect", prefix, "-t", small).stdout
    assert f"dataset\t{prefix}_text_document" in piped.splitlines()
    assert "tokens a document\tdocuments\tshare of the tokens" in piped.splitlines()
    shown = on_a_terminal("inspect", prefix, "-t", small)
    assert "█" in shown
    assert f"{prefix}_text_document" in "".join(shown.split())
    assert on_a_terminal("prepare", jsonl, "-o", prefix, "-t", small, "--overwrite").count("[bold]") >= 2  # and the bar


def test_outputs_and_numbers_that_cannot_work(tmp_path: Path, jsonl: Path, small: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, message in (
        (("prepare", jsonl, "-o", tmp_path / "file" / "ja", "-t", small), "Cannot make the folder"),
        (("prepare", jsonl, "-o", tmp_path / "ds", "-t", small, "--verify", "-1"), "verify is -1"),
        (("split", jsonl, "-o", tmp_path / "file" / "ja"), "Cannot make the folder"),
        (("split", jsonl, "-o", tmp_path / "sets", "--workers", "-1"), "workers is -1"),
        (("split", jsonl, "-o", tmp_path / "sets", "--validation", "10%"), "10% is no share: write it as 0.1"),
        (("fetch", "https://localhost/x", "-o", tmp_path / "file" / "x"), "Cannot make the folder"),
        (("inspect", tmp_path / "ds", "--samples", "-1"), "samples is -1"),
    ):
        done = nemo_cpt(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr


def test_errors_end_with_code_2_and_no_traceback(tmp_path: Path, small: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{bad\n')
    result = nemo_cpt("prepare", tmp_path / "bad.jsonl", "-o", tmp_path / "ds", "-t", small)
    assert result.returncode == 2
    assert "bad.jsonl, line 2, byte offset 15: not JSON" in result.stderr
    assert "Traceback" not in result.stderr
    skipping = ("prepare", tmp_path / "bad.jsonl", "-o", tmp_path / "ds", "-t", small, "--on-error", "skip", "--json")
    refused = nemo_cpt(*skipping)
    assert refused.returncode == 2
    assert "1 of 2 lines give no text (not_json 1): 50 %" in refused.stderr
    skipped = nemo_cpt(*skipping, "--max-skipped", "0.5")
    assert json.loads(skipped.stdout)["skipped"] == {"not_json": 1}


def test_fetch_lists_what_it_knows() -> None:
    assert json.loads(nemo_cpt("fetch", "--json").stdout).keys() == CORPORA.keys()
    unknown = nemo_cpt("fetch", "nix")
    assert (unknown.returncode, "no corpus 'nix'" in unknown.stderr) == (2, True)


def test_help_and_preparing_import_neither_torch_nor_nemo(tmp_path: Path, jsonl: Path, small: Path) -> None:
    code = (
        "import sys; from nemo_cpt.corpus import prepare; "
        f"prepare({str(jsonl)!r}, {str(tmp_path / 'ds')!r}, {str(small)!r}, quiet=True); "
        "print([m for m in ('torch', 'nemo', 'megatron', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_progress_is_plain_lines_where_there_is_no_terminal(tmp_path: Path, jsonl: Path, small: Path) -> None:
    code = (
        "from nemo_cpt.corpus.progress import ProgressBar\n"
        "with ProgressBar('ds', 10_000_000, interval=0) as bar:\n"
        "    bar.update(0)\n    bar.update(5_000_000, 100, 2_000_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == ""
    assert "ds: 50 % of 10 MB" in done.stderr.splitlines()[-1]
    assert "documents/s" in done.stderr
    assert "\x1b" not in done.stderr


ONE_PROCESS = """
import json, sys
from nemo_cpt.cli import main
for arguments in json.load(sys.stdin):
    sys.argv = ["nemo-cpt", *arguments]
    try:
        main()
    except SystemExit as ended:
        print(f"code {ended.code or 0}", flush=True)
print([name for name in ("torch", "nemo", "nemo_run") if name in sys.modules])
"""


def test_what_runs_no_task_does_not_wait_for_nemo_run(tmp_path: Path, jsonl: Path, small: Path) -> None:
    prepare(jsonl, tmp_path / "ds", small, quiet=True)
    clean(jsonl, tmp_path / "cleaned", Rules("en", ()), quiet=True)
    (tmp_path / "rules.yaml").write_text(Rules("en", ()).to_yaml())
    job = ["prepare", str(jsonl), "-t", str(small), "-o", str(tmp_path / "ds")]
    other = [*job[:-1], str(tmp_path / "other")]
    cleaning = ["clean", str(jsonl), "--config", str(tmp_path / "rules.yaml"), "-o", str(tmp_path / "cleaned")]
    commands = {
        (*job, "--tasks", "2"): "(unchanged)",
        (*cleaning, "--tasks", "2"): "unchanged",
        (*job, "--tasks", "0"): "tasks is 0",
        (*other, "--tasks", "2", "--dry-run"): "nothing: this is a dry run",
        (*other, "--tasks", "2", "--executor", "docker"): "--tasks with docker: its machines are not known to share",
        (*other, "--tasks", "2", "--executor", "slrm"): "there is no executor 'slrm' (near: slurm)",
        (*other, "--tasks", "2", "executor.gpuss=1"): "local has no parameter executor.gpuss",
        (*other, "--tasks", "2", "--detach"): "--detach is for a scheduler's jobs",
    }
    command, asked = [sys.executable, "-c", ONE_PROCESS], json.dumps(list(commands))
    done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert {each: each in said for each in commands.values()} == dict.fromkeys(commands.values(), True), said
    assert done.stdout.splitlines()[-1] == "[]"
    assert not list(tmp_path.glob("other*"))
