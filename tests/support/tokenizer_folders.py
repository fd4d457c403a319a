"""Folders of tokenizers, generated: models, what stands before and after them, added tokens, settings in all files."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from nemo_cpt.corpus.tokenization.tokenizer_files import NEUTRAL

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "The THE don't word's 12 1234 x <x>",
    "日本語のテキスト、東京都。が",
    "a  b   c\n\nd\te",
    "Привет мир é é",
] * 3
SPECIAL = ["<unk>", "<bos>", "<eos>"]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
CONTENTS = ["<x>", "the", " in", "THE", "é", "東京", "dog.", "<pad>", "x y", "▁"]
ORDINARY_CLASSES = ["PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"]
CLASSES = [
    *ORDINARY_CLASSES,
    "PreTrainedTokenizer",
    "GPT2TokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "BertTokenizerFast",
    "CohereTokenizerFast",
    "GemmaTokenizer",
    "GPTNeoXTokenizerFast",
    "BloomTokenizerFast",
    "RobertaTokenizer",
    "T5TokenizerFast",
    "NoSuchTokenizer",
]
PRE_TOKENIZERS = [
    None,
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": r"\p{N}{1,3}| ?\p{L}+"},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
        ],
    },
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
    {"type": "WhitespaceSplit"},
    {"type": "Digits", "individual_digits": True},
]
NORMALIZERS = [
    None,
    {"type": "NFKC"},
    {"type": "Lowercase"},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip", "strip_left": True, "strip_right": False}]},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]
POST_PROCESSORS = [
    None,
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
    },
]
SETTINGS = {
    "add_prefix_space": st.sampled_from([True, False, None]),
    "split_special_tokens": st.booleans(),
    "extra_special_tokens": st.sampled_from([{}, {"image_token": "<image>"}, {"image_token": "<x>"}]),
    "add_bos_token": st.booleans(),
    "add_eos_token": st.booleans(),
    "model_max_length": st.sampled_from([4, 10**30, None]),
    "clean_up_tokenization_spaces": st.booleans(),
    "padding_side": st.sampled_from(["left", "right"]),
    "legacy": st.sampled_from([True, False, None]),
    "do_lower_case": st.booleans(),
    "chat_template": st.sampled_from(["{{ messages }}", None]),
    "errors": st.just("replace"),
    "max_len": st.just(8),
    "model_input_names": st.just(["input_ids"]),
    "fix_mistral_regex": st.booleans(),
    "init_inputs": st.just([]),
    "name_or_path": st.just("someone/something"),
    "unk_token_id": st.sampled_from([0, 3]),
    "from_slow": st.booleans(),
    "vocab_size": st.just(7),
}


@cache
def trained() -> dict[str, dict[str, Any]]:
    """A tokenizer.json of each kind of model."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = {}

    def add(name: str, tokenizer: Tokenizer, trainer: trainers.Trainer) -> None:
        tokenizer.train_from_iterator(LINES, trainer)
        made[name] = json.loads(tokenizer.to_str())

    options: dict[str, Any] = {"special_tokens": SPECIAL, "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    add("bytes", tokenizer, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, **options))
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{number:02X}>" for number in range(256)]
    pieces = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL + byte_tokens, show_progress=False)
    add("pieces", tokenizer, pieces)
    made["pieces"]["added_tokens"] = made["pieces"]["added_tokens"][:3]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    add("words", tokenizer, trainers.WordLevelTrainer(**options))
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    add("wordpieces", tokenizer, trainers.WordPieceTrainer(vocab_size=120, **options))
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    add("unigram", tokenizer, trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **options))
    return made


def _usually(value: Any, others: st.SearchStrategy[Any], one_in: int = 4) -> st.SearchStrategy[Any]:
    return st.integers(1, one_in).flatmap(lambda number: others if number == one_in else st.just(value))


@st.composite
def added_tokens(draw: st.DrawFn, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a tokenizer.json, with more of them, other flags, other ids."""
    entries = copy.deepcopy(content["added_tokens"])
    for text in draw(st.lists(st.sampled_from(CONTENTS), max_size=3, unique=True)):
        flags = {flag: draw(st.booleans()) for flag in FLAGS}
        entries.append({"id": -1, "content": text, **flags})
    vocabulary = content["model"]["vocab"]
    vocabulary = vocabulary if isinstance(vocabulary, dict) else {text: i for i, (text, _) in enumerate(vocabulary)}
    free = len(vocabulary)
    for entry in entries:
        entry["id"] = vocabulary.get(entry["content"], free)
        free = max(free, entry["id"] + 1)
        entry["id"] += draw(_usually(0, st.integers(0, 3), 12))
    return draw(_usually(entries, st.permutations(entries), 12))


@st.composite
def definitions(draw: st.DrawFn) -> dict[str, Any]:
    """The content of a tokenizer.json."""
    content = copy.deepcopy(trained()[draw(st.sampled_from(["bytes", "bytes", "bytes", *trained()]))])
    for part, others in (("pre_tokenizer", PRE_TOKENIZERS), ("normalizer", NORMALIZERS)):
        content[part] = draw(_usually(content[part], st.sampled_from(others), 2))
    content["post_processor"] = draw(st.sampled_from(POST_PROCESSORS))
    content["added_tokens"] = draw(added_tokens(content))
    if content["model"]["type"] == "BPE":
        content["model"]["dropout"] = draw(_usually(None, st.sampled_from([0.0, 0.5]), 20))
        content["model"]["ignore_merges"] = draw(st.booleans())
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["truncation"] = draw(_usually(None, st.just(truncation), 12))
    pad = draw(st.sampled_from(["<eos>", "[PAD]"]))
    padding = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_id": 2, "pad_type_id": 0, "pad_token": pad}
    content["padding"] = draw(_usually(None, st.just(padding | {"pad_to_multiple_of": None}), 12))
    return content


def _token(contents: list[str]) -> st.SearchStrategy[Any]:
    """A special token as a configuration names it: in most cases by its text."""
    text = st.sampled_from(contents)
    flags = st.fixed_dictionaries({flag: st.booleans() for flag in FLAGS})
    written = st.builds(lambda content, how: {"__type": "AddedToken", "content": content, **how}, text, flags)
    return _usually(None, written, 6).flatmap(lambda token: st.just(token) if token else text)


@st.composite
def configurations(draw: st.DrawFn, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The JSON files beside a tokenizer.json, by name."""
    texts = [*[entry["content"] for entry in content["added_tokens"]] * 3, "[NEW]", "lazy"]
    config: dict[str, Any] = {"tokenizer_class": draw(st.sampled_from(CLASSES))}
    for kind in ("bos", "eos", "unk", "pad", "sep", "cls"):
        if draw(st.booleans()):
            config[f"{kind}_token"] = draw(st.one_of(st.none(), *[_token(texts)] * 3))
    if draw(st.booleans()):
        config["additional_special_tokens"] = draw(st.lists(_token(texts), max_size=2))
    if draw(st.booleans()):
        config["added_tokens_decoder"] = draw(_decoders(content["added_tokens"]))
    for key in draw(st.lists(st.sampled_from(sorted(SETTINGS)), max_size=4, unique=True)):
        config[key] = draw(SETTINGS[key])
    if draw(_usually(False, st.just(True), 10)):
        config.pop("tokenizer_class")
    return {"tokenizer_config.json": config, **draw(_other_files(content["added_tokens"], texts))}


@st.composite
def ordinary_configurations(draw: st.DrawFn, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The same, near to what models are published with: all that they name is in the tokenizer.json, or nearly all."""
    special = [entry["content"] for entry in content["added_tokens"] if entry["special"]] or SPECIAL
    texts = draw(_usually(special, st.just([*special, "[NEW]"]), 20))
    config: dict[str, Any] = {"tokenizer_class": draw(st.sampled_from(ORDINARY_CLASSES))}
    for kind in ("bos", "eos", "unk", "pad"):
        config[f"{kind}_token"] = draw(st.one_of(st.none(), st.sampled_from(texts)))
    if draw(st.booleans()):
        config["additional_special_tokens"] = draw(st.lists(st.sampled_from(texts), max_size=2))
    if draw(st.booleans()):
        config["added_tokens_decoder"] = draw(_decoders(content["added_tokens"]))
    before = content["pre_tokenizer"] or {}
    config["add_prefix_space"] = draw(_usually(before.get("add_prefix_space", False), st.booleans(), 8))
    for key in draw(st.lists(st.sampled_from(sorted(SETTINGS.keys() & NEUTRAL.keys())), max_size=3, unique=True)):
        config.setdefault(key, draw(SETTINGS[key]))
    return {"tokenizer_config.json": config, **draw(_usually({}, _other_files(content["added_tokens"], texts), 6))}


@st.composite
def _decoders(draw: st.DrawFn, entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """An added_tokens_decoder: the entries of the tokenizer.json, some of them, or with a flag that differs."""
    decoder = {str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in entries}
    for entry in decoder.values():
        for flag in FLAGS:
            entry[flag] ^= draw(_usually(False, st.just(True), 50))
    return draw(_usually(decoder, st.just(dict(list(decoder.items())[:2])), 5))


@st.composite
def _other_files(draw: st.DrawFn, entries: list[dict[str, Any]], texts: list[str]) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = {}
    if draw(_usually(False, st.just(True), 4)):
        kinds = st.sampled_from(["bos_token", "eos_token", "pad_token", "unk_token"])
        files["special_tokens_map.json"] = draw(st.dictionaries(kinds, st.sampled_from(texts), max_size=3))
        if draw(_usually(False, st.just(True), 4)):
            files["special_tokens_map.json"]["additional_special_tokens"] = draw(st.lists(_token(texts), max_size=2))
    if draw(_usually(False, st.just(True), 10)):
        files["added_tokens.json"] = {"<added>": 500, entries[0]["content"]: entries[0]["id"]}
    if draw(_usually(False, st.just(True), 6)):
        files["config.json"] = {"model_type": draw(st.sampled_from(["llama", "gpt2", "qwen2", "mistral"]))}
    return files


@st.composite
def folders(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """All files of a tokenizer's folder, by name."""
    content = draw(definitions())
    beside = draw(st.sampled_from([configurations, ordinary_configurations]))
    return {"tokenizer.json": content, **draw(beside(content))}


def write(files: dict[str, dict[str, Any]], folder: Path) -> Path:
    """Write the files of a folder, which must not exist, and return it."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return folder


def texts() -> st.SearchStrategy[str]:
    """Texts that hold tokens' names among words of several scripts, with blanks on either side."""
    pieces = [
        *CONTENTS,
        *SPECIAL,
        "[NEW]",
        "lazy",
        "<image>",
        "<added>",
        " ",
        "  ",
        "\n",
        "the",
        "fox",
        "Don't",
        "1234",
    ]
    return st.lists(st.one_of(st.sampled_from([*pieces, *LINES[:5]]), st.text(max_size=3)), max_size=8).map("".join)
