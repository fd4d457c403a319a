"""The kinds of characters in a corpus, and passages that hold them: on these, encoders are compared.

A kind is a script and a category of Unicode. Tokenizers go by both: they split and normalize by categories, and what
nobody tried them on is mostly another script.
"""

import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass

AROUND = 100  # characters on either side of one of a kind
PER_KIND = 2  # passages for each kind
WHOLE = 1 << 20  # characters in which each document is looked through; of those after, one in `EVERY`
EVERY = 16
PIECE = 1 << 14


@dataclass(frozen=True)
class Passage:
    """A text and the ids that the encoder at work gave for it.

    Attributes:
        text: The text: a whole document, or what stands around a character.
        ids: uint32 ids as bytes.
        kind: Kind of the character, empty for a document.
    """

    text: str
    ids: bytes
    kind: str = ""


def kind_of(character: str) -> str:
    """Return a character's kind, such as `CYRILLIC Lu`; some 750 of them cover Unicode.

    The first word of a letter's, mark's or number's name is its script; other characters go by their block of 256.
    """
    category = unicodedata.category(character)
    name = unicodedata.name(character, "") if category[0] in "LMN" else ""
    return f"{name.split()[0] if name else f'U+{ord(character) >> 8:02X}xx'} {category}"


class Lookout:
    """Looks for kinds of characters in texts that come one batch after the other.

    Attributes:
        found: Texts returned so far, by kind.
    """

    def __init__(self, every: int = EVERY) -> None:
        import numpy as np

        self.found: Counter[str] = Counter()
        self._every, self._looked, self._texts = every, 0, 0
        # A table of all code points (1.1 MB), not a set: looking up is one indexing for a whole text.
        self._seen = np.zeros(sys.maxunicode + 1, np.bool_)

    def look(self, texts: list[str]) -> list[tuple[str, int, str]]:
        """Return the kinds that were rarely found so far: each with a text's number and a character of it."""
        # Whole at first, since most kinds come early; then a sample, for what comes late.
        step = self._every if self._looked > WHOLE else 1
        # Every `step`-th text of all so far, whatever the batches' sizes.
        chosen = range(-self._texts % step, len(texts), step)
        self._texts += len(texts)
        news = []
        for character in self._new_characters("".join(texts[number] for number in chosen)):
            # Names are slow to look up, and `_new_characters` gives each character once.
            if self.found[kind := kind_of(character)] < PER_KIND:
                self.found[kind] += 1
                news.append((kind, next(number for number in chosen if character in texts[number]), character))
        return news

    def _new_characters(self, text: str) -> list[str]:
        import numpy as np

        self._looked += len(text)
        # UTF-32: one number a character.
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        characters: list[str] = []
        for begin in range(0, len(points), PIECE):  # few are new after the first piece: less to sort
            piece = points[begin : begin + PIECE]
            new = np.unique(piece[~self._seen[piece]])
            self._seen[new] = True
            characters += map(chr, new)
        return characters


def around(text: str, character: str) -> str:
    """Return the first such character of a text with up to `AROUND` characters on either side."""
    at = text.index(character)
    return text[max(at - AROUND, 0) : at + AROUND + 1]
