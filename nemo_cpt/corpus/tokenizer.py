"""Tokenizers: the reference (Hugging Face) and fastokens, which stands in for it where both give the same ids."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import orjson

from nemo_cpt.errors import CptError

FILES = (
    "added_tokens.json",
    "merges.txt",
    "spiece.model",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
VOCABULARY_FILES = tuple(name for name in FILES if name not in ("tokenizer_config.json", "special_tokens_map.json"))


class Encoder(Protocol):
    """Turns texts into ids without BOS or EOS."""

    name: str

    def encode(self, texts: list[str]) -> tuple[Any, Any]:
        """Return all ids, uint32 of shape [tokens], and where each text's begin, of shape [texts + 1]."""


class FastEncoder:
    """fastokens: the same ids at 20 to 70 times the speed (docs/corpus.md)."""

    def __init__(self, definition: str | Path, split_special_tokens: bool) -> None:
        # One thread a process: the pool makes the processes. fastokens reads this when it is imported.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        from fastokens._native import Tokenizer as Native

        self.name = f"fastokens {version('fastokens')}"
        self._tokenizer = (Native.from_file if isinstance(definition, Path) else Native.from_json_str)(str(definition))
        self._tokenizer.no_truncation()
        self._split = split_special_tokens

    def encode(self, texts: list[str]) -> tuple[Any, Any]:
        """Encode a batch; see `Encoder`."""
        import numpy as np

        ids, offsets = self._tokenizer.encode_batch_flat(texts, False, self._split)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64)


class ReferenceEncoder:
    """Hugging Face tokenizers' own batch encoder."""

    def __init__(self, definition: str | Path, split_special_tokens: bool) -> None:
        import tokenizers

        self.name = f"tokenizers {tokenizers.__version__}"
        try:
            load = tokenizers.Tokenizer.from_file if isinstance(definition, Path) else tokenizers.Tokenizer.from_str
            self._tokenizer = load(str(definition))
        except Exception as error:  # a bare Exception is what the library raises
            raise CptError(f"tokenizer.json cannot be loaded: {error}.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = split_special_tokens

    def encode(self, texts: list[str]) -> tuple[Any, Any]:
        """Encode a batch; see `Encoder`."""
        return _flatten([e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)])


class SlowEncoder:
    """A transformers tokenizer written in Python, called as NeMo's script calls it."""

    def __init__(self, tokenizer: Any, split_special_tokens: bool) -> None:
        self.name = f"transformers {version('transformers')} ({type(tokenizer).__name__})"
        self._tokenizer = tokenizer
        self._split = split_special_tokens

    def encode(self, texts: list[str]) -> tuple[Any, Any]:
        """Encode a batch; see `Encoder`."""
        tokenize, to_ids = self._tokenizer.tokenize, self._tokenizer.convert_tokens_to_ids
        return _flatten([to_ids(tokenize(text, split_special_tokens=self._split)) for text in texts])


def _flatten(lists: list[list[int]]) -> tuple[Any, Any]:
    import numpy as np

    offsets = np.zeros(len(lists) + 1, np.uint64)
    np.cumsum([len(ids) for ids in lists], out=offsets[1:])
    return np.array([i for ids in lists for i in ids], np.uint32), offsets


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer, described.

    Attributes:
        name: What the user gave.
        folder: Where its files are.
        sha256: Hash of its vocabulary files.
        vocabulary_size: Ids including added tokens, `len(tokenizer)` in transformers.
        eos: Text and id of its end-of-text token, None where it has none.
        bos: Text and id of its begin-of-text token, None where it has none.
        special: Ids of its special tokens by text.
        definition: Its `tokenizer.json`, a path or the content; None for one that only Python can run.
    """

    name: str
    folder: str
    sha256: str
    vocabulary_size: int
    eos: tuple[str, int] | None
    bos: tuple[str, int] | None
    special: dict[str, int]
    definition: str | Path | None

    def reference_encoder(self, split_special_tokens: bool = False) -> Encoder:
        """Return the Hugging Face implementation."""
        if self.definition is None:
            return SlowEncoder(_transformers_tokenizer(self.folder), split_special_tokens)
        return ReferenceEncoder(self.definition, split_special_tokens)

    def id_of(self, token: str) -> int:
        """Return the id of one token's text.

        Raises:
            CptError: The vocabulary has no such token.
        """
        if token in self.special:
            return self.special[token]
        ids, _ = self.reference_encoder().encode([token])
        if len(ids) != 1:
            raise CptError(f"{self.name} has no single token {token!r}: it encodes to {ids.tolist()}.")
        return int(ids[0])


def load_tokenizer(
    tokenizer: str | os.PathLike[str], found: Callable[[Path], object] = lambda definition: None
) -> Tokenizer:
    """Describe a Hugging Face tokenizer.

    Args:
        tokenizer: A folder, or a name on the hub (`meta-llama/Llama-3.1-8B`); only tokenizer files are downloaded.
        found: Called with the path of a tokenizer.json that is the whole tokenizer, before the rest is read.

    Raises:
        CptError: There is no such tokenizer, or it cannot be loaded.
    """
    folder = _folder_of(str(tokenizer))
    config = _read_json(folder / "tokenizer_config.json")
    # For this class tokenizer.json is the whole tokenizer; the others' constructors change it.
    plain = config.get("tokenizer_class", "PreTrainedTokenizerFast") == "PreTrainedTokenizerFast"
    direct = None
    if plain and (folder / "tokenizer.json").exists():
        found(folder / "tokenizer.json")
        direct = _describe_directly(folder, config)
    described = direct or _describe_by_transformers(folder)
    return Tokenizer(name=str(tokenizer), folder=str(folder), sha256=vocabulary_hash(folder), **described)


def _folder_of(tokenizer: str) -> Path:
    folder = Path(tokenizer)
    if folder.is_file():
        folder = folder.parent
    if folder.is_dir():
        if not any((folder / name).exists() for name in FILES):
            raise CptError(f"The folder {folder} holds no tokenizer (none of {', '.join(FILES)}).")
        return folder.resolve()
    if tokenizer.startswith(("/", ".", "~")) or tokenizer.count("/") > 1:
        raise CptError(f"There is no tokenizer folder {tokenizer}.")
    return _download(tokenizer)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, "config.json"]))
    except Exception as error:  # the hub's client has some twenty kinds
        reason = str(error).splitlines()[0]
        raise CptError(
            f"Cannot get the tokenizer {name!r}: there is no such folder here, and the Hugging Face hub says: {reason} "
            f"(gated models need HF_TOKEN and the licence accepted on their page)."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CptError(f"{path} is not JSON: {error}.") from error


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
            digest.update(f"{name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _describe_directly(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Read tokenizer.json as the JSON that it is; None where the configuration adds tokens, or its form is unknown.

    Neither transformers nor the tokenizer itself is loaded, which takes seconds.
    """
    path = folder / "tokenizer.json"
    try:
        content = orjson.loads(path.read_bytes())
        vocabulary = content["model"]["vocab"]
        added = {entry["content"]: entry for entry in content.get("added_tokens", [])}
    except (ValueError, KeyError, TypeError) as error:
        raise CptError(f"{path} cannot be loaded: {error!r}.") from error
    added_later = config.get("added_tokens_decoder", {})
    if any(added.get(entry["content"], {}).get("id") != int(number) for number, entry in added_later.items()):
        return None
    if not isinstance(vocabulary, dict):
        return None
    named = _read_json(folder / "special_tokens_map.json") | config

    def token(kind: str) -> tuple[str, int] | None:
        text = named.get(kind)
        text = text.get("content") if isinstance(text, dict) else text
        number = added[text]["id"] if text in added else vocabulary.get(text)
        return None if text is None or number is None else (str(text), int(number))

    return {
        "vocabulary_size": len(vocabulary.keys() | added.keys()),
        "eos": token("eos_token"),
        "bos": token("bos_token"),
        "special": {text: int(entry["id"]) for text, entry in added.items() if entry.get("special")},
        "definition": path,
    }


def _transformers_tokenizer(folder: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), use_fast=True)
    except Exception as error:  # every tokenizer class fails in its own way
        raise CptError(f"transformers cannot load the tokenizer in {folder}: {error}") from error


def _describe_by_transformers(folder: Path) -> dict[str, Any]:
    loaded = _transformers_tokenizer(folder)

    def token(kind: str) -> tuple[str, int] | None:
        text = getattr(loaded, f"{kind}_token")
        return None if text is None else (str(text), int(getattr(loaded, f"{kind}_token_id")))

    special = {t.content: number for number, t in loaded.added_tokens_decoder.items() if t.special}
    return {
        "vocabulary_size": len(loaded),
        "eos": token("eos"),
        "bos": token("bos"),
        "special": special | dict(zip(loaded.all_special_tokens, loaded.all_special_ids, strict=True)),
        "definition": loaded.backend_tokenizer.to_str() if loaded.is_fast else None,
    }


def strict_encoder(tokenizer: Tokenizer, split_special_tokens: bool = False) -> Encoder:
    """Return transformers' own tokenizer, called as NeMo's script calls it: the judge of all other encoders."""
    try:
        return SlowEncoder(_transformers_tokenizer(tokenizer.folder), split_special_tokens)
    except CptError:  # a folder that holds a tokenizer.json and nothing else
        return tokenizer.reference_encoder(split_special_tokens)
