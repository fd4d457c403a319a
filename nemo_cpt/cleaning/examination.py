"""One document before all rules."""

from dataclasses import dataclass
from pathlib import Path

from nemo_cpt.arguments import checked
from nemo_cpt.cleaning.document import Document
from nemo_cpt.cleaning.rule import Check
from nemo_cpt.cleaning.rules import Rules
from nemo_cpt.corpus.reading.chunks import Feed
from nemo_cpt.corpus.reading.lines import Reading, TextUnder
from nemo_cpt.corpus.reading.records import read_records
from nemo_cpt.corpus.reading.sources import list_sources
from nemo_cpt.errors import CptError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Examination:
    """What the rules found in a document.

    Attributes:
        document: As they left it.
        checks: What was measured, each with the rule's name, in order.
        failed: The first check that failed, with its rule's name; None for a document that is kept.
    """

    document: Document
    checks: list[tuple[str, Check]]
    failed: tuple[str, Check] | None


@checked
def examine(text: str, rules: Rules, to_the_end: bool = False) -> Examination:
    """Take a text through the rules.

    Args:
        text: The text.
        rules: The rules; those about the whole corpus are not asked.
        to_the_end: Ask also the rules behind the first that fails.
    """
    document, checks, failed = Document(text), list[tuple[str, Check]](), None
    for rule in rules.rules:
        # Rules are generators that change the document as they go: one that is left half way has changed it so far.
        for check in rule.apply(document):
            checks.append((rule.name, check))
            if failed is None and not check.passes:
                failed = (rule.name, check)
                if not to_the_end:
                    return Examination(document, checks, failed)
    return Examination(document, checks, failed)


@checked
def explain(place: str, rules: Rules, json_key: str = "text") -> Examination:
    """Take one document of an input through all rules.

    Args:
        place: `FILE:LINE`; the line (row) counts from 1, also in a compressed file or a table.
        rules: The rules.
        json_key: The field that holds the text.

    Raises:
        CptError: There is no such file or line, or it holds no text.
    """
    path, _, number = place.rpartition(":")
    if not path or not number.isascii() or not number.isdigit() or int(number) < 1:
        raise CptError(f"--explain {place}: write FILE:LINE, such as data/ja.jsonl:12; lines count from 1.")
    rules.load()
    return examine(_text_at(path, int(number), json_key), rules, to_the_end=True)


def _text_at(path: str, number: int, json_key: str) -> str:
    if not Path(path).is_file():
        raise CptError(f"--explain: there is no file {path}.")
    passed = 0
    for task in Feed(list_sources(path), None, _CHUNK):
        reading = Reading()
        for record in read_records(task, TextUnder(json_key), reading):
            if passed + reading.lines == number:
                return record.text
        # The line is in this chunk, and no record came of it.
        if passed + reading.lines >= number:
            problem = next(
                (each.detail for each in reading.problems if passed + each.line + 1 == number), "it is blank"
            )
            raise CptError(f"{path}, line {number}: {problem}.")
        passed += reading.lines
    raise CptError(f"{path} has {passed:,} lines; there is no line {number:,}.")
