import json
from importlib.resources import files
from pathlib import Path

import pytest

from tests.support.tokenizers import LLAMA3_PATTERN, QWEN_PATTERN, write_config

CORPUS = files("nemo_cpt.demo") / "corpus"
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


def texts(language: str) -> list[str]:
    return [json.loads(line)["text"] for line in (CORPUS / f"{language}.jsonl").read_text().splitlines()]


def small_base(folder: Path, pattern: str = LLAMA3_PATTERN, normalizer: bool = False) -> Path:
    """A tokenizer of Llama-3's kind, learnt from English: special tokens beside the model's vocabulary, not in it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    if normalizer:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts("en"), trainer)
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, bos_token=SPECIAL[0], eos_token=SPECIAL[1])
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `small_base`."""
    return small_base(tmp_path_factory.mktemp("small") / "base")


@pytest.fixture(scope="module")
def normalizing_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of Qwen2.5's kind, with NFC and single digits."""
    return small_base(tmp_path_factory.mktemp("small") / "nfc", QWEN_PATTERN, normalizer=True)


@pytest.fixture(scope="module")
def grown(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, grown by some 500 Japanese tokens."""
    from nemo_cpt.vocabulary import grow

    folder = tmp_path_factory.mktemp("grown") / "ja"
    grow(str(base), str(CORPUS / "ja.jsonl"), folder, tokens=400, min_count=2)
    return folder
