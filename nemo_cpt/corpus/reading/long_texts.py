"""Files of plain text that are one document each, and seem to hold many: a corpus with a document a line, say."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from nemo_cpt.corpus.reading.sources import Source
from nemo_cpt.output import size_of

BOOK_BYTES = 16 << 20  # longer than any novel: the Bible has 4.5 MB
MANY_LINES = 10_000
FEW_DOCUMENTS = 10  # with more, a file is a document as its owner means it
MOST_BLANK = 0.01  # of the lines: books have blank ones between their paragraphs


def long_texts(sources: Sequence[Source]) -> str:
    """Say which of the inputs are one document each and longer than a book, or of many lines; "" for none.

    Raises:
        OSError: one cannot be read.
    """
    found = [(each, lines) for each in sources if each.kind == "text" and (lines := _many(each, len(sources)))]
    if not found:
        return ""
    source, lines = found[0]
    more = f" and {len(found) - 1:,} more of the inputs are one document each, the first" if len(found) > 1 else ""
    name, lines_of = shlex.quote(source.path), shlex.quote(str(Path(source.path).with_suffix(".jsonl")))
    return (
        f"{source.path}{more or ' is one document,'} of about {lines:,} lines and {size_of(source.size)}: a file "
        "of plain text is not parted. If each of its lines is a document, make JSON lines of it: "
        f"jq -Rc 'select(. != \"\") | {{text: .}}' {name} > {lines_of}"
    )


def _many(source: Source, inputs: int) -> int:
    """About how many lines a file has, where it seems to be no single document; else 0."""
    if source.size < BOOK_BYTES and inputs >= FEW_DOCUMENTS:
        return 0
    with open(source.path, "rb") as file:
        beginning = file.read(BOOK_BYTES)
    lines = beginning.splitlines()
    blank = sum(not line.strip() for line in lines)
    if source.size < BOOK_BYTES and (len(lines) - blank < MANY_LINES or blank > MOST_BLANK * len(lines)):
        return 0
    return max(1, len(lines) * source.size // max(len(beginning), 1))
