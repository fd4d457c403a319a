"""`nemo-cpt clean` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import yaml


def nemo_cpt(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemo_cpt.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_from_the_rules_shown_to_the_rules_given(tmp_path: Path, corpus: Path) -> None:
    shown = nemo_cpt("clean", "--show-config", "--language", "ja").stdout
    described = yaml.safe_load(shown)
    described["rules"] = [
        each | ({"min_characters": 850} if each["rule"] == "length" else {}) for each in described["rules"]
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(described, allow_unicode=True), "utf-8")
    arguments = ("clean", corpus, "-o", tmp_path / "out", "--config", tmp_path / "rules.yaml")
    done = nemo_cpt(*arguments)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("dropped: length\tcharacters ") for line in done.stdout.splitlines())
    again = json.loads(nemo_cpt(*arguments, "--json").stdout)
    assert again["status"] == "unchanged"
    assert again["dropped"]["length"]["characters"]["documents"] > 0


def test_one_document_is_explained(corpus: Path) -> None:
    shown = nemo_cpt("clean", "--explain", f"{corpus}:2", "--language", "ja").stdout
    assert "length\tcharacters\t" in shown
    assert "verdict\tkept, unless a duplicate" in shown
    found = json.loads(nemo_cpt("clean", "--explain", f"{corpus}:2", "--language", "en", "--json").stdout)
    assert found["dropped_by"] == {"rule": "language", "measure": "language_score"}
    assert [each["rule"] for each in found["checks"]][-1] == "word_repetition"
    found = json.loads(nemo_cpt("clean", "--explain", f"{corpus}:2", "--language", "ja", "--json").stdout)
    assert found["text"] == json.loads(corpus.read_text("utf-8").splitlines()[1])["text"].strip()


def test_mistakes_end_with_code_2_and_one_line(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "rules.yaml").write_text("language: ja\nrules: [{rule: sentences, max_lenght: 3}]\n")
    for arguments, message in (
        (("clean", corpus, "-o", tmp_path / "out"), "give --language"),
        (("clean", corpus, "-o", tmp_path / "out", "--language", "xx"), "no rules for the language 'xx'"),
        (("clean", corpus, "--language", "ja"), "name inputs and --output"),
        (("clean", corpus, "-o", tmp_path / "out", "--config", tmp_path / "rules.yaml"), "did you mean max_length?"),
        (
            ("clean", corpus, "-o", tmp_path / "out", "--language", "ja", "--decontaminate", "no.jsonl"),
            "no input no.jsonl",
        ),
        (("clean", corpus, "-o", tmp_path / "out", "--language", "ko"), "The rules drop all"),
    ):
        done = nemo_cpt(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
    assert not list((tmp_path / "out").glob("*"))
