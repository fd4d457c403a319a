"""What is computed for all places at once is what a loop over them finds."""

import random
import unicodedata
from collections import Counter
from itertools import combinations, permutations
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_cpt.cleaning.contamination import Index
from nemo_cpt.cleaning.document import Document
from nemo_cpt.cleaning.duplicates import Duplicates, find_duplicates, sketch
from nemo_cpt.cleaning.repetition import character_ngrams
from nemo_cpt.corpus.splitting.duplicates import LEAST_SIMILARITY, HeldOut, plain_codes, sketches


def shingles(text: str) -> set[str]:
    plain = "".join(text.split())
    return {plain[start : start + 5] for start in range(len(plain) - 4)}


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def test_ngrams_of_a_long_document() -> None:
    noise = random.Random(2)
    text = "".join(noise.choice("あいうえおかきくけこ漢字。") for _ in range(20_000))
    for found in character_ngrams(Document(text).codes, 6):
        counts = Counter(text[start : start + found.size] for start in range(len(text) - found.size + 1))
        repeated = sum(count > 1 for count in counts.values())
        assert found[1:] == (counts.total(), len(counts), repeated, max(counts.values()))


def test_near_duplicates_are_those_that_are_similar(tmp_path: Path, japanese: list[str]) -> None:
    noise, texts = random.Random(3), list[str]()
    for text in japanese[:12]:
        for share in (0.0, 0.01, 0.03, 0.1, 0.3):  # of the characters that are others than in the original
            changed = [noise.choice("亜唖娃阿哀愛挨") if noise.random() < share else character for character in text]
            texts.append("".join(changed))
    sketch([Document(text).plain for text in texts], [1] * len(texts)).tofile(tmp_path / "rows")
    found = {each.document: each for each in find_duplicates(tmp_path / "rows", Duplicates(near=0.8))}
    similar = Counter[int]()
    for first, second in combinations(range(len(texts)), 2):
        share = jaccard(texts[first], texts[second])
        similar[second] = max(similar[second], round(1000 * share))
    # The estimate's standard deviation at 0.8 is 0.035.
    assert all(similar[number] > 680 for number in found)
    assert all(number in found for number, share in similar.items() if share > 920)
    assert all(each.of < each.document and each.of not in found for each in found.values())


def test_at_the_least_similarity_that_is_taken_most_pairs_are_found(tmp_path: Path) -> None:
    """In a cleaning and in a split, by a threshold below theirs: of 40 pairs whose 5-grams agree by a half or more."""
    noise, missed = random.Random(0), Counter[str]()
    for _ in range(40):
        same, *others = ("".join(noise.choices(ascii_lowercase, k=count)) for count in (700, 300, 300))
        texts = [same + other for other in others]
        assert LEAST_SIMILARITY < jaccard(*texts) < 0.6
        sketch([Document(text).plain for text in texts], [1, 1]).tofile(tmp_path / "rows")
        found = find_duplicates(tmp_path / "rows", SimpleNamespace(exact=False, near=0.3))
        missed["cleaning"] += not found
        held_out = HeldOut(0.3)
        held_out.add(0, sketches([plain_codes(texts[0])])[0])
        held_out.complete()
        missed["split"] += held_out.duplicates([1], texts[1:]) != ["near"]
    assert max(missed.values()) <= 10, missed


@settings(max_examples=60, deadline=None)
@given(
    sets=st.lists(st.text(alphabet="あいう、 。", max_size=30), max_size=4),
    text=st.text(alphabet="あいう、 。", max_size=60),
)
def test_shared_ngrams_of_characters(sets: list[str], text: str) -> None:
    def grams(whole: str, size: int) -> set[str]:
        letters = [character for character in whole if character in "あいう"]
        return {"".join(letters[start : start + size]) for start in range(len(letters) - size + 1)}

    wanted, sizes = set[str](), {8}
    for each in sets:
        length = sum(character in "あいう" for character in each)
        if length * 2 >= 8:
            sizes.add(min(length, 8))
            wanted |= grams(each, min(length, 8))
    expected = {gram for size in sizes for gram in grams(text, size)} & wanted
    assert Index(sets, 8, by_characters=True).count(Document(text)) == len(expected)


def test_words_are_compared_without_case_and_marks() -> None:
    index = Index(["Don't stop: the well-known “Quick Brown” fox JUMPED (over) it"], 8, by_characters=False)
    assert index.count(Document("So dont stop the wellknown quick brown fox jumped over it.")) == 3
    assert index.count(Document("So do not stop the known quick brown fox leaping over it.")) == 0


@pytest.mark.parametrize(
    "text", ["ガソリンでバイクが動く。", "한국에서 온 학생이고", "Zürich wäre für müde Gäste schön"]
)
def test_composed_and_decomposed_characters_are_the_same(text: str) -> None:
    by_characters = not text.startswith("Z")
    shared = Index([text], 6, by_characters).count(Document(text))
    for one, other in permutations(unicodedata.normalize(form, text) for form in ("NFC", "NFD")):
        assert Index([one], 6, by_characters).count(Document(other)) == shared > 0
