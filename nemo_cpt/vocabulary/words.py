"""The words of a corpus, as a tokenizer's pre-tokenizer cuts it, and those of them that new tokens are learnt from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from nemo_cpt.corpus.tokenization.characters import kind_of
from nemo_cpt.vocabulary.byte_level import byte_of_character

SCRIPT_SHARE = 0.005  # of a corpus's characters beyond ASCII, from which on a script is one of its own
MOST_WORDS = 1_500_000  # different ones; each takes some 500 bytes while merges are learnt
_TRIM_AT = 3 * MOST_WORDS
_SAME_SCRIPT = {"KATAKANA-HIRAGANA": "KATAKANA", "IDEOGRAPHIC": "CJK"}  # the long vowel mark, and the mark for a repeat
_SHARED_BLOCKS = {f"U+{block:02X}xx" for block in (0x00, *range(0x20, 0x2C))}  # signs of every language: – … “ ” €
_UNMAPPED = str.maketrans({character: chr(byte) for character, byte in byte_of_character().items()})


@dataclass(frozen=True)
class Words:
    """The words that are learnt from, and what the corpus holds in all.

    Attributes:
        counts: by word, written in bytes' characters.
        scripts: those that the words are written in, from the most frequent on.
        characters: of the whole corpus.
        others: words that are left out, with their counts: ASCII, or with a character of another script.
    """

    counts: Counter[str]
    scripts: tuple[str, ...]
    characters: int
    others: Counter[str]


def count_words(backend: Any, texts: Iterable[str]) -> Counter[str]:
    """Count the words that a tokenizer's normalizer and pre-tokenizer make of texts; the rarest are dropped for space.

    Args:
        backend: a `tokenizers.Tokenizer` with a byte-level pre-tokenizer.
        texts: any number.
    """
    counts, floor = Counter[str](), 1
    for text in texts:
        counts.update(words_of(backend, text))
        # Words seen once go first, at the next time those seen twice: what is learnt from is frequent, and stays.
        while len(counts) > _TRIM_AT:
            counts, floor = Counter({word: count for word, count in counts.items() if count > floor}), floor + 1
    return counts


def words_of(backend: Any, text: str) -> list[str]:
    """The words that a tokenizer's normalizer and pre-tokenizer make of a text, in bytes' characters."""
    normalized = backend.normalizer.normalize_str(text) if backend.normalizer else text
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]


def of_own_scripts(counts: Counter[str], characters: int, known: Collection[str]) -> Words:
    """Choose the words that are written in the corpus's own scripts, and in bytes that the tokenizer has tokens for.

    Words of ASCII alone, and those with a character of a script that the corpus has little of, stay as they are in
    every text: what an English text holds of é or “ is not learnt from a Japanese corpus. Bytes without a token
    (SmolLM2's has none for 21 of the 256) are lost in encoding; what stands on their two sides is not side by side.

    Args:
        counts: of all words.
        characters: of the corpus.
        known: the tokens of the model.
    """
    lost = byte_of_character().keys() - set(known)
    texts = {word: text for word in counts if not (text := text_of(word)).isascii() and lost.isdisjoint(word)}
    found = Counter[str]()
    for character, count in _count_characters(texts, counts).items():
        found[script_of(character)] += count
    # Without the shared signs, which are many in any text and would make a script's share of it smaller.
    total = sum(count for script, count in found.items() if script not in _SHARED_BLOCKS)
    own = [script for script, count in found.most_common() if _is_own(script, count, total)]
    allowed = set(own)
    chosen = {word for word, text in texts.items() if _only_in(text, allowed)}
    # What is beyond hardly makes a token, and costs as much memory as the frequent ones.
    most = Counter({word: counts[word] for word in chosen}).most_common(MOST_WORDS)
    others = Counter({word: count for word, count in counts.items() if word not in chosen})
    return Words(Counter(dict(most)), tuple(each for each in own if not each.startswith("U+")), characters, others)


@cache
def script_of(character: str) -> str:
    """A character's script, such as HIRAGANA or CYRILLIC; for a sign, its block of Unicode."""
    script = kind_of(character).split()[0]
    return _SAME_SCRIPT.get(script, script)


def text_of(word: str) -> str:
    """The text of a word that is written in bytes' characters."""
    # Latin-1 writes the characters 0 to 255 as the bytes of these numbers.
    return word.translate(_UNMAPPED).encode("latin-1").decode("utf-8", "replace")


def _count_characters(texts: Mapping[str, str], counts: Counter[str]) -> Counter[str]:
    found = Counter[str]()
    for word, text in texts.items():
        count = counts[word]
        for character in text:
            if character > "\x7f":
                found[character] += count
    return found


def _is_own(script: str, count: int, total: int) -> bool:
    return script not in _SHARED_BLOCKS and count >= SCRIPT_SHARE * total


def _only_in(text: str, scripts: set[str]) -> bool:
    return all(character <= "\x7f" or script_of(character) in scripts for character in text)
