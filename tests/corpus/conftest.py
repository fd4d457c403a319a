"""Real tokenizers, and the text that ships with the demo."""

import json
from importlib.resources import files
from pathlib import Path

import pytest

from tests.support import tokenizers
from tests.support.corpus_helpers import write_jsonl
from tests.support.shared import made_once
from tests.support.tokenizers import write_config


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Japanese and English prose, about 180 kB."""
    folder = files("nemo_cpt.demo") / "corpus"
    lines = [line for name in ("ja", "en") for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="session")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama-3.1 tokenizer (128,256 ids), converted from the file that Meta's package ships."""
    return made_once(tmp_path_factory, "llama31", tokenizers.llama31)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A byte-level BPE of 600 ids, trained on the texts; its datasets are uint16."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = tmp_path_factory.mktemp("small")
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, "PreTrainedTokenizerFast", bos_token="<bos>", eos_token="<eos>")
    return folder


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A SentencePiece BPE with byte fallback, in the form that Llama-2 has: a tokenizer.model, no tokenizer.json."""
    import sentencepiece as spm

    folder = tmp_path_factory.mktemp("sentencepiece")
    with (folder / "tokenizer.model").open("wb") as model:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(text for document in texts for text in document.split("\n")),
            model_writer=model,
            vocab_size=2500,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.98,
            max_sentence_length=100_000,
            minloglevel=2,
        )
    write_config(folder, "LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False)
    return folder


@pytest.fixture(scope="session")
def byt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ByT5's tokenizer, which exists only in Python and has no vocabulary file."""
    folder = tmp_path_factory.mktemp("byt5")
    write_config(folder, "ByT5Tokenizer", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return folder


@pytest.fixture
def jsonl(tmp_path: Path, texts: list[str]) -> Path:
    """The texts as JSON lines."""
    return write_jsonl(tmp_path / "corpus.jsonl", texts)
