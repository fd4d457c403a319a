"""The tokens and masks of prepared sets are those that transformers computes from templates with generation marks.

TRL 1.16's wheel ships such templates. Compared with them by hand on the same 1,000 conversations: `llama3_training`
gives the same tokens and masks as `llama3` for Llama-3.1's tokenizer and the Qwen2.5-shaped one; `qwen2_5_training`
also marks the line breaks before and after each answer, and nothing else that is not marked here.
"""

from pathlib import Path

import pytest

from nemo_cpt.conversations import open_conversations, prepare
from nemo_cpt.conversations.templates import SHIPPED, load_template
from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer
from tests.conversations.helpers import write_lines
from tests.conversations.oracle import MARKED, generate, loaded, masks

CONVERSATIONS = generate(1000)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    return write_lines(path, [{"messages": messages} for messages in CONVERSATIONS])


@pytest.mark.parametrize("kind", ["llama3", "smollm2", "qwen25"])
@pytest.mark.parametrize("name", SHIPPED)
def test_1000_conversations(
    name: str, kind: str, chats: Path, with_chat_tokens: dict[str, Path], tmp_path: Path
) -> None:
    folder = with_chat_tokens[kind]
    report = prepare(chats, tmp_path / "set", folder, template=name, workers=2, quiet=True)
    assert (report.conversations, report.skipped) == (1000, {})
    prepared = open_conversations(tmp_path / "set")
    expected = masks(folder, MARKED[name], CONVERSATIONS)
    if (name, kind) == ("llama3", "smollm2"):
        return check_where_tokens_would_straddle(prepared, folder, expected)
    for number, (ids, marks) in enumerate(expected):
        tokens, mask = prepared.read(number)
        assert tokens.tolist() == ids
        assert mask.tolist() == marks


def check_where_tokens_would_straddle(prepared, folder: Path, expected: list[tuple[list[int], list[int]]]) -> None:
    """SmolLM2's tokenizer takes the two line breaks before an answer as one token, but as two where letters follow.

    A server encodes the question, which ends there: the set has the one token that the model will see.
    """
    tokenizer = loaded(folder)
    template = load_template("llama3", load_tokenizer(folder))
    for number, (ids, marks) in enumerate(expected):
        tokens, mask = prepared.read(number)
        question = CONVERSATIONS[number][: 2 if CONVERSATIONS[number][0]["role"] == "system" else 1]
        asked = tokenizer(template.render(question, question=True), add_special_tokens=False).input_ids
        assert tokens[: len(asked)].tolist() == asked
        assert not mask[: len(asked)].any()
        assert tokenizer.decode(tokens.tolist()) == tokenizer.decode(ids)
        trained = [token for token, mark in zip(tokens.tolist(), mask, strict=True) if mark]
        assert trained == [token for token, mark in zip(ids, marks, strict=True) if mark]


def test_a_tokenizer_that_spaces_the_beginning_of_a_text(tmp_path: Path, chats: Path) -> None:
    """SentencePiece puts a space before a text: encoded by itself, an answer would begin with one."""
    import sentencepiece as spm

    from tests.support.tokenizers import write_config

    with (tmp_path / "tokenizer.model").open("wb") as model:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(m["content"].replace("\n", " ") for c in CONVERSATIONS[:200] for m in c),
            model_writer=model,
            vocab_size=420,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
    write_config(tmp_path, "LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False)
    report = prepare(chats, tmp_path / "set", tmp_path, template="alpaca-ja", workers=2, quiet=True)
    assert "encodes words otherwise at the beginning of a text" in report.encoder
    prepared = open_conversations(tmp_path / "set")
    for number, (ids, marks) in enumerate(masks(tmp_path, MARKED["alpaca-ja"], CONVERSATIONS)):
        tokens, mask = prepared.read(number)
        assert tokens.tolist() == ids
        assert mask.tolist() == marks
