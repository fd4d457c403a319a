"""What kind of character each one is, for counting millions of them at once."""

import sys
import unicodedata
from enum import IntEnum
from functools import cache
from typing import Any


class Kind(IntEnum):
    """A kind of character, as the rules count them."""

    OTHER = 0
    HIRAGANA = 1  # U+3041 to U+3096
    KATAKANA = 2  # U+30A1 to U+30FA
    HAN = 3
    HANGUL = 4
    LATIN = 5
    LETTER = 6  # of any other script, and marks
    DIGIT = 7
    SPACE = 8
    NEWLINE = 9
    COMMA = 10  # 、 and ，
    STOP = 11  # 。．！？
    PUNCTUATION = 12  # all else, ASCII's full stop included
    SYMBOL = 13
    UNREADABLE = 14  # U+FFFD, private use, unassigned


KINDS = len(Kind)
LETTERS = (Kind.HIRAGANA, Kind.KATAKANA, Kind.HAN, Kind.HANGUL, Kind.LATIN, Kind.LETTER)
# As Swallow counts Japanese characters (github.com/swallow-llm/swallow-corpus, quality.py)
JAPANESE = (Kind.HIRAGANA, Kind.KATAKANA, Kind.HAN, Kind.COMMA, Kind.STOP)
_OF_CATEGORY = {"L": Kind.LETTER, "M": Kind.LETTER, "N": Kind.DIGIT, "Z": Kind.SPACE, "P": Kind.PUNCTUATION}
_OF_CATEGORY |= {"S": Kind.SYMBOL, "C": Kind.OTHER}
_RANGES = (
    (Kind.HIRAGANA, ((0x3041, 0x3096),)),
    (Kind.KATAKANA, ((0x30A1, 0x30FA),)),
    (Kind.HAN, ((0x3005, 0x3005), (0x3007, 0x3007), (0x303B, 0x303B), (0x3400, 0x9FFF), (0xF900, 0xFAFF))),
    (Kind.HAN, ((0x20000, 0x3FFFF),)),
    (Kind.HANGUL, ((0x1100, 0x11FF), (0x3131, 0x318E), (0xA960, 0xA97C), (0xAC00, 0xD7A3))),
    (Kind.UNREADABLE, ((0xE000, 0xF8FF), (0xFFFD, 0xFFFD), (0xF0000, 0x10FFFF))),
)
_SINGLE = {Kind.NEWLINE: "\n", Kind.SPACE: "\t\r", Kind.COMMA: "、，", Kind.STOP: "。．！？"}


@cache
def kinds() -> Any:
    """Return the `Kind` of each code point, as an array of bytes."""
    import numpy as np

    table = np.zeros(sys.maxunicode + 1, np.uint8)
    # Beyond U+1FFFF there are ideographs (below), and what nobody uses.
    for code in range(0x20000):
        table[code] = _kind(chr(code))
    # What comes later wins: categories, then whole scripts, then single marks.
    for kind, ranges in _RANGES:
        for first, last in ranges:
            table[first : last + 1] = kind
    for kind, characters in _SINGLE.items():
        table[[ord(character) for character in characters]] = kind
    return table


@cache
def folded() -> Any:
    """Return, for each code point, that of the same character without width and case; 0 for spaces.

    Compatibility forms that are several characters (㈱) stay as they are.
    """
    import numpy as np

    table = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    for code in range(0x20000):
        # NFKC undoes width and makes one of all kinds of spaces; beyond these planes is neither width nor case.
        plain = unicodedata.normalize("NFKC", chr(code)).lower()
        if not plain or plain.isspace():
            table[code] = 0
        elif len(plain) == 1:
            table[code] = ord(plain)
    return table


def _kind(character: str) -> Kind:
    category = unicodedata.category(character)
    if category == "Cn":
        return Kind.UNREADABLE
    kind = _OF_CATEGORY[category[0]]
    # Names are slow to look up, and beyond Latin Extended-C hardly any letter is Latin.
    latin = kind is Kind.LETTER and ord(character) < 0x2C80 and "LATIN" in unicodedata.name(character, "")
    return Kind.LATIN if latin else kind
