"""A tokenizer's folder, and its tokenizer.json read as the JSON that it is where transformers makes nothing else of it.

transformers takes four seconds to import, and its classes change what tokenizer.json says: more added tokens, other
flags of them, another pre-tokenizer. So a folder is read here only if everything in it is on the list of what changes
no id; tests/corpus/test_tokenizer_fuzz.py compares with transformers.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from nemo_cpt.errors import CptError, near_paths

CONFIG, DEFINITION = "tokenizer_config.json", "tokenizer.json"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
FILES = (
    ADDED,
    "merges.txt",
    "spiece.model",
    SPECIAL_MAP,
    "tekken.json",
    DEFINITION,
    "tokenizer.model",
    CONFIG,
    "vocab.json",
    "vocab.txt",
)
# What decides ids. The configuration is left out of the hash: a chat template that is added makes no other tokenizer.
VOCABULARY_FILES = tuple(name for name in FILES if name not in (CONFIG, SPECIAL_MAP))
# Of a hub's repository
OTHER_FILES = ("*.model", "*.spm", "*.tiktoken", "*.jinja", "config.json", "generation_config.json")

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
NAMELESS = ""  # a folder of which no file says the class
TRANSFORMERS_5 = "TokenizersBackend"  # what PreTrainedTokenizerFast is called there
# Classes that leave tokenizer.json as it is, with the special tokens that they name where the configuration does not
CLASSES: dict[str, tuple[str, ...]] = {
    NAMELESS: (),
    "PreTrainedTokenizer": (),
    TRANSFORMERS_5: (),
    "GPT2Tokenizer": ("bos_token", "eos_token", "unk_token"),
    "Qwen2Tokenizer": ("eos_token", "pad_token", "unk_token"),
}
# Top pre-tokenizers that transformers leaves alone; a top ByteLevel's add_prefix_space is the configuration's
PRE_TOKENIZERS = ("Sequence", "Split", "ByteLevel", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Digits")


def _any_of(*types: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in types


_SIDE: Callable[[Any], bool] = ("right", "left").__contains__
# What tokenizer_config.json may say without a change of ids, beside the special tokens, which are looked up
NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "add_bos_token": _any_of(bool),  # the special tokens around a text; prepare sets its own
    "add_eos_token": _any_of(bool),
    "add_prefix_space": _any_of(bool),
    "backend": _any_of(str),
    "chat_template": _any_of(str, type(None)),
    "clean_up_tokenization_spaces": _any_of(bool, type(None)),  # of decoding
    "errors": _any_of(str),  # of decoding
    "extra_special_tokens": lambda value: value == {},
    "is_local": _any_of(bool),
    "local_files_only": _any_of(bool),
    "model_input_names": _any_of(list),
    "model_max_length": _any_of(int, float, type(None)),
    "name_or_path": _any_of(str),
    "padding_side": _SIDE,
    "processor_class": _any_of(str, type(None)),
    "special_tokens_map_file": _any_of(str, type(None)),
    "split_special_tokens": lambda value: value is False,
    "tokenizer_class": _any_of(str),
    "truncation_side": _SIDE,
    "vocab_size": _any_of(int),
}
_LOOKED_UP = {*NAMED, "additional_special_tokens", "added_tokens_decoder"}


class NotPlainError(Exception):
    """What stands in a tokenizer's files that could change its ids: only transformers knows what it makes of it."""


def find_folder(tokenizer: str) -> Path:
    """Return the folder of a tokenizer, downloaded if it is a name on the hub.

    Raises:
        CptError: There is no such tokenizer.
    """
    folder = Path(tokenizer)
    if folder.is_file():
        if folder.name not in FILES:
            raise CptError(f"{tokenizer} is not one of a tokenizer's files ({', '.join(FILES)}): give its folder.")
        folder = folder.parent
    if folder.is_dir():
        if not any((folder / name).exists() for name in FILES):
            # A base that was imported has the model's in `hf`, a training's checkpoint in its `context`.
            below = {path.parent for name in FILES for at in ("*", "context/*") for path in folder.glob(f"{at}/{name}")}
            hint = f" There is one in {', '.join(str(each) for each in sorted(below)[:3])}." if below else ""
            raise CptError(f"The folder {folder} holds no tokenizer (none of {', '.join(FILES)}).{hint}")
        return folder.resolve()
    # No name of the hub looks like that: asking the hub for a mistyped path would only give a confusing 404.
    if tokenizer.startswith(("/", ".", "~")) or tokenizer.count("/") > 1:
        raise CptError(f"There is no tokenizer folder {tokenizer}{near_paths(folder)}.")
    return _download(tokenizer)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, *OTHER_FILES]))
    except Exception as error:  # the hub's client has some twenty kinds
        # `tokenizers/mine` where there is a folder `tokenizers`: a path of this machine, whatever the hub says.
        if "/" in name and Path(name).parent.is_dir():
            raise CptError(f"There is no tokenizer folder {name}{near_paths(Path(name))}.") from None
        reason = str(error).splitlines()[0]
        raise CptError(
            f"Cannot get the tokenizer {name!r}: there is no such folder here{near_paths(Path(name))}, and the Hugging "
            f"Face hub says: {reason} "
            f"(gated models need HF_TOKEN and the licence accepted on their page)."
        ) from error


def read_object(path: Path, loads: Callable[[bytes], Any] = json.loads) -> dict[str, Any]:
    """Return a file's JSON object, an empty one if there is no such file.

    Raises:
        CptError: It holds something else.
    """
    try:
        content = loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CptError(f"{path} cannot be loaded: {error}.") from error
    if not isinstance(content, dict):
        raise CptError(f"{path} cannot be loaded: it holds no JSON object.")
    return content


def vocabulary_hash(folder: Path) -> str:
    """Return the hash of a tokenizer's vocabulary files, without loading it."""
    named = VOCABULARY_FILES if any((folder / name).exists() for name in VOCABULARY_FILES) else FILES
    return _hash(folder, named)


def settings_hash(folder: Path) -> str:
    """Return the hash of a tokenizer's other files, which say how a text is cut and which tokens are special."""
    return _hash(folder, tuple(name for name in FILES if name not in VOCABULARY_FILES))


def _hash(folder: Path, names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
        if (path := folder / name).exists():
            # Name and size first, so that bytes cannot move from one file to the next unnoticed.
            digest.update(f"{name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def refuse_own_code(folder: Path, config: dict[str, Any]) -> None:
    """Raise CptError where the tokenizer's class is code in its folder (`auto_map`), which nothing here runs."""
    files = {CONFIG: config}
    if config.get("tokenizer_class") is None:
        files["config.json"] = read_object(folder / "config.json")
    for name, content in files.items():
        named = content.get("auto_map")
        if named and (not isinstance(named, dict) or named.get("AutoTokenizer")):
            raise CptError(
                f"{folder / name} names code of its own for the tokenizer (auto_map), which is not run: its ids are "
                "not known. Where a class of transformers does the same, take a copy of the folder without auto_map."
            )


def class_of(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the class that transformers takes for a folder, less its "Fast"; None where config.json decides."""
    named = config.get("tokenizer_class")
    if named is None:
        return None if (folder / "config.json").exists() else NAMELESS
    return str(named).removesuffix("Fast")


def read_plainly(
    folder: Path, config: dict[str, Any], found: Callable[[Path], object] = lambda definition: None
) -> dict[str, Any]:
    """Describe the tokenizer of a folder by its files alone.

    Args:
        folder: The folder.
        config: Its tokenizer_config.json.
        found: Called with the path of its tokenizer.json when only that is still to be read.

    Returns:
        Fields of `Tokenizer`.

    Raises:
        NotPlainError: Something in the files is not on the list.
        CptError: A file is unreadable.
    """
    settings = _settings(folder, config)
    path = folder / DEFINITION
    if not path.exists():
        raise NotPlainError(f"there is no {DEFINITION}")
    # As early as it is safe: the encoders load while the rest of this is checked.
    found(path)
    content = read_object(path, orjson.loads)
    try:
        model, entries = content["model"], content.get("added_tokens") or []
        vocabulary, added = model["vocab"], {entry["content"]: entry for entry in entries}
        _check_definition(content, entries, settings.get("add_prefix_space", False))
        _check_added(config, settings, added)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise NotPlainError(f"{DEFINITION} has an unknown form ({error!r})") from error
    refuse_dropout(folder, model)

    def named(kind: str) -> tuple[str, int] | None:
        text = _text(settings.get(kind))
        return None if text is None else (text, int(added[text]["id"]))

    numbers = [entry["id"] for entry in entries]
    return {
        # A union: added tokens may stand in the model's vocabulary as well.
        "vocabulary_size": len(vocabulary.keys() | added.keys()),
        "highest": max(max(vocabulary.values(), default=0), max(numbers, default=0)),
        "eos": named("eos_token"),
        "bos": named("bos_token"),
        "pad": named("pad_token"),
        "special": {text: entry["id"] for text, entry in added.items() if entry["special"]},
        "added": tuple(added),
        "definition": path,
    }


def refuse_dropout(folder: Path, model: dict[str, Any]) -> None:
    """Raise CptError for a model of tokenizer.json that leaves out merges at random."""
    if model.get("dropout"):
        raise CptError(
            f"The tokenizer in {folder} has dropout {model['dropout']}: it gives other ids for a text each time. Set "
            f"model.dropout to null in a copy of its {DEFINITION}."
        )


def _settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers hands to the class, special tokens of the other files included."""
    name = class_of(folder, config)
    if name not in CLASSES:
        raise NotPlainError(f"its class is {name}")
    if name == TRANSFORMERS_5 and str(read_object(folder / "config.json").get("model_type")).startswith("qwen"):
        raise NotPlainError("for the model in config.json, transformers 5 takes a class of its own instead")
    settings = dict(config)
    if "added_tokens_decoder" not in config:  # the other files count in this older form alone
        if (folder / ADDED).exists():
            raise NotPlainError(f"there is an {ADDED}")
        settings = _with_special_map(settings, read_object(folder / SPECIAL_MAP))
    extra = settings.get("extra_special_tokens")
    if name == TRANSFORMERS_5 and isinstance(extra, list):
        settings |= {"extra_special_tokens": {}, "additional_special_tokens": extra}
    for key, value in settings.items():
        if key not in _LOOKED_UP and (key not in NEUTRAL or not NEUTRAL[key](value)):
            raise NotPlainError(f"{key} is {str(value)[:80]!r}")
    if missing := [kind for kind in CLASSES[name] if kind not in settings]:
        raise NotPlainError(f"{', '.join(missing)} is left to {name}")
    return settings


def _with_special_map(config: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with special_tokens_map.json, which goes before it."""
    if others := named.keys() - {*NAMED, "additional_special_tokens"}:
        raise NotPlainError(f"{SPECIAL_MAP} names {', '.join(sorted(others))}")
    merged = config | named
    if "additional_special_tokens" in named:
        both = (config.get("additional_special_tokens") or [], named["additional_special_tokens"] or [])
        merged["additional_special_tokens"] = [token for tokens in both for token in tokens]
    return merged


def _check_definition(content: dict[str, Any], entries: list[dict[str, Any]], add_prefix_space: bool) -> None:
    """Raise NotPlainError unless the class would take over a tokenizer.json as it is."""
    model, before = content["model"], content.get("pre_tokenizer") or {}
    if model.get("type") not in ("BPE", "WordLevel", "WordPiece") or not isinstance(model["vocab"], dict):
        raise NotPlainError(f"its model is {model.get('type')}")
    if before and before["type"] not in PRE_TOKENIZERS:
        raise NotPlainError(f"its pre-tokenizer is {before['type']}")
    if before and before["type"] == "ByteLevel" and before["add_prefix_space"] is not add_prefix_space:
        raise NotPlainError(f"add_prefix_space is {add_prefix_space} in {CONFIG}, not so in {DEFINITION}")
    if content.get("padding"):
        raise NotPlainError("it has padding")  # whose token transformers adds
    if not _numbered_as_loaded(entries, model["vocab"]):
        raise NotPlainError("its added tokens would get other ids")


def _numbered_as_loaded(entries: list[dict[str, Any]], vocabulary: dict[str, int]) -> bool:
    """Whether the added tokens have the ids that tokenizers gives them, whatever the file says."""
    # tokenizers numbers added tokens anew when it loads them, after the vocabulary, in the file's order.
    highest = len(vocabulary) - 1
    for entry in entries:
        expected = vocabulary.get(entry["content"], highest + 1)
        if entry["id"] != expected or not entry["content"] or entry.keys() != {"id", "content", *FLAGS}:
            return False
        highest = max(highest, expected)
    return len({entry["content"] for entry in entries}) == len(entries)


def _check_added(config: dict[str, Any], settings: dict[str, Any], added: dict[str, dict[str, Any]]) -> None:
    """Raise NotPlainError unless all tokens that the settings add are in tokenizer.json, with the same flags."""
    decoder = config.get("added_tokens_decoder")
    known = added
    if decoder is not None:
        known = {entry["content"]: {"id": int(number), **entry} for number, entry in decoder.items()}
        if different := [text for text, entry in known.items() if added.get(text) != entry]:
            raise NotPlainError(f"added_tokens_decoder changes {', '.join(map(repr, different[:3]))}")
    plain = settings.get("tokenizer_class") == TRANSFORMERS_5  # which takes the flags of special tokens away
    named = [token for kind in NAMED if (token := settings.get(kind)) is not None]
    more = settings.get("additional_special_tokens") or []
    for token in [*named, *more]:
        entry = (added if token in more else known).get(_text(token), {})
        if not entry.get("special") or (plain and any(entry[flag] for flag in FLAGS[:-1])):
            raise NotPlainError(f"the special token {_text(token)!r} would be added or changed")
        if isinstance(token, dict) and any(token.get(flag, entry[flag]) != entry[flag] for flag in FLAGS):
            raise NotPlainError(f"the special token {_text(token)!r} has other flags than in {DEFINITION}")


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
