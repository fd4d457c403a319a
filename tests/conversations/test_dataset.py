"""Prepared sets as a training reads them, and as `inspect` shows them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_cpt.conversations import inspect_conversations, lay_out, open_conversations, pack, prepare
from nemo_cpt.conversations.dataset import ConversationSet, is_conversations
from nemo_cpt.corpus import prepare as prepare_texts
from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer
from nemo_cpt.errors import CptError
from tests.conversations.helpers import pairs, turns, write_lines


def make(folder: Path, tokenizer: Path, values: list[Any], **options: Any) -> ConversationSet:
    chats = write_lines(folder / "chats.jsonl", values)
    prepare(chats, folder / "set", tokenizer, **({"template": "chatml", "quiet": True, "workers": 1} | options))
    return open_conversations(folder / "set")


def test_a_packed_sequence_holds_what_its_conversations_hold_alone(tmp_path: Path, small: Path) -> None:
    chats = make(tmp_path, small, pairs(60))
    fit = chats.fit(256)
    packing = pack(fit.positions, 256, seed=3)
    seen = []
    for sequence in range(len(packing)):
        packed = lay_out(chats, packing[sequence], fit)
        bounds = packed["cu_seqlens"].tolist()
        assert bounds[0] == 0
        assert bounds[-1] == 256
        for number, begin, end in zip(packing[sequence], bounds, bounds[1:], strict=False):
            tokens, mask = chats.read(number)
            stretch = slice(begin, end)
            assert packed["tokens"][stretch].tolist() == tokens[:-1].tolist()
            assert packed["labels"][stretch].tolist() == tokens[1:].tolist()
            assert packed["loss_mask"][stretch].tolist() == mask[1:].tolist()
            assert packed["position_ids"][stretch].tolist() == list(range(end - begin))
            seen.append(int(number))
        filled = int(fit.positions[packing[sequence]].sum())
        assert not packed["loss_mask"][filled:].any()
    assert sorted(seen) == list(range(60))


def test_a_conversation_fits_whose_last_token_is_only_predicted(tmp_path: Path, small: Path) -> None:
    chats = make(tmp_path, small, pairs(1))
    length = int(chats.index.lengths[0])
    assert chats.fit(length - 1).too_long == 0
    assert chats.fit(length - 2).too_long == 1
    assert chats.fit(length - 2).positions.tolist() == [0]


class TestCut:
    @pytest.fixture
    def chats(self, tmp_path: Path, small: Path) -> ConversationSet:
        return make(tmp_path, small, [{"messages": turns("質問", "答え", "次の質問", "次の答え" * 50)}])

    def test_after_the_last_answer_that_fits(self, chats: ConversationSet) -> None:
        tokens, mask = chats.read(0)
        first_end = int(np.flatnonzero(np.diff(mask.astype(int)) == -1)[0])
        second_begin = int(np.flatnonzero(np.diff(mask.astype(int)) == 1)[1]) + 1
        for seq_length in (first_end, first_end + 1, second_begin, second_begin + 20):
            fit = chats.fit(seq_length, "cut")
            assert (fit.positions.tolist(), fit.cut) == ([first_end], 1)
        assert load_tokenizer(chats.manifest["tokenizer"]["name"]).special["<|im_end|>"] == tokens[first_end]

    def test_within_the_first_answer_where_none_fits(self, chats: ConversationSet) -> None:
        _, mask = chats.read(0)
        begin = int(np.flatnonzero(mask)[0])
        assert chats.fit(begin, "cut").positions.tolist() == [begin]
        assert chats.fit(begin - 1, "cut").positions.tolist() == [0]  # nothing of the answer would be predicted

    def test_not_at_all_where_it_fits(self, chats: ConversationSet) -> None:
        assert chats.fit(4096, "cut").positions.tolist() == [len(chats.tokens) - 1]


class TestFilesThatDoNotBelongTogether:
    @pytest.fixture
    def prefix(self, tmp_path: Path, small: Path) -> str:
        return make(tmp_path, small, pairs(5)).prefix

    def test_a_truncated_mask(self, prefix: str) -> None:
        mask = Path(prefix + ".mask")
        mask.write_bytes(mask.read_bytes()[:-1])
        with pytest.raises(CptError, match="do not belong together"):
            open_conversations(prefix)

    def test_a_manifest_of_another_set(self, prefix: str) -> None:
        path = Path(prefix + ".json")
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"tokens": 3}))
        with pytest.raises(CptError, match="do not belong together"):
            open_conversations(prefix)

    def test_a_mask_with_something_else_in_it(self, prefix: str) -> None:
        mask = Path(prefix + ".mask")
        mask.write_bytes(b"\x02" + mask.read_bytes()[1:])
        with pytest.raises(CptError, match="mask is corrupt"):
            inspect_conversations(prefix)

    def test_a_set_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(CptError, match="There is no"):
            open_conversations(tmp_path / "nowhere")

    def test_a_dataset_of_texts(self, tmp_path: Path, small: Path) -> None:
        texts = write_lines(tmp_path / "texts.jsonl", [{"text": "本文です。"}])
        report = prepare_texts(texts, tmp_path / "texts", small, quiet=True)
        for end in ("bin", "idx", "json"):
            Path(f"{report.prefix}.{end}").rename(tmp_path / f"texts_conversations.{end}")
        with pytest.raises(CptError, match="is not a set of conversations"):
            open_conversations(tmp_path / "texts")


def test_a_prefix_that_stands_for_two_datasets_is_asked_about(tmp_path: Path, small: Path) -> None:
    make(tmp_path, small, pairs(2))
    assert is_conversations(tmp_path / "set")
    assert not is_conversations(tmp_path / "other")
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "本文です。"}])
    prepare_texts(texts, tmp_path / "set", small, quiet=True)
    with pytest.raises(CptError, match=r"stands for .*set_text_document and for .*set_conversations"):
        is_conversations(tmp_path / "set")
    assert is_conversations(tmp_path / "set_conversations")
    assert not is_conversations(tmp_path / "set_text_document")


class TestInspection:
    def test_the_first_conversations_with_what_is_trained_on(self, tmp_path: Path, small: Path) -> None:
        make(tmp_path, small, [{"messages": turns("q", "a", "r", "b")}, *pairs(9)])
        report = inspect_conversations(tmp_path / "set", samples=1)
        (sample,) = report.samples
        assert sample["pieces"] == [
            ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", False],
            ["a<|im_end|>", True],
            ["\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n", False],
            ["b<|im_end|>", True],
            ["\n", False],
        ]
        assert (report.conversations, report.answers) == (10, 11)
        assert report.forms == {"messages": 1, "query/answer": 9}

    def test_counts_are_those_of_the_preparation(self, tmp_path: Path, small: Path) -> None:
        chats = make(tmp_path, small, pairs(50))
        report = inspect_conversations(tmp_path / "set", seq_length=64)
        manifest = chats.manifest
        assert (report.trained, report.answers) == (manifest["trained"], manifest["answers"])
        assert report.trained == int(np.asarray(chats.mask).sum())
        assert int(chats.index.lengths[report.longest]) == manifest["longest"] == report.percentiles[100]

    def test_without_its_tokenizer_it_shows_ids(self, tmp_path: Path, small: Path) -> None:
        chats = make(tmp_path, small, pairs(1))
        path = Path(chats.prefix + ".json")
        manifest = json.loads(path.read_text("utf-8"))
        manifest["tokenizer"]["name"] = "someone/gone"
        path.write_text(json.dumps(manifest))
        (sample,) = inspect_conversations(tmp_path / "set").samples
        assert sample["pieces"][0][0] == chats.read(0)[0][: len(sample["pieces"][0][0])].tolist()
        assert inspect_conversations(tmp_path / "set", small).samples[0]["pieces"][1][0].endswith("<|im_end|>")

    def test_another_tokenizer_is_refused(self, tmp_path: Path, small: Path, smollm2: Path) -> None:
        make(tmp_path, small, pairs(1))
        with pytest.raises(CptError, match="whose vocabulary differs from that of"):
            inspect_conversations(tmp_path / "set", smollm2)

    def test_a_number_of_samples_below_zero(self, tmp_path: Path, small: Path) -> None:
        make(tmp_path, small, pairs(1))
        with pytest.raises(CptError, match="samples is -1"):
            inspect_conversations(tmp_path / "set", samples=-1)
