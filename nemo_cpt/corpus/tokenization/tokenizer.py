"""Tokenizers: the reference (Hugging Face) and fastokens, which stands in for it where both give the same ids."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import orjson

from nemo_cpt.corpus.processes import in_order
from nemo_cpt.corpus.tokenization.tokenizer_files import (
    CONFIG,
    DEFINITION,
    FILES,
    NAMELESS,
    TRANSFORMERS_5,
    NotPlainError,
    class_of,
    find_folder,
    read_object,
    read_plainly,
    refuse_dropout,
    refuse_own_code,
    vocabulary_hash,
)
from nemo_cpt.errors import CptError


class Encoder(Protocol):
    """Turns texts into ids without BOS or EOS."""

    name: str

    def encode(self, texts: list[str]) -> tuple[Any, Any]:
        """Return all ids, uint32 of shape [tokens], and where each text's begin, of shape [texts + 1]."""


# Characters from which on fastokens may cut a text among threads: a quarter of the bytes at which 0.3.5 does (64 KiB).
MAY_BE_CUT = 2**14


class FastEncoder:
    """fastokens: the same ids at 20 to 70 times the speed (docs/corpus.md).

    The process that makes it, from which workers are forked, leaves long texts to forks: with most pre-tokenizers that
    are not a known model's, fastokens cuts them among the threads of a pool, which is made once in a process. A fork
    inherits the pool without its threads, and would wait for them for ever.
    """

    def __init__(self, definition: str | Path, split_special_tokens: bool) -> None:
        # One thread a process: the pool makes the processes. fastokens reads this when it is imported.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        from fastokens._native import Tokenizer as Native

        self.name = f"fastokens {version('fastokens')}"
        self._tokenizer = (Native.from_file if isinstance(definition, Path) else Native.from_json_str)(str(definition))
        # A tokenizer.json may carry the truncation of its last training run, which would cut documents silently.
        self._tokenizer.no_truncation()
        self._split, self._home = split_special_tokens, os.getpid()

    def encode(self, texts: list[str]) -> tuple[Any, Any]:
        """Encode a batch; see `Encoder`."""
        if os.getpid() == self._home and any(len(text) >= MAY_BE_CUT for text in texts):
            ((_, encoded),) = in_order(self._encode, [texts], 1)
            return encoded
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> tuple[Any, Any]:
        import numpy as np

        ids, offsets = self._tokenizer.encode_batch_flat(texts, False, self._split)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64)


class ReferenceEncoder:
    """Hugging Face tokenizers' own batch encoder.

    Args:
        definition: A tokenizer.json, its path or its content; or the backend of one of transformers' tokenizers, which
            its content does not always describe: an added token whose flags were changed keeps some of the old.
        split_special_tokens: Encode the special tokens' names in a text as ordinary text.
    """

    def __init__(self, definition: Any, split_special_tokens: bool) -> None:
        import tokenizers

        self.name = f"tokenizers {tokenizers.__version__}"
        try:
            if isinstance(definition, str | Path):
                load = tokenizers.Tokenizer.from_file if isinstance(definition, Path) else tokenizers.Tokenizer.from_str
                definition = load(str(definition))
        except Exception as error:  # a bare Exception is what the library raises
            raise CptError(f"{DEFINITION} cannot be loaded: {error}.") from error
        self._tokenizer = definition
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = split_special_tokens

    def encode(self, texts: list[str]) -> tuple[Any, Any]:
        """Encode a batch; see `Encoder`."""
        return _flatten([e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)])

    def id_of(self, token: str) -> int | None:
        """Return the id of an entry of the vocabulary."""
        return self._tokenizer.token_to_id(token)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens included."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


class TransformersEncoder:
    """transformers' own tokenizer, the judge of all other encoders: the ids that it gives a model.

    NeMo's script goes by the tokens' names instead, `convert_tokens_to_ids(tokenize(text))`: the same, except that an
    added token that takes blanks with it (`lstrip`, `rstrip`) becomes the unknown token.
    """

    def __init__(self, loaded: Any, split_special_tokens: bool) -> None:
        self._tokenizer = loaded
        self.name = f"transformers {version('transformers')} ({type(self._tokenizer).__name__})"
        # Not passed as False: that would override a tokenizer whose own configuration says True.
        self._options = {"split_special_tokens": True} if split_special_tokens else {}  # else its own setting

    def encode(self, texts: list[str]) -> tuple[Any, Any]:
        """Encode a batch; see `Encoder`.

        Raises:
            CptError: transformers has no id for a token, since the tokenizer names no unknown token.
        """
        return _flatten([self._encode(text) for text in texts])

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer.is_fast:
            return self._tokenizer(text, add_special_tokens=False, verbose=False, **self._options)["input_ids"]
        tokens = self._tokenizer.tokenize(text, **self._options)
        ids = self._tokenizer.convert_tokens_to_ids(tokens)
        if None in ids:
            raise CptError(f"{self.name} has no id for {tokens[ids.index(None)]!r}, and names no unk_token.")
        return ids

    def id_of(self, token: str) -> int | None:
        """Return the id of an entry of the vocabulary."""
        return self._tokenizer.get_vocab().get(token)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens included."""
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _flatten(lists: list[list[int]]) -> tuple[Any, Any]:
    import numpy as np

    # uint64, as fastokens gives them, so that the two compare without a cast.
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
        highest: The largest id, at least `vocabulary_size - 1`, more where the ids have gaps.
        eos: Text and id of its end-of-text token, None where it has none.
        bos: Text and id of its begin-of-text token, None where it has none.
        pad: Text and id of its padding token, None where it has none.
        special: Ids of its special tokens by text.
        added: Texts of all its added tokens, special or not.
        definition: Its `tokenizer.json`: the path, or the content that transformers made; None for one that only Python
            can run.
        split_special_tokens: Its configuration says that special tokens' names in a text are ordinary text.
        reading: Hash of what transformers made of the files; None where tokenizer.json is the whole tokenizer.
        loaded: transformers' own, None where tokenizer.json is the whole tokenizer.
    """

    name: str
    folder: str
    sha256: str
    vocabulary_size: int
    highest: int
    eos: tuple[str, int] | None
    bos: tuple[str, int] | None
    pad: tuple[str, int] | None
    special: dict[str, int]
    added: tuple[str, ...]
    definition: str | Path | None
    split_special_tokens: bool = False
    reading: str | None = None
    loaded: Any = field(default=None, repr=False, compare=False)

    def reference_encoder(self, split_special_tokens: bool = False) -> ReferenceEncoder | TransformersEncoder:
        """Return the Hugging Face implementation that is the faster one."""
        split = split_special_tokens or self.split_special_tokens
        if self.loaded is None:
            return ReferenceEncoder(self.definition, split)
        if self.loaded.is_fast:
            return ReferenceEncoder(self.loaded.backend_tokenizer, split)
        return TransformersEncoder(self.loaded, split)

    def id_of(self, token: str) -> int:
        """Return the id of one token's text.

        Raises:
            CptError: The vocabulary has no such token.
        """
        if token in self.special:
            return self.special[token]
        encoder = self.reference_encoder()
        if (number := encoder.id_of(token)) is not None:
            return number
        ids = encoder.encode([token])[0].tolist()
        if len(ids) != 1 or encoder.decode(ids) != token:  # an unknown token stands for any text
            raise CptError(f"{self.name} has no single token {token!r}: it encodes to {ids}.")
        return int(ids[0])

    def text_of(self, number: int) -> str:
        """Return the text of one token's id."""
        # By its own name first: decoding may put a blank in front, or leave special tokens out.
        names = {value: text for text, value in self.special.items()}
        return names[number] if number in names else self.reference_encoder().decode([number])


def load_tokenizer(
    tokenizer: str | os.PathLike[str], found: Callable[[Path], object] = lambda definition: None
) -> Tokenizer:
    """Describe a Hugging Face tokenizer.

    Args:
        tokenizer: A folder, or a name on the hub (`meta-llama/Llama-3.1-8B`); only tokenizer files are downloaded.
        found: Called with the path of a tokenizer.json that is probably the whole tokenizer, before it is read.

    Raises:
        CptError: There is no such tokenizer, it cannot be loaded, or its ids would not be certain.
    """
    folder = find_folder(str(tokenizer))
    config = read_object(folder / CONFIG)
    refuse_own_code(folder, config)
    try:
        described = read_plainly(folder, config, found)
    except NotPlainError as reason:
        # transformers 4 has no such class, and its own error does not say why.
        if class_of(folder, config) == TRANSFORMERS_5:
            raise CptError(_only_for_transformers_5(folder, str(reason))) from None
        described = describe_by_transformers(folder, load_by_transformers(folder))
    return Tokenizer(name=str(tokenizer), folder=str(folder), sha256=vocabulary_hash(folder), **described)


def _only_for_transformers_5(folder: Path, reason: str) -> str:
    return (
        f"transformers 5 saved the tokenizer in {folder} ({TRANSFORMERS_5}), transformers {version('transformers')} "
        f"cannot load it, and its tokenizer.json alone does not tell its ids: {reason}. Save it with transformers 4: "
        "PreTrainedTokenizerFast.from_pretrained(FOLDER), compare the ids of some texts, save_pretrained."
    )


def load_by_transformers(folder: Path) -> Any:
    """Return transformers' tokenizer for a folder.

    A folder that names no class, and has no config.json that does, is what PreTrainedTokenizerFast makes of it;
    AutoTokenizer loads no such folder. transformers 5's class for the same is not in transformers 4.

    Raises:
        CptError: transformers cannot load it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    generic = class_of(folder, read_object(folder / CONFIG)) in (NAMELESS, TRANSFORMERS_5)
    kind = PreTrainedTokenizerFast if generic else AutoTokenizer
    try:
        loaded = kind.from_pretrained(str(folder), trust_remote_code=False)
        if not loaded:  # what it returns for a file that is none of SentencePiece's
            raise ValueError("its vocabulary has a form that it does not know")
    except Exception as error:  # every tokenizer class fails in its own way
        raise CptError(f"transformers cannot load the tokenizer in {folder}: {error}") from error
    return loaded


def describe_by_transformers(folder: Path, loaded: Any) -> dict[str, Any]:
    """Return the fields of `Tokenizer` for what transformers loaded from a folder.

    Raises:
        CptError: Its ids are not the same each time.
    """
    definition = _definition(loaded)
    if definition is not None:
        # BPE-dropout draws merges at random: no two runs would make the same dataset.
        refuse_dropout(folder, orjson.loads(definition)["model"])

    def token(kind: str) -> tuple[str, int] | None:
        text, number = getattr(loaded, f"{kind}_token"), getattr(loaded, f"{kind}_token_id")
        return None if text is None or number is None else (str(text), int(number))

    special = {t.content: number for number, t in loaded.added_tokens_decoder.items() if t.special}
    return {
        "vocabulary_size": len(loaded),
        "highest": max(loaded.get_vocab().values(), default=0),
        "eos": token("eos"),
        "bos": token("bos"),
        "pad": token("pad"),
        "special": special | dict(zip(loaded.all_special_tokens, loaded.all_special_ids, strict=True)),
        "added": tuple(loaded.added_tokens_encoder),
        "definition": definition,
        "split_special_tokens": bool(loaded.split_special_tokens),
        "reading": _hash_reading(folder, definition),
        "loaded": loaded,
    }


def _definition(loaded: Any) -> str | None:
    """Return a tokenizer.json of what transformers loaded, None where there can be none."""
    if not loaded.is_fast:
        return None
    backend = loaded.backend_tokenizer
    backend.no_padding()  # transformers sets both for each call
    backend.no_truncation()
    try:
        return str(backend.to_str())
    except Exception:  # a bare one, for a part that is written in Python
        return None


def _hash_reading(folder: Path, definition: str | None) -> str:
    """Hash what decides the ids: a definition without what decodes or surrounds them, or the files."""
    digest = hashlib.sha256()
    if definition is None:
        for path in (folder / name for name in FILES if (folder / name).exists()):
            digest.update(path.read_bytes())
    else:
        # Neither changes an id of a text that is encoded without special tokens.
        content = orjson.loads(definition) | {"post_processor": None, "decoder": None}
        # Sorted: the same tokenizer saved by another version has its keys in another order.
        digest.update(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))
    return digest.hexdigest()
