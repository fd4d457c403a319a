"""A byte-level BPE tokenizer as its tokenizer.json describes it, and what another one that grew from it shares with it.

GPT-2's, Llama-3's, Qwen2's and SmolLM2's are of this kind. Its tokens are sequences of bytes, each byte written as one
printable character.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import orjson

from nemo_cpt.corpus.tokenization.tokenizer import Tokenizer, load_tokenizer
from nemo_cpt.corpus.tokenization.tokenizer_files import DEFINITION, find_folder, read_object
from nemo_cpt.errors import CptError

RECORD = "grown.json"  # in a grown tokenizer's folder: what it grew from, and that from
FIRST_ROW = "first_row"  # in a grown model's: at which its own growth began
Pair = tuple[str, str]


@dataclass(frozen=True)
class ByteLevelBPE:
    """A byte-level BPE tokenizer.

    Attributes:
        described: the tokenizer, with its special tokens.
        content: its tokenizer.json.
    """

    described: Tokenizer
    content: dict[str, Any]

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids of the model's tokens, as bytes' characters, without tokens that were only added."""
        return self.content["model"]["vocab"]

    @cached_property
    def merges(self) -> list[Pair]:
        """The merges, from the first to be made to the last."""
        return [_pair(each) for each in self.content["model"]["merges"]]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids of all tokens, added ones included."""
        return self.vocabulary | {entry["content"]: entry["id"] for entry in self.content.get("added_tokens") or ()}

    @cached_property
    def size(self) -> int:
        """The highest id plus 1: the rows that a model needs."""
        return max(self.ids.values()) + 1

    def model_alone(self) -> Any:
        """A `tokenizers.Tokenizer` that encodes words as bytes' characters: no added tokens, nothing split."""
        from tokenizers import Tokenizer as Backend

        # Words come as bytes' characters already: the pre-tokenizer would take these for text and write them as bytes
        # again.
        bare = self.content | {part: None for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
        return Backend.from_str(orjson.dumps(bare | {"added_tokens": []}).decode())

    def backend(self) -> Any:
        """The whole tokenizer as a `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer as Backend

        # Whole texts are counted and compared: a tokenizer.json may hold the truncation of whoever saved it.
        backend = Backend.from_str(orjson.dumps(self.content | {"truncation": None, "padding": None}).decode())
        backend.encode_special_tokens = False
        return backend


def read_byte_level(tokenizer: str) -> ByteLevelBPE:
    """Read a tokenizer that can be grown.

    Args:
        tokenizer: a folder, or a name on the hub.

    Raises:
        CptError: there is none, or it is of another kind.
    """
    written = read_object(find_folder(tokenizer) / DEFINITION, orjson.loads)
    if isinstance(written.get("model"), dict):
        _check_kind(tokenizer, written)  # here already: what is no byte-level BPE, transformers takes long to load
    described = load_tokenizer(tokenizer)
    if described.definition is None:
        raise CptError(f"{tokenizer} is a tokenizer without a tokenizer.json: only byte-level BPE can be grown")
    path = described.definition
    content = read_object(path, orjson.loads) if isinstance(path, Path) else orjson.loads(path)
    _check_kind(tokenizer, content)
    if not content["model"]["merges"]:
        raise CptError(f"the tokenizer {tokenizer} has no merges: there is nothing for further ones to build on")
    return ByteLevelBPE(described, content)


def _check_kind(tokenizer: str, content: Mapping[str, Any]) -> None:
    model = content["model"]
    if model.get("type") != "BPE" or not _is_byte_level(content.get("pre_tokenizer")):
        kind = model.get("type") if model.get("type") != "BPE" else "BPE over characters, not over bytes"
        raise CptError(
            f"the tokenizer {tokenizer} is {kind}: only byte-level BPE can be grown, such as Llama-3's, Qwen2.5's or "
            "SmolLM2's"
        )


def ancestor(grown: ByteLevelBPE, vocabulary_size: int, merges: int) -> dict[str, Any]:
    """The tokenizer.json of what a tokenizer grew from: without the ids and the merges that came later."""
    model = grown.content["model"]
    old = {token: number for token, number in model["vocab"].items() if number < vocabulary_size}
    return grown.content | {"model": model | {"vocab": old, "merges": model["merges"][:merges]}}


def before_growth(folder: Path) -> Iterator[Tokenizer]:
    """The tokenizers that the one in a folder grew from, the nearest first; none where it did not grow."""
    record = read_object(folder / RECORD).get("from")
    grown = read_byte_level(str(folder)) if record else None
    while record and grown:
        content = ancestor(grown, record["vocabulary_size"], record["merges"])
        entries = content.get("added_tokens") or ()
        size = len(content["model"]["vocab"].keys() | {entry["content"] for entry in entries})
        yield replace(
            grown.described,
            name=record["name"],
            vocabulary_size=size,
            definition=orjson.dumps(content).decode(),
            loaded=None,
        )
        # A tokenizer that grew twice holds the first growth's record in the second's.
        record = record.get("from")


def grew_from(grown: ByteLevelBPE, base: ByteLevelBPE) -> str | None:
    """What keeps a tokenizer from being a grown `base`, in words; None where it is one."""
    if differing := [token for token, number in base.ids.items() if grown.ids.get(token) != number]:
        number = base.ids[differing[0]]
        return f"{differing[0]!r} is {grown.ids.get(differing[0], 'no token')} in it and {number} in the other"
    old = base.merges
    # In this order and at the front: a merge that came earlier would change texts that hold none of the new tokens.
    if grown.merges[: len(old)] != old:
        return f"its first {len(old):,} merges are not the other's"
    # Equal merges in words that are cut otherwise are other tokens.
    for part in ("normalizer", "pre_tokenizer"):
        if grown.content.get(part) != base.content.get(part):
            return f"its {part} is another one"
    return None


@cache
def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for, as GPT-2 has chosen them."""
    # Printable in Latin-1, without the soft hyphen (0xAD): they stand for themselves, the others for U+0100 and on.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def bytes_of(token: str) -> bytes | None:
    """The bytes that a token stands for; None for one that is not written in bytes' characters."""
    table = byte_of_character()
    return bytes(table[each] for each in token) if all(each in table for each in token) else None


def parts_of_pre_tokenizer(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A pre-tokenizer's parts in their order, where it is a sequence of them."""
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        for part in pre_tokenizer["pretokenizers"]:
            yield from parts_of_pre_tokenizer(part)
    elif pre_tokenizer:
        yield pre_tokenizer


def _is_byte_level(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    parts = list(parts_of_pre_tokenizer(pre_tokenizer))
    return bool(parts) and parts[-1]["type"] == "ByteLevel"


def _pair(merge: str | list[str]) -> Pair:
    left, right = merge.split(" ") if isinstance(merge, str) else merge  # older files write them with a blank
    return left, right
