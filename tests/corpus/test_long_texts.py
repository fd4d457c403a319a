"""Files of plain text that are one document, and seem to hold many."""

import json
import shutil
import subprocess
from pathlib import Path

from nemo_cpt.corpus import prepare
from nemo_cpt.corpus.reading.long_texts import BOOK_BYTES, MANY_LINES, long_texts
from nemo_cpt.corpus.reading.sources import list_sources
from tests.corpus.test_corpus_cli import nemo_cpt


def book(path: Path, paragraphs: int = 4000) -> Path:
    """Wrapped lines, and a blank one behind each paragraph, as books are typeset."""
    path.write_text("Call me Ishmael. Some years ago,\nnever mind how long,\nhaving little money.\n\n" * paragraphs)
    return path


def documents(path: Path, lines: int = MANY_LINES) -> Path:
    path.write_text("".join(f"The {number}th document, of a sentence.\n" for number in range(lines)))
    return path


def test_a_document_a_line_is_noticed_with_the_command_that_parts_it(tmp_path: Path) -> None:
    path = documents(tmp_path / "it's mine.txt")
    note = long_texts(list_sources(str(path)))
    assert note.startswith(f"{path} is one document, of about 10,000 lines and ")
    if shutil.which("jq"):
        subprocess.run(note[note.index("jq -Rc") :], shell=True, check=True)
        made = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
        assert len(made) == MANY_LINES
        assert made[1] == {"text": "The 1th document, of a sentence."}


def test_books_are_passed_over(tmp_path: Path) -> None:
    assert long_texts(list_sources(str(book(tmp_path / "one.txt", 40_000)))) == ""
    for number in range(12):  # of many files each is a document, however its lines are
        documents(tmp_path / f"{number}.txt")
    assert long_texts(list_sources(str(tmp_path))) == ""
    lines = tmp_path / "lines.txt"
    lines.write_text('{"text": "JSON lines, whatever the name"}\n' * MANY_LINES)
    assert long_texts(list_sources(str(lines))) == ""


def test_what_is_longer_than_any_book_is_noticed_among_many(tmp_path: Path) -> None:
    for number in range(12):
        book(tmp_path / f"{number}.txt")
    for name in ("11.txt", "9.txt"):
        size = (tmp_path / name).stat().st_size
        (tmp_path / name).write_text((tmp_path / name).read_text() * (BOOK_BYTES // size + 1))
    note = long_texts(list_sources(str(tmp_path)))
    assert note.startswith(f"{tmp_path}/11.txt and 1 more of the inputs are one document each, the first of about ")


def test_the_command_says_it_beforehand_and_prepare_in_its_report(tmp_path: Path, small: Path) -> None:
    path = documents(tmp_path / "corpus.txt", 20_000)
    for command in (["prepare", "-t", str(small)], ["split"]):
        done = nemo_cpt(command[0], str(path), "-o", str(tmp_path / command[0] / "out"), *command[1:])
        assert f"note: {path} is one document, of about 20,000 lines" in done.stderr, done.stderr
    report = prepare(str(path), tmp_path / "again", str(small), quiet=True)
    assert report.documents == 1
    assert any("A file of plain text is one document." in warning for warning in report.warnings)
