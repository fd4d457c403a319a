"""Which ids `prepare` writes: transformers', whatever a tokenizer's files say, compared on the way and afterwards."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_cpt.corpus import prepare, read_index, read_manifest
from nemo_cpt.corpus.dataset.index import read_tokens
from nemo_cpt.corpus.tokenization import tokenizer_files
from nemo_cpt.corpus.tokenization.characters import PER_KIND, WHOLE, Lookout, kind_of
from nemo_cpt.corpus.tokenization.encoder_choice import Reference
from nemo_cpt.corpus.tokenization.tokenizer import FastEncoder, load_tokenizer
from nemo_cpt.errors import CptError
from tests.support import tokenizer_folders
from tests.support.corpus_helpers import same_files, write_jsonl, write_reference

Json = dict[str, Any]
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
TEXTS = [
    "The river runs past the old stone house. <eos> the lamp",
    " 京都の川は、<bos>古い石の家のそばを流れる。",
    "lamps <x> <new>tail </s> <pad>",
    "",
]


@pytest.fixture
def changed(tmp_path: Path, small: Path) -> Callable[..., Path]:
    """The small tokenizer with other settings: of tokenizer_config.json, its tokenizer.json and further files."""

    def change(config: Json, definition: Callable[[Json], None] | None = None, /, **files: Json) -> Path:
        folder = shutil.copytree(small, tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}")
        content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        if definition:
            definition(content)
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | config
        wanted = {"tokenizer_config": {key: value for key, value in settings.items() if value != "absent"}}
        for name, value in ({"tokenizer": content} | wanted | files).items():
            (folder / f"{name}.json").write_text(json.dumps(value))
        return folder

    return change


def set_prefix_space(content: Json) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def make_eos_an_ordinary_token(content: Json) -> None:
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != "<eos>"]


def decoder(**flags: bool) -> Json:
    return {"0": {"content": "<bos>", **FLAGS, **flags}, "1": {"content": "<eos>", **FLAGS}}


CHANGES: dict[str, tuple[Json, Callable[[Json], None] | None, Json]] = {
    "prefix space in tokenizer.json alone": ({}, set_prefix_space, {}),
    "prefix space in the configuration alone": ({"add_prefix_space": True}, None, {}),
    "special tokens are text": ({"split_special_tokens": True}, None, {}),
    "another EOS in the map": ({}, None, {"special_tokens_map": {"eos_token": "<bos>"}}),
    "the map does not count beside a decoder": (
        {"added_tokens_decoder": decoder()},
        None,
        {"special_tokens_map": {"eos_token": "<bos>"}},
    ),
    "a token that takes blanks": ({"added_tokens_decoder": decoder(lstrip=True)}, None, {}),
    "a padding token that is new": ({"pad_token": "<pad>"}, None, {}),
    "an EOS that is new": ({"eos_token": "</s>"}, None, {}),
    "an EOS that was no added token": ({}, make_eos_an_ordinary_token, {}),
    "more tokens of the model": ({"extra_special_tokens": {"image_token": "<new>"}}, None, {}),
    "more tokens of a fine-tune": ({}, None, {"added_tokens": {"<x>": 600, "lamp": 601}}),
    "a class that config.json names": ({"tokenizer_class": "absent"}, None, {"config": {"model_type": "llama"}}),
    "a class that names tokens": ({"tokenizer_class": "GPT2Tokenizer", "bos_token": "absent"}, None, {}),
    "padding and truncation": (
        {},
        lambda content: content.update(
            truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            padding={
                "strategy": {"Fixed": 80},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<pad>",
            },
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("fast", [True, False])
def test_settings_that_change_ids_count(changed: Callable[..., Path], tmp_path: Path, name: str, fast: bool) -> None:
    config, definition, files = CHANGES[name]
    folder = changed(config, definition, **files)
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    report = prepare(source, tmp_path / "ds", folder, workers=1, quiet=True, fast=fast, verify=9)
    if "takes blanks" in name:  # NeMo's script makes that one the unknown token
        assert read_tokens(read_index(report.prefix), 1).tolist().count(0) == 1
    else:
        assert same_files(report.prefix, write_reference(tmp_path / "reference", TEXTS, folder))
    assert report.verified == 3
    assert report.kinds > 5


def published(folder: Path, small: Path, config: Json) -> Path:
    """The small tokenizer with a configuration of the form in which a model is published."""
    shutil.copytree(small, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder(), **config}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<eos>", **FLAGS}}))
    return folder


PUBLISHED: dict[str, Json] = {
    "Llama-3.1": {
        "bos_token": "<bos>",
        "chat_template": "{{ bos_token }}",
        "clean_up_tokenization_spaces": True,
        "eos_token": "<eos>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    "Qwen2.5": {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": ["<bos>"],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<eos>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    },
    "SmolLM2": {
        "add_prefix_space": False,
        "additional_special_tokens": ["<bos>", "<eos>"],
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": 8192,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<eos>",
        "vocab_size": 600,
    },
    "Llama-3.1, saved by transformers 5": {
        "added_tokens_decoder": {},
        "backend": "tokenizers",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "is_local": True,
        "local_files_only": False,
        "model_max_length": 131072,
        "tokenizer_class": "TokenizersBackend",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_forms_are_read_without_transformers(tmp_path: Path, small: Path, name: str) -> None:
    config = dict(PUBLISHED[name])
    if not config.get("added_tokens_decoder", True):
        small = shutil.copytree(small, tmp_path / "without_decoder")
    folder = published(tmp_path / "published", small, config)
    if config["tokenizer_class"] == "TokenizersBackend":
        del config["added_tokens_decoder"]
        (folder / "special_tokens_map.json").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.loaded, tokenizer.eos) == (None, ("<eos>", 1))
    report = prepare(write_jsonl(tmp_path / "t.jsonl", TEXTS), tmp_path / "ds", folder, quiet=True, verify=3)
    assert report.verified == 3


def test_transformers_is_not_imported_for_them(tmp_path: Path, small: Path) -> None:
    folder = published(tmp_path / "published", small, PUBLISHED["Qwen2.5"])
    source = write_jsonl(tmp_path / "t.jsonl", TEXTS)
    code = (
        "import sys; from nemo_cpt.corpus import prepare; prepare(*sys.argv[1:], quiet=True)\n"
        "assert not {'transformers', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, source, tmp_path / "ds", folder], check=True)


@pytest.mark.parametrize(
    ("config", "definition", "files", "message"),
    [
        ({"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}}, None, {}, "names code of its own"),
        ({"auto_map": ["mine.Tokenizer", None]}, None, {}, "names code of its own"),
        (
            {"tokenizer_class": "absent"},
            None,
            {"config": {"model_type": "llama", "auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}}},
            "config.json names code of its own",
        ),
        ({}, lambda content: content["model"].update(dropout=0.1), {}, "dropout 0.1: it gives other ids .* each time"),
        ({"tokenizer_class": "LlamaTokenizer"}, lambda c: c["model"].update(dropout=0.1), {}, "dropout 0.1"),
        (
            {"tokenizer_class": "TokenizersBackend", "do_lower_case": True},
            None,
            {},
            "transformers 5 saved .* do_lower_case",
        ),
        ({"tokenizer_class": "TokenizersBackend", "eos_token": "</s>"}, None, {}, "transformers 5 saved .* '</s>'"),
        ({"tokenizer_class": "TokenizersBackend"}, None, {"config": {"model_type": "qwen2"}}, "class of its own"),
        ({"tokenizer_class": "NoSuchTokenizer"}, None, {}, "transformers cannot load"),
        ({"eos_token": 3}, None, {}, "transformers cannot load"),
        ({}, None, {"config": {"eos_token_id": 0}}, r"EOS of .* is <eos> \(1\), but .* ends texts with <bos> \(0\)"),
        (
            {},
            None,
            {"generation_config": {"eos_token_id": [0, 7]}},
            r"ends texts with <bos> \(0\), no special token \(7\)",
        ),
        ({}, None, {"config": {"text_config": {"eos_token_id": 0}}}, r"ends texts with <bos> \(0\)"),
    ],
)
def test_refused(
    changed: Callable[..., Path],
    tmp_path: Path,
    config: Json,
    definition: Callable[[Json], None] | None,
    files: Json,
    message: str,
) -> None:
    folder = changed(config, definition, **files)
    source = write_jsonl(tmp_path / "t.jsonl", TEXTS)
    with pytest.raises(CptError, match=message):
        prepare(source, tmp_path / "out" / "ds", folder, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_tokenizers_is_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed({})
    assert load_tokenizer(folder / "tokenizer.json").eos == ("<eos>", 1)
    (folder / "other.json").write_text((folder / "tokenizer.json").read_text())
    with pytest.raises(CptError, match="is not one of a tokenizer's files"):
        load_tokenizer(folder / "other.json")


def test_the_end_of_documents_can_be_named(changed: Callable[..., Path], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", ["one"])
    folder = changed({}, config={"eos_token_id": 0})
    named = prepare(source, tmp_path / "a", folder, eod_token="<bos>", quiet=True)
    assert (named.markers["eod"], named.warnings) == (["<bos>", 0], [])
    ordinary = prepare(source, tmp_path / "b", folder, eod_token="\n", quiet=True)
    assert ordinary.markers["eod"] == ["\n", load_tokenizer(folder).id_of("\n")]
    assert prepare(source, tmp_path / "c", folder, append_eod=False, quiet=True).markers["eod"] is None
    for confirmed in ({"eos_token_id": [0, 1]}, {"eos_token_id": None}, {}):
        report = prepare(source, tmp_path / "d", changed({}, config=confirmed), overwrite=True, quiet=True)
        assert (report.markers["eod"], report.warnings) == (["<eos>", 1], [])


def test_an_end_that_is_also_the_beginning_or_padding_is_said(changed: Callable[..., Path], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", ["one"])
    both = {"bos_token": "<eos>"}
    (warning,) = prepare(source, tmp_path / "a", changed(both), quiet=True).warnings
    assert "Documents end with <eos>, which also begins texts" in warning
    assert prepare(source, tmp_path / "b", changed(both, config={"eos_token_id": 1}), quiet=True).warnings == []
    assert prepare(source, tmp_path / "c", changed(both), eod_token="<eos>", quiet=True).warnings == []
    (warning,) = prepare(source, tmp_path / "d", changed({"pad_token": "<eos>"}), quiet=True).warnings
    assert "<eos> ends documents and is the padding token" in warning


def test_no_unknown_token_is_taken_for_a_named_one(tmp_path: Path) -> None:
    content = tokenizer_folders.trained()["words"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    folder = tokenizer_folders.write({"tokenizer.json": content, "tokenizer_config.json": config}, tmp_path / "words")
    assert load_tokenizer(folder).id_of("fox") == content["model"]["vocab"]["fox"]
    with pytest.raises(CptError, match=r"has no single token '<\|im_end\|>'"):
        prepare(write_jsonl(tmp_path / "t.jsonl", ["fox"]), tmp_path / "ds", folder, eod_token="<|im_end|>", quiet=True)


def test_ids_beyond_uint16_of_a_small_vocabulary(changed: Callable[..., Path], tmp_path: Path) -> None:
    def move(content: Json) -> None:
        content["model"]["vocab"]["s"] = 70_000

    folder = changed({}, move)
    report = prepare(write_jsonl(tmp_path / "t.jsonl", ["s"]), tmp_path / "ds", folder, quiet=True, verify=1)
    assert report.dtype == "int32"
    assert read_tokens(read_index(report.prefix), 0).tolist() == [70_000, 1]


def test_a_tiktoken_vocabulary(tmp_path: Path) -> None:
    folder = tmp_path / "tiktoken"
    folder.mkdir()
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", "京".encode()[:2], "京".encode(), b"  "]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    report = prepare(write_jsonl(tmp_path / "t.jsonl", TEXTS), tmp_path / "ds", folder, quiet=True, verify=3)
    assert same_files(report.prefix, write_reference(tmp_path / "reference", TEXTS, folder))


def test_changed_settings_are_another_job(changed: Callable[..., Path], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", TEXTS)
    folder = changed({"pad_token": "<pad>"})
    assert prepare(source, tmp_path / "ds", folder, quiet=True).status == "written"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    assert prepare(source, tmp_path / "ds", folder, quiet=True).status == "unchanged"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_prefix_space": True}))
    with pytest.raises(CptError, match="its tokenizer_reading is"):
        prepare(source, tmp_path / "ds", folder, quiet=True)


@pytest.mark.parametrize(
    ("check", "change", "message"),
    [
        ("_check_definition", ({}, set_prefix_space, {}), "is not what transformers .* gives for its text"),
        (
            "_with_special_map",
            ({}, None, {"special_tokens_map": {"eos_token": "<bos>"}}),
            r"took \('<eos>', 1\) for the eos of .*, transformers takes \('<bos>', 0\)",
        ),
        ("_check_added", ({"sep_token": "<sep>"}, None, {}), "for the vocabulary_size of"),
    ],
)
def test_verify_finds_a_setting_that_the_list_forgot(
    changed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    check: str,
    change: Any,
    message: str,
) -> None:
    config, definition, files = change
    folder = changed(config, definition, **files)
    source = write_jsonl(tmp_path / "t.jsonl", TEXTS)
    monkeypatch.setattr(tokenizer_files, check, lambda settings, *others: settings)
    prepare(source, tmp_path / "ds", folder, quiet=True)
    with pytest.raises(CptError, match=message):
        prepare(source, tmp_path / "ds", folder, quiet=True, verify=3)


def write_forged(monkeypatch: pytest.MonkeyPatch, character: str) -> None:
    """Make fastokens give another id for texts that hold a character."""
    encode = FastEncoder.encode

    def forged(self: FastEncoder, texts: list[str]) -> tuple[Any, Any]:
        return encode(self, [text.replace(character, "x") for text in texts])

    monkeypatch.setattr(FastEncoder, "encode", forged)


@pytest.mark.parametrize(("character", "workers"), [("ฬ", 1), ("\u0903", 3), ("🜁", 1), ("€", 3)])
def test_a_character_that_the_encoder_gets_wrong_is_found_on_the_way(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, character: str, workers: int
) -> None:
    texts = [f"The river {number} runs past 古い石の家。" for number in range(600)]
    texts[500] = f"one {character} in all"
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    write_forged(monkeypatch, character)
    options: Json = {"workers": workers, "chunk_bytes": 10_000, "quiet": True}
    with pytest.raises(CptError, match=r"fastokens .* gives other ids than tokenizers .* nothing of it is kept"):
        prepare(source, tmp_path / "out" / "ds", small, checkpoint_seconds=0, **options)
    assert not (tmp_path / "out").exists()
    report = prepare(source, tmp_path / "out" / "ds", small, fast=False, **options)
    assert same_files(report.prefix, write_reference(tmp_path / "reference", texts, small))
    unseen = prepare(source, tmp_path / "unseen", small, verify=0, **options)
    assert (unseen.compared, same_files(unseen.prefix, report.prefix)) == (0, False)


def test_what_was_compared_is_in_the_manifest(tmp_path: Path, jsonl: Path, small: Path) -> None:
    report = prepare(jsonl, tmp_path / "ds", small, quiet=True)
    assert report.compared == read_manifest(tmp_path / "ds")["compared"] > 20
    assert "same ids as tokenizers" in report.encoder


@given(st.lists(st.text(), max_size=40))
@settings(max_examples=60, deadline=None)
def test_every_kind_of_character_is_looked_at(texts: list[str]) -> None:
    lookout = Lookout()
    found = [kind for batch in (texts[:15], texts[15:]) for kind, _, _ in lookout.look(batch)]
    kinds = [kind_of(character) for character in set("".join(texts))]
    assert set(found) == set(kinds)
    assert all(found.count(kind) == min(kinds.count(kind), PER_KIND) for kind in kinds)


def test_of_a_long_corpus_one_document_in_sixteen_is_looked_at() -> None:
    lookout = Lookout()
    lookout.look(["a" * WHOLE, "b"])
    texts = [chr(0x4E00 + number) for number in range(100)]
    seen = [number for start in (0, 37) for _, number, _ in lookout.look(texts[start : start + 37])]
    assert len(seen) <= 5


def test_kinds_are_scripts_and_categories() -> None:
    assert [kind_of(character) for character in "aД語１٣\n€"] == [
        "LATIN Ll",
        "CYRILLIC Lu",
        "CJK Lo",
        "FULLWIDTH Nd",
        "ARABIC-INDIC Nd",
        "U+00xx Cc",
        "U+20xx Sc",
    ]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"died with signal 9 \(SIGKILL\)"),
        (lambda: os._exit(3), "died with exit code 3"),
        (lambda: [][0], "cannot encode a text: list index out of range"),
    ],
)
def test_the_end_of_the_references_process_is_told(end: Callable[[], Any], message: str) -> None:
    reference = Reference(end)
    reference.ask(["text"])
    with pytest.raises(CptError, match=message):
        reference.answer()
    reference.close()


def test_a_process_whose_tokenizers_have_used_threads_prepares(tmp_path: Path, jsonl: Path, small: Path) -> None:
    """NeMo sets TOKENIZERS_PARALLELISM when it is imported; tokenizers then no longer turns threads off in forks."""
    code = (
        "import sys, tokenizers; from nemo_cpt.corpus import prepare\n"
        "tokenizers.Tokenizer.from_file(f'{sys.argv[3]}/tokenizer.json').encode_batch(['a text'] * 1000)\n"
        "prepare(*sys.argv[1:], quiet=True)"
    )
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "True"}
    subprocess.run([sys.executable, "-c", code, jsonl, tmp_path / "ds", small], check=True, env=environment, timeout=60)


def test_long_texts_that_fastokens_cuts_among_threads_are_prepared(
    changed: Callable[..., Path], tmp_path: Path
) -> None:
    """It does where it does not know the pre-tokenizer; workers, which are forked, would wait for threads for ever."""
    pattern = {"type": "Split", "pattern": {"Regex": r"\p{L}+|[^\p{L}]"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    own = {"type": "Sequence", "pretokenizers": [pattern, level]}
    folder = changed({}, lambda content: content.update(pre_tokenizer=own))
    texts = [*TEXTS, "The river runs past the old stone house. " * 3000]
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    code = "import sys; from nemo_cpt.corpus import prepare; prepare(*sys.argv[1:], quiet=True, workers=2)"
    subprocess.run([sys.executable, "-c", code, source, tmp_path / "ds", folder], check=True, timeout=60)
    assert "fastokens" in read_manifest(tmp_path / "ds")["encoder"]
    assert same_files(tmp_path / "ds_text_document", write_reference(tmp_path / "reference", texts, folder))
