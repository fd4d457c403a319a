"""A tokenizer learnt from corpora: byte-level, deterministic, special tokens in their places."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nemo_cpt.checkpoint import make_untrained
from nemo_cpt.compatibility import check_data, read_base
from nemo_cpt.corpus import prepare
from nemo_cpt.corpus.atomic_folders import new_folder
from nemo_cpt.corpus.tokenization.tokenizer import FastEncoder, load_tokenizer
from nemo_cpt.errors import CptError
from nemo_cpt.vocabulary import byte_level, grow, train
from nemo_cpt.vocabulary.learning import MAX_BYTES, _untrained
from nemo_cpt.vocabulary.samples import Sample, draw, parts
from nemo_cpt.vocabulary.training import BOS, CHAT, EOS, PAD, settled
from nemo_cpt.vocabulary.words import script_of
from tests.vocabulary.conftest import CORPUS, texts

SCRIPTS = {"CJK", "HIRAGANA"}
LETTERS = "letters.jsonl"  # of which no two stand together
JA, EN = (str(CORPUS / f"{language}.jsonl") for language in ("ja", "en"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "t"
    report = train({JA: 2, EN: 1}, folder, 2000, special=["<|tool|>"])
    assert report.vocabulary_size == 2048
    assert report.round_trip_failures == 0
    assert report.characters_per_token.keys() == {JA, EN}
    assert report.learnt_from[JA] == pytest.approx(2 * report.learnt_from[EN], rel=0.05)
    return folder


def test_special_tokens_have_the_first_ids_and_a_text_begins_with_one(trained: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(trained)
    assert loaded.convert_tokens_to_ids([BOS, EOS, PAD, *CHAT, "<|tool|>"]) == list(range(7))
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (BOS, EOS, PAD)
    assert len(loaded) == 2048
    assert loaded(f"{CHAT[0]}x")["input_ids"][:2] == [0, 3]


def test_every_text_comes_back_and_the_fast_encoder_agrees(trained: Path) -> None:
    described = load_tokenizer(str(trained))
    documents = [
        *texts("ja"),
        *texts("en"),
        "ーコーヒー、あー。々　京都の、のコ「京都」",
        "Ελληνικά, русский мир, العربية, 한국어 문장, 中文的句子。\r\n\t x 12345 naïve",
    ]
    reference = described.reference_encoder()
    ids, bounds = reference.encode(documents)
    for text, first, last in zip(documents, bounds[:-1], bounds[1:], strict=True):
        assert reference.decode(ids[int(first) : int(last)].tolist()) == text
    assert described.definition is not None
    assert FastEncoder(described.definition, False).encode(documents)[0].tolist() == ids.tolist()


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unigram") / "t"
    report = train({JA: 2, EN: 1}, folder, 2000, kind="unigram", special=["tool"])
    assert (report.kind, report.vocabulary_size, report.round_trip_failures) == ("unigram", 2048, 0)
    return folder


def test_unigram_has_a_token_for_every_byte_and_every_text_comes_back(unigram: Path) -> None:
    from transformers import AutoTokenizer

    described = load_tokenizer(str(unigram))
    reference, loaded = described.reference_encoder(), AutoTokenizer.from_pretrained(unigram)
    assert len(loaded) == described.vocabulary_size == 2048
    assert loaded.convert_tokens_to_ids([BOS, EOS, PAD, *CHAT, "tool"]) == list(range(7))
    every_byte = "".join(map(chr, range(0x800))) + "\uffff\U00010000\U0010ffff\U000f0000"
    for text in (*texts("ja"), *texts("en"), every_byte, "한국어 문장, 中文的句子。👩‍👩‍👧‍👦", "\r\n\t  x 12345 naïve "):
        ids = reference.encode([text])[0].tolist()
        assert reference.decode(ids) == text
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids
    tokens = [loaded.convert_ids_to_tokens(number) for number in range(7, 2048)]
    assert max(len(token) for token in tokens if not token.startswith("<|")) <= MAX_BYTES


def test_unigram_is_refused_to_grow_before_it_is_loaded(unigram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(tokenizer: str) -> None:
        raise AssertionError("transformers takes long to load it")

    monkeypatch.setattr(byte_level, "load_tokenizer", load)
    with pytest.raises(CptError, match="is Unigram: only byte-level BPE can be grown"):
        grow(str(unigram), JA, unigram.parent / "grown", tokens=10)


def test_a_special_tokens_name_that_is_taken_for_text_is_spelled_in_other_tokens(unigram: Path) -> None:
    reference = load_tokenizer(str(unigram)).reference_encoder(split_special_tokens=True)
    ids = reference.encode(["tool"])[0].tolist()
    assert min(ids) > 6
    assert reference.decode(ids) == "tool"


def test_the_order_in_which_unigram_was_summed_does_not_show() -> None:
    pieces = [("ab", -2.5), ("abc", -3.25), ("x", -3.0), ("abd", -3.25), ("b", -3.2501), ("a", -3.2502)]
    chance = random.Random(0)
    found = settled(pieces)
    assert [token for token, _ in found] == ["ab", "x", "a", "abc", "abd", "b"]
    for _ in range(20):
        # Bytes that the library adds have one after the other, in an order of its own.
        added = dict(zip(chance.sample("ab", 2), (-3.2501, -3.2502), strict=True))
        noisy = [(token, added.get(token, score) + chance.uniform(-1e-14, 1e-14)) for token, score in pieces]
        assert settled(chance.sample(noisy, len(noisy))) == found


def test_unigram_is_prepared_with_and_has_rows_and_is_not_grown(unigram: Path, tmp_path: Path) -> None:
    report = prepare(EN, tmp_path / "ds", unigram, workers=1, verify=5, quiet=True)
    assert "tokenizers" in report.encoder
    assert make_untrained(tmp_path / "base", unigram, "tiny").vocabulary_size == 2048
    assert check_data(read_base(tmp_path / "base"), [str(tmp_path / "ds")]) == []
    with pytest.raises(CptError, match="is Unigram: only byte-level BPE can be grown"):
        grow(str(unigram), JA, tmp_path / "t", tokens=10)


def test_no_token_is_a_clause(trained: Path) -> None:
    vocabulary = json.loads((trained / "tokenizer.json").read_text())["model"]["vocab"]
    assert max(len(token) for token in vocabulary if not token.startswith("<|")) <= MAX_BYTES
    encoder = load_tokenizer(str(trained)).reference_encoder()
    tokens = [encoder.decode([number]) for number in range(2048)]
    assert not [token for token in tokens if len({script_of(character) for character in token} & SCRIPTS) > 1]


def test_it_is_the_same_each_time_and_in_any_order_of_the_files(tmp_path: Path) -> None:
    lines = Path(JA).read_text().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_text("".join(lines[:30]))
    (tmp_path / "two.jsonl").write_text("".join(lines[30:]))
    train(JA, tmp_path / "a", 1024)
    train([str(tmp_path / "two.jsonl"), str(tmp_path / "one.jsonl")], tmp_path / "b", 1024)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_a_large_corpus_is_sampled(tmp_path: Path) -> None:
    report = train(JA, tmp_path / "t", 640, sample_bytes=40_000)
    assert 40_000 - 3 <= report.learnt_from["text"] <= 40_000


def test_a_book_in_one_file_is_learnt_from_and_judged_by(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n".join(texts("ja") * 30))
    report = train(str(tmp_path / "book.txt"), tmp_path / "t", 640)
    assert report.learnt_from["text"] > 2**20
    assert report.characters_per_token["text"] > 0.5
    part = train(str(tmp_path / "book.txt"), tmp_path / "part", 640, sample_bytes=40_000)
    assert 40_000 - 3 <= part.learnt_from["text"] <= 40_000


def test_weights_hold_where_a_corpus_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n".join(texts("en")))
    report = train({JA: 3, str(tmp_path / "book.txt"): 1}, tmp_path / "t", 640)
    shares = list(report.learnt_from.values())
    assert shares[0] == pytest.approx(3 * shares[1], rel=0.01)
    tiny = train({JA: 1, EN: 1e-12}, tmp_path / "tiny", 640, sample_bytes=40_000)
    assert tiny.learnt_from[EN] == 1


def test_a_part_of_a_corpus_is_the_same_in_any_order_of_its_documents(tmp_path: Path) -> None:
    documents, chance, found = [*texts("ja"), *texts("en")[:20] * 3], random.Random(0), set()
    for _ in range(20):
        chance.shuffle(documents)
        (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        sample = draw(str(tmp_path / "c.jsonl"), limit=30_000)
        found.add((tuple(sample.texts), tuple(sample.held_out)))
        assert sample.nbytes == sum(len(text.encode()) for text in sample.texts) <= 30_000
    assert len(found) == 1


def test_a_corpus_whose_only_document_would_be_held_out_is_learnt_from(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "京都"}) + "\n")
    sets = [(text, draw_one(tmp_path / "one.jsonl", text)) for text in texts("ja") + texts("en")]
    assert all(sample.texts == [text] and not sample.held_out for text, sample in sets)


def draw_one(path: Path, text: str) -> Sample:
    path.write_text(json.dumps({"text": text}) + "\n")
    return draw(str(path))


@example("aaa\n \raa")
@given(st.text("a \n\r\u3042.", max_size=60))
def test_parts_of_a_text_have_its_words(text: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("nemo_cpt.vocabulary.samples.PART", 7)
        cut = list(parts(text))
    assert "".join(cut) == text
    behind_lines = [part for part in cut[:-1] if part.endswith(("\n", "\r"))]
    if len(behind_lines) == max(len(cut) - 1, 0):
        words = _untrained("bpe").pre_tokenizer.pre_tokenize_str
        assert [word for part in cut for word, _ in words(part)] == [word for word, _ in words(text)]


def test_another_that_writes_the_same_tokenizer_keeps_its_files(tmp_path: Path) -> None:
    def write_meanwhile() -> None:
        with new_folder(tmp_path / "t") as folder:
            (folder / "tokenizer.json").touch()
            train(EN, tmp_path / "t", 512)
            assert (folder / "tokenizer.json").exists()

    with pytest.raises(CptError, match="made by another process meanwhile"):
        write_meanwhile()
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_it_can_be_grown(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "ru.jsonl").write_text(json.dumps({"text": "привет мир, " * 40}) + "\n")
    report = grow(str(trained), str(tmp_path / "ru.jsonl"), tmp_path / "t", tokens=3, multiple_of=1, min_count=2)
    assert report.first_id == 2048


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary_size": 100_000}, "the corpora give"),
        ({"vocabulary_size": 10**12}, "the corpora give fewer than"),
        ({"vocabulary_size": 200}, "no room"),
        ({"special": [EOS]}, "there twice"),
        ({"special": ["<|a|>", ""]}, "hold one without a text"),
        ({"special": ["a"]}, "'a' is that of a byte, too"),
        ({"special": ["a"], "kind": "unigram"}, "'a' is that of a byte, too"),
        ({"corpora": EN, "special": ["Ġthe"]}, "'Ġthe' is a part of the corpora's words, too"),
        ({"corpora": {JA: 0.0}}, "must be above 0"),
        ({"corpora": {}}, "no corpus"),
        ({"corpora": "nowhere.jsonl"}, "no input"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"kind": "wordpiece"}, "it can be bpe, unigram"),
        ({"kind": "unigram", "vocabulary_size": 100_000}, "the corpora give"),
        ({"kind": "unigram", "vocabulary_size": 384, "corpora": LETTERS}, "the corpora give"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    changes: dict, message: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if changes.get("corpora") == LETTERS:
        path = tmp_path_factory.mktemp("letters") / LETTERS
        path.write_text("".join(json.dumps({"text": f"a b c d e f g {number}"}) + "\n" for number in range(100)))
        changes = changes | {"corpora": str(path)}
    with pytest.raises(CptError, match=message):
        train(**{"corpora": JA, "output": tmp_path / "t", "vocabulary_size": 1000} | changes)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from nemo_cpt.cli import app, vocabulary  # noqa: F401  registers its commands

    arguments = ["tokenizer", "train", JA, EN, "-o", str(tmp_path / "t"), "--vocabulary-size", "600"]
    done = CliRunner().invoke(app, [*arguments, "--weight", "1", "--weight", "1"])
    assert done.exit_code == 0
    assert "640 ids" in done.stdout
    unigram = ["tokenizer", "train", JA, "-o", str(tmp_path / "u"), "--vocabulary-size", "600", "--kind", "unigram"]
    assert json.loads(CliRunner().invoke(app, [*unigram, "--json"]).stdout)["kind"] == "unigram"
    assert isinstance(CliRunner().invoke(app, [*arguments, "--weight", "1"]).exception, CptError)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_learning_ends_with_the_command_that_is_interrupted_or_killed(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "nemo_cpt.cli", "tokenizer", "train", JA, "--kind", "unigram"]
    command += ["--vocabulary-size", "1024", "--output", str(tmp_path / "t")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        own = psutil.Process(process.pid)
        while not (children := own.children()):
            assert process.poll() is None
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in said
    psutil.wait_procs(children)
    assert not list(tmp_path.iterdir())
    # The same command has nothing to clear away.
    assert train(JA, tmp_path / "t", 1024).status == "written"


def test_a_learning_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nemo_cpt.vocabulary.learning.sys.executable", "/bin/false")
    with pytest.raises(CptError, match=r"died with exit code 1: where memory was short, give less text"):
        train(JA, tmp_path / "t", 1024)
    assert not list(tmp_path.iterdir())
