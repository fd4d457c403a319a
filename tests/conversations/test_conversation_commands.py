"""`nemo-cpt prepare --template`, `inspect` and `synthesize` as people type them."""

import json
from importlib.resources import files
from pathlib import Path

import pytest

from nemo_cpt.cli import main
from tests.conversations.helpers import pairs, write_lines

CHATS = files("nemo_cpt.demo") / "conversations"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["nemo-cpt", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_packaged_conversations(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chats, output = [CHATS / "ja.jsonl", CHATS / "en.jsonl"], tmp_path / "sft" / "both"
    assert run(monkeypatch, "prepare", *chats, "-o", output, "-t", small, "--template", "alpaca-ja", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["conversations"], report["forms"]) == (300, {"query/answer": 300})
    assert run(monkeypatch, "inspect", output, "--samples", 1, "--seq-length", 512) == 0
    shown = capsys.readouterr().out
    assert "⟦富士山です。標高は3,776メートルで、静岡県と山梨県にまたがっています。<|endoftext|>⟧" in shown
    assert "### 指示:\n日本で一番高い山は何ですか。" in shown
    assert "of 512:" in shown


def test_200_japanese_and_100_english_ones_all_different() -> None:
    questions = {}
    for name, count in (("ja", 200), ("en", 100)):
        values = [json.loads(line) for line in (CHATS / f"{name}.jsonl").read_text("utf-8").splitlines()]
        assert len(values) == count
        assert all(value["query"].strip() and value["answer"].strip() for value in values)
        questions |= {value["query"]: name for value in values}
    assert len(questions) == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--template", "chatml", "--verify", "3"], "--verify belongs to texts"),
        (["--template", "chatml", "--no-append-eod"], "--append-eod belongs to texts"),
        (["--train-on", "all"], "--train-on belongs to conversations: name their --template too"),
        (["--seq-length", "512"], "--seq-length belongs to conversations"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chats = write_lines(tmp_path / "chats.jsonl", pairs(2))
    assert run(monkeypatch, "prepare", chats, "-o", tmp_path / "out" / "set", "-t", small, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bad_line_is_one_line_and_exit_code_2(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = write_lines(tmp_path / "chats.jsonl", [*pairs(2), {"query": "q", "answer": ""}])
    assert run(monkeypatch, "prepare", chats, "-o", tmp_path / "set", "-t", small, "--template", "chatml") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nemo-cpt: {chats}, line 3, byte offset ")
    assert error.count("\n") == 1


def test_questions_from_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = files("nemo_cpt.demo") / "corpus" / "ja.jsonl"
    assert run(monkeypatch, "synthesize", corpus, "-o", tmp_path / "chats") == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}/chats/train.jsonl\t150 questions" in shown
    assert f"{tmp_path}/chats/validation.jsonl\t50 questions" in shown
