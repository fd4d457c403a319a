"""What a tokenizer's files say of its ids, read without loading it: transformers would import PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_cpt.errors import CptError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
            "additional_special_tokens")  # fmt: skip
END_OF_TEXT = "eos_token_id"  # of config.json and generation_config.json


def count_token_ids(folder: str | Path) -> int | None:
    """How many ids a tokenizer has, 0 to the highest one; a model needs as many rows in its embedding.

    Added tokens count, and the special ones that a config names and the vocabulary lacks: transformers appends those
    when it loads the tokenizer.

    Returns:
        The highest id plus 1; None where the files are of another kind than Hugging Face's tokenizer.json, a
        vocab.json or a SentencePiece model.
    """
    folder = Path(folder)
    try:
        ids = _vocabulary(folder)
        if ids is None:
            return None
        config = _json(folder / "tokenizer_config.json")
        ids |= _json(folder / "added_tokens.json")
        decoder = config.get("added_tokens_decoder") or {}
        ids |= {_content(entry): int(number) for number, entry in decoder.items()}
        # Older files, without the decoder, have their special tokens in a file of their own, which then goes first.
        special = config if decoder else {**config, **_json(folder / "special_tokens_map.json")}
        # A set: a token may be bos and pad at once, and is appended once.
        appended = {token for token in _special_tokens(special) if token not in ids}
        return max(ids.values(), default=-1) + 1 + len(appended)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return None  # whoever loads the tokenizer says what is wrong with it


def end_ids(fields: Mapping[str, Any], where: str) -> list[int]:
    """The ids at which texts or replies end, by the fields of a config.json or generation_config.json.

    Raises:
        CptError: something else stands there; `where` names it.
    """
    found = fields.get(END_OF_TEXT)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(each) is int for each in ids):  # true is an int in Python
        raise CptError(
            f"{where}: {END_OF_TEXT} cannot be {found!r}; it is a token's id, or a list of them. Download the file "
            "again."
        )
    return ids


def check_tokenizer_class(folder: str | Path) -> None:
    """Refuse a tokenizer whose class only transformers 5 has, with the cure.

    Raises:
        CptError: its class is TokenizersBackend.
    """
    path = Path(folder) / "tokenizer_config.json"
    try:
        config = _json(path)
    except (OSError, ValueError, TypeError):
        return
    if config.get("tokenizer_class") == "TokenizersBackend":
        raise CptError(
            f"{path} names the class TokenizersBackend, which transformers 5 writes and the installed one, a 4, does "
            'not have. Where tokenizer.json lies beside it, write "PreTrainedTokenizerFast" there instead: it is the '
            "same class under its older name."
        )


def _vocabulary(folder: Path) -> dict[str, int] | None:
    if (folder / "tokenizer.json").is_file():
        content = _json(folder / "tokenizer.json")
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # of a Unigram model: pairs of piece and score, by id
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        return {**vocabulary, **{entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}}
    if (folder / "vocab.json").is_file():
        return _json(folder / "vocab.json")
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return {pieces.id_to_piece(number): number for number in range(pieces.get_piece_size())}
    return None


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def _special_tokens(named: Mapping[str, Any]) -> Iterator[str]:
    for name in _SPECIAL:
        value = named.get(name) or []
        for token in value if isinstance(value, list) else [value]:
            yield _content(token)


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)
