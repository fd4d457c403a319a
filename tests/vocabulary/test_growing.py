"""A grown tokenizer: longer tokens in the new language, and nothing else changed."""

import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer
from nemo_cpt.errors import CptError
from nemo_cpt.vocabulary import grow
from nemo_cpt.vocabulary.byte_level import (
    RECORD,
    ByteLevelBPE,
    ancestor,
    byte_of_character,
    bytes_of,
    grew_from,
    read_byte_level,
)
from nemo_cpt.vocabulary.growing import count_tokens, grown_definition
from nemo_cpt.vocabulary.merging import Learner
from nemo_cpt.vocabulary.words import count_words, of_own_scripts, script_of
from tests.vocabulary.conftest import CORPUS, SPECIAL, texts

JA = str(CORPUS / "ja.jsonl")


def _encode(folder: Path, documents: list[str], split: bool = False) -> list[list[int]]:
    ids, bounds = load_tokenizer(str(folder)).reference_encoder(split).encode(documents)
    return [ids[a:b].tolist() for a, b in zip(bounds[:-1].astype(int), bounds[1:].astype(int), strict=True)]


def _decode(folder: Path, ids: list[int]) -> str:
    return load_tokenizer(str(folder)).reference_encoder().decode(ids)


def test_japanese_has_longer_tokens_and_english_the_same(base: Path, grown: Path) -> None:
    before, after = (sum(map(len, _encode(each, texts("ja")))) for each in (base, grown))
    assert after < 0.65 * before
    assert _encode(base, texts("en")) == _encode(grown, texts("en"))


def test_every_text_comes_back(grown: Path) -> None:
    documents = [
        *texts("ja"),
        *texts("en"),
        "Ελληνικά, русский, العربية, 한국어, 中文\r\n\t x",
        f"a{SPECIAL[2]}b {SPECIAL[0]}",
    ]
    assert [_decode(grown, ids) for ids in _encode(grown, documents)] == documents


def test_ids_special_ids_and_merges_stay(base: Path, grown: Path) -> None:
    old, new = read_byte_level(str(base)), read_byte_level(str(grown))
    assert grew_from(new, old) is None
    assert new.described.special == old.described.special
    assert (new.described.eos, new.described.bos) == (old.described.eos, old.described.bos)
    assert new.size % 128 == 0
    assert sorted(new.ids.values()) == list(range(new.size))
    assert (grown / "chat_template.jinja").read_text() == "{{ messages }}"


def test_transformers_reads_the_same_ids(base: Path, grown: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(str(grown)), AutoTokenizer.from_pretrained(grown)
    document = f"{SPECIAL[0]}{texts('ja')[0]}{SPECIAL[2]}"
    assert theirs(document)["input_ids"] == _encode(grown, [document])[0]
    assert len(theirs) == ours.vocabulary_size == read_byte_level(str(grown)).size
    special = load_tokenizer(str(base)).special
    assert theirs.convert_tokens_to_ids(SPECIAL) == [special[each] for each in SPECIAL]


def test_fastokens_agrees(grown: Path) -> None:
    from nemo_cpt.corpus.tokenization.tokenizer import FastEncoder

    described = load_tokenizer(str(grown))
    documents = [*texts("ja"), *texts("en"), f"京都{SPECIAL[2]}です"]
    fast, reference = (
        encoder.encode(documents)[0].tolist()
        for encoder in (FastEncoder(described.definition or "", False), described.reference_encoder())
    )
    assert fast == reference


def test_new_tokens_are_whole_characters_of_the_script_or_a_part_of_one(base: Path, grown: Path) -> None:
    old, new = read_byte_level(str(base)), read_byte_level(str(grown))
    added = [bytes_of(token) for token, number in new.ids.items() if number >= old.size]
    assert all(data is not None and not data.isascii() for data in added)
    whole = [text for data in added if data and "\ufffd" not in (text := data.decode(errors="replace"))]
    assert len(whole) > 0.6 * len(added)
    assert max(map(len, whole)) <= 8
    scripts = {script_of(character) for text in whole for character in text if character > "\x7f"}
    assert scripts <= {"CJK", "HIRAGANA", "KATAKANA", "U+30xx", "U+FFxx"}


def test_no_new_token_has_the_end_of_one_character_and_the_beginning_of_another(base: Path) -> None:
    # Ideographs whose last byte is the same before hiragana, whose first two are: these stand side by side most often.
    ideographs = [character for character in map(chr, range(0x4E00, 0xA000)) if character.encode()[2] == 0xAE][:30]
    writing = {byte: character for character, byte in byte_of_character().items()}
    words = {
        "".join(writing[byte] for byte in f"{one}{chr(other)}".encode())
        for one in ideographs
        for other in range(0x3041, 0x3060)
    }
    learnt = [
        bytes_of(merge.token) or b""
        for merge in islice(Learner(read_byte_level(str(base)), Counter(dict.fromkeys(words, 5))), 60)
    ]
    assert len(learnt) == 60
    begins = [[number for number, byte in enumerate(data) if byte & 0xC0 != 0x80] for data in learnt]
    # A character begins at the token's first byte, or it is whole.
    assert all(
        data.decode(errors="ignore") or max(places, default=0) == 0 for data, places in zip(learnt, begins, strict=True)
    )


def test_it_is_the_same_each_time_and_in_any_order_of_the_inputs(base: Path, tmp_path: Path) -> None:
    lines = Path(JA).read_text().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_text("".join(lines[:30]))
    (tmp_path / "two.jsonl").write_text("".join(lines[30:]))
    inputs = [str(tmp_path / "two.jsonl"), str(tmp_path / "one.jsonl")]
    grow(str(base), JA, tmp_path / "a", tokens=100, min_count=2)
    grow(str(base), inputs, tmp_path / "b", tokens=100, min_count=2)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_what_is_kept_stays_token_for_token(base: Path, tmp_path: Path) -> None:
    kept = texts("ja")[:20]
    (tmp_path / "keep.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
    grow(str(base), JA, tmp_path / "t", tokens=60, min_count=2, multiple_of=1, keep=[str(tmp_path / "keep.jsonl")])
    assert _encode(base, kept) == _encode(tmp_path / "t", kept)
    assert sum(map(len, _encode(base, texts("ja")))) > sum(map(len, _encode(tmp_path / "t", texts("ja"))))


@pytest.mark.parametrize("ignore_merges", [True, False])
def test_of_texts_to_keep_every_word_is_kept_however_many_there_are(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignore_merges: bool
) -> None:
    monkeypatch.setattr("nemo_cpt.vocabulary.words._TRIM_AT", 400)
    changed = shutil.copytree(base, tmp_path / "base")
    content = json.loads((changed / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = ignore_merges
    (changed / "tokenizer.json").write_text(json.dumps(content))
    kept = texts("ja")[:40]
    (tmp_path / "keep.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
    keep = [str(tmp_path / "keep.jsonl")]
    grow(str(changed), JA, tmp_path / "t", tokens=30, min_count=2, multiple_of=1, keep=keep)
    assert _encode(changed, kept) == _encode(tmp_path / "t", kept)


def test_characters_that_the_corpus_holds_little_of_are_not_learnt(base: Path, tmp_path: Path) -> None:
    documents = [*texts("ja"), *["“naïve café” – 100 €"] * 20]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    grow(str(base), str(tmp_path / "c.jsonl"), tmp_path / "t", tokens=100, min_count=2)
    assert _encode(base, ["“naïve café” – 100 €"]) == _encode(tmp_path / "t", ["“naïve café” – 100 €"])


def test_until_a_rate_on_held_out_documents(base: Path, tmp_path: Path) -> None:
    report = grow(str(base), JA, tmp_path / "t", until=0.6, min_count=2)
    assert report.characters_per_token_before is not None
    assert report.characters_per_token_before < 0.6
    assert report.characters_per_token is not None
    assert report.characters_per_token >= 0.6
    assert report.vocabulary_size % 128 == 0


def test_until_a_rate_that_the_corpus_gives_with_few_tokens(base: Path, tmp_path: Path) -> None:
    """The last size before the corpus gives no more is measured, too."""
    full = grow(str(base), JA, tmp_path / "full", tokens=60, min_count=40)
    rate = full.characters_per_token
    assert rate is not None
    report = grow(str(base), JA, tmp_path / "t", until=rate - 1e-4, min_count=40)
    assert (report.tokens, report.characters_per_token) == (full.tokens, rate)
    with pytest.raises(CptError, match=rf"^{full.tokens:,} tokens give {rate:.3f} characters a token .*, not 5,"):
        grow(str(base), JA, tmp_path / "more", until=5.0, min_count=40)


def test_a_tokenizer_with_a_normalizer(normalizing_base: Path, tmp_path: Path) -> None:
    report = grow(str(normalizing_base), JA, tmp_path / "t", tokens=100, min_count=2)
    assert report.tokens_saved is not None
    assert report.tokens_saved > 0.2
    assert [_decode(tmp_path / "t", ids) for ids in _encode(tmp_path / "t", texts("ja"))] == texts("ja")


def test_the_ancestor_is_known_from_the_grown_one(base: Path, grown: Path) -> None:
    from tokenizers import Tokenizer

    record = json.loads((grown / RECORD).read_text())["from"]
    made = ancestor(read_byte_level(str(grown)), record["vocabulary_size"], record["merges"])
    backend = Tokenizer.from_str(json.dumps(made))
    for document in [*texts("ja")[:20], *texts("en")[:20], SPECIAL[2]]:
        assert backend.encode(document, add_special_tokens=False).ids == _encode(base, [document])[0]


@pytest.fixture(scope="module")
def base_bpe(base: Path) -> ByteLevelBPE:
    return read_byte_level(str(base))


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(st.text("あいう京都のa。", min_size=1, max_size=8), min_size=1, max_size=12))
def test_the_counts_are_those_of_encoding(base_bpe: ByteLevelBPE, documents: list[str]) -> None:
    """What is learnt with incremental counts is what the finished tokenizer does."""
    base = base_bpe
    words = of_own_scripts(count_words(base.backend(), documents), 1, base.vocabulary)
    learner = Learner(base, words.counts, min_count=1)
    made = ByteLevelBPE(base.described, grown_definition(base, list(islice(learner, 12))))
    model = made.model_alone()
    assert learner.tokens == sum(len(model.encode(word).ids) * n for word, n in words.counts.items())
    assert count_tokens(made.backend(), documents) <= count_tokens(base.backend(), documents)


def test_counting_drops_the_rarest_words_when_they_are_too_many(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_cpt.vocabulary.words._TRIM_AT", 50)
    counts = count_words(read_byte_level(str(base)).backend(), texts("ja"))
    assert len(counts) <= 50
    assert max(counts.values()) > 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "either tokens="),
        ({"until": 1.5}, "either tokens="),
        ({"tokens": 0}, "tokens is 0"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"tokens": 100_000}, "the corpus gives"),
        ({"tokens": None, "until": 50.0}, "not 50"),
        ({"tokens": None, "until": 0.01}, "already"),
        ({"inputs": str(CORPUS / "en.jsonl")}, "beyond ASCII"),
        ({"inputs": "nowhere.jsonl"}, "no input"),
        ({"json_key": "body"}, "no key 'body'"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(changes: dict, message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(CptError, match=message):
        grow(**{"tokenizer": str(base), "inputs": JA, "output": tmp_path / "t", "tokens": 50} | changes)
    assert not list(tmp_path.iterdir())


def test_a_line_without_a_text_is_told_without_an_option_that_there_is_not(base: Path, tmp_path: Path) -> None:
    (tmp_path / "ja.jsonl").write_text('{"text": "京都"}\n{"text": \n')
    with pytest.raises(CptError, match=r"line 2, .* Mend it\.$"):
        grow(str(base), str(tmp_path / "ja.jsonl"), tmp_path / "t", tokens=50)


def test_an_output_that_cannot_be_made_is_refused_before_anything_is_read(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CptError, match=f"nothing can be written into {tmp_path / 'file'}"):
        grow(str(base), "nowhere.jsonl", tmp_path / "file" / "a" / "t", tokens=50)


def test_an_output_that_exists_is_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(CptError, match="exists already"):
        grow(str(base), JA, tmp_path / "t", tokens=50)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content["model"].update(merges=[]), "no merges"),
        (lambda content: content.update(pre_tokenizer={"type": "Whitespace"}), "not over bytes"),
        (lambda content: content.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "WordLevel"),
    ],
)
def test_other_kinds_of_tokenizers_are_refused(edit, message: str, base: Path, tmp_path: Path) -> None:
    content = json.loads((base / "tokenizer.json").read_text())
    edit(content)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": []}))
    (tmp_path / "other" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CptError, match=message):
        grow(str(tmp_path / "other"), JA, tmp_path / "t", tokens=50)
    assert not (tmp_path / "t").exists()


def test_what_stands_around_a_byte_without_a_token_is_not_side_by_side(base: Path, tmp_path: Path) -> None:
    """SmolLM2's tokenizer lacks 21 bytes; what has one of them is as it was, and the rest grows."""
    lacking = shutil.copytree(base, tmp_path / "lacking")
    content = json.loads((lacking / "tokenizer.json").read_text())
    content["model"]["vocab"]["<unused>"] = content["model"]["vocab"].pop("ç")  # 0xE7, with which 的 and 男 begin
    content["model"]["merges"] = [each for each in content["model"]["merges"] if "ç" not in "".join(each)]
    (lacking / "tokenizer.json").write_text(json.dumps(content))
    grow(str(lacking), JA, tmp_path / "t", tokens=200, min_count=2)
    before, after = (sum(map(len, _encode(each, texts("ja")))) for each in (lacking, tmp_path / "t"))
    assert after < 0.8 * before
    assert _encode(lacking, texts("en")) == _encode(tmp_path / "t", texts("en"))
    model = read_byte_level(str(tmp_path / "t"))
    assert not [token for token, number in model.ids.items() if number >= 703 and "ç" in token]


def test_words_are_counted_as_the_tokenizer_cuts_them(base: Path) -> None:
    counts = count_words(read_byte_level(str(base)).backend(), ["the 京都 the", "京都"])
    assert counts == Counter({"the": 1, "Ġ京都".replace("京都", "äº¬éĥ½"): 1, "Ġthe": 1, "äº¬éĥ½": 1})
