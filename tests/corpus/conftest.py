"""Real tokenizers, and the text that ships with the demo."""

import json
import os
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
from corpus_helpers import write_jsonl
from hypothesis import settings

settings.register_profile("corpus", deadline=None)  # the machine may be busy
settings.load_profile("corpus")

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Japanese and English prose, about 180 kB."""
    folder = files("nemo_cpt.demo") / "corpus"
    lines = [line for name in ("ja", "en") for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="session")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama-3.1 tokenizer (128,256 ids), converted from the file that Meta's package ships."""
    from tokenizers import processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    spec = find_spec("llama_models")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs llama-models (tests/model_packages.txt)")
    model = os.path.join(spec.submodule_search_locations[0], "llama3", "tokenizer.model")
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(3, 259 - len(LLAMA3_SPECIAL))]
    special = LLAMA3_SPECIAL + reserved
    tokenizer = TikTokenConverter(model, pattern=LLAMA3_PATTERN, additional_special_tokens=special).converted()
    template = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 128000)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    folder = tmp_path_factory.mktemp("llama3")
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_config(
        folder, "PreTrainedTokenizerFast", bos_token=special[0], eos_token=special[1], model_max_length=131072
    )
    return folder


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
    _write_config(folder, "PreTrainedTokenizerFast", bos_token="<bos>", eos_token="<eos>")
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
    _write_config(folder, "LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False)
    return folder


@pytest.fixture(scope="session")
def byt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ByT5's tokenizer, which exists only in Python and has no vocabulary file."""
    folder = tmp_path_factory.mktemp("byt5")
    _write_config(folder, "ByT5Tokenizer", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return folder


def _write_config(folder: Path, kind: str, **values: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} | values))


@pytest.fixture
def jsonl(tmp_path: Path, texts: list[str]) -> Path:
    """The texts as JSON lines."""
    return write_jsonl(tmp_path / "corpus.jsonl", texts)
