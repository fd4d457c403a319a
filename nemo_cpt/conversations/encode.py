"""Pieces of conversations turned into tokens and a mask of the trained ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nemo_cpt.corpus.tokenization.tokenizer import Encoder, Tokenizer
from nemo_cpt.errors import CptError

Pieces = list[tuple[str, bool]]


class PieceEncoder(Protocol):
    """Turns the pieces of conversations into ids."""

    name: str

    def encode(self, conversations: list[Pieces]) -> tuple[Any, Any]:
        """Return all ids, uint32 of shape [tokens], and the number of each piece's, int64 of shape [pieces]."""


class ApartEncoder:
    """Encodes each piece by itself.

    So does every server: it encodes a question, and appends the answer's tokens as they are sampled. No token holds the
    end of a question and the beginning of its answer.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.name, self._encoder = encoder.name, encoder

    def encode(self, conversations: list[Pieces]) -> tuple[Any, Any]:
        """Encode a batch; see `PieceEncoder`."""
        import numpy as np

        ids, offsets = self._encoder.encode([text for pieces in conversations for text, _ in pieces])
        return ids, np.diff(offsets.astype(np.int64))


class TogetherEncoder:
    """Encodes a conversation in one go, and gives each token to the piece that its last character lies in.

    For tokenizers that encode the same words in another way at the beginning of a text (SentencePiece's).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        import tokenizers

        self._tokenizer = load_backend(tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = f"tokenizers {tokenizers.__version__}"

    def encode(self, conversations: list[Pieces]) -> tuple[Any, Any]:
        """Encode a batch; see `PieceEncoder`."""
        import numpy as np

        texts = ["".join(text for text, _ in pieces) for pieces in conversations]
        ids, counts = [], []
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        for pieces, encoding in zip(conversations, encodings, strict=True):
            ends = np.array([end for _, end in encoding.offsets], np.int64)
            # Offsets count characters, as Python does.
            bounds = np.cumsum([len(text) for text, _ in pieces])
            # accumulate: tokens of one character's bytes may have an end before the last one's.
            piece = np.searchsorted(bounds, np.maximum.accumulate(ends))
            counts.append(np.bincount(piece, minlength=len(pieces)))
            ids.append(np.array(encoding.ids, np.uint32))
        return np.concatenate(ids), np.concatenate(counts)


def choose_piece_encoder(encoder: Encoder, tokenizer: Tokenizer, samples: list[Pieces]) -> tuple[PieceEncoder, str]:
    """Return an encoder for pieces apart where their tokens spell the conversation, else one for conversations whole.

    Args:
        encoder: For texts, as `choose_encoder` gives it.
        tokenizer: As `load_tokenizer` gives it.
        samples: Pieces of some conversations.

    Returns:
        The encoder, and a word on why it is another than `encoder`; empty if it is not.
    """
    import numpy as np

    apart = ApartEncoder(encoder)
    if not samples:
        return apart, ""
    ids, counts = apart.encode(samples)
    whole, starts = encoder.encode(["".join(text for text, _ in pieces) for pieces in samples])
    # The usual case: the same ids either way, and nothing need be decoded.
    if np.array_equal(ids, whole):
        return apart, ""
    decoder = load_backend(tokenizer)
    tokens = np.add.reduceat(counts, np.cumsum([0, *map(len, samples[:-1])]))
    for i, stretch in enumerate(np.split(ids, np.cumsum(tokens)[:-1])):
        there = whole[int(starts[i]) : int(starts[i + 1])]
        texts = [decoder.decode(part.tolist(), skip_special_tokens=False) for part in (stretch, there)]
        # Other ids that spell the same text are merges across a border, which a server never makes; other text is an
        # error.
        if texts[0] != texts[1]:
            return TogetherEncoder(tokenizer), "it encodes words otherwise at the beginning of a text"
    return apart, ""


def load_backend(tokenizer: Tokenizer) -> Any:
    """Return Hugging Face's own object of a tokenizer.

    Raises:
        CptError: It exists only in Python.
    """
    import tokenizers

    definition = definition_of(tokenizer)
    load = tokenizers.Tokenizer.from_file if isinstance(definition, Path) else tokenizers.Tokenizer.from_str
    return load(str(definition))


def definition_of(tokenizer: Tokenizer) -> Path | str:
    """Return where a tokenizer.json is, or its content.

    Raises:
        CptError: The tokenizer exists only in Python.
    """
    if tokenizer.definition is None:
        raise CptError(f"{tokenizer.name} has no tokenizer.json; conversations need a tokenizer that has one.")
    return tokenizer.definition


@dataclass(frozen=True)
class EncodedPieces:
    """Tokens of some conversations.

    Attributes:
        tokens: uint32 of shape [tokens].
        mask: 1 where a token is trained on, uint8 of shape [tokens].
        lengths: Tokens of each conversation, int32 of shape [conversations].
        counts: Tokens of each piece, int64 of shape [pieces].
    """

    tokens: Any
    mask: Any
    lengths: Any
    counts: Any


def encode_pieces(conversations: list[Pieces], encoder: PieceEncoder) -> EncodedPieces:
    """Encode conversations that are cut into pieces."""
    import numpy as np

    ids, counts = encoder.encode(conversations)
    trained = np.array([flag for pieces in conversations for _, flag in pieces], np.uint8)
    first = np.cumsum([0, *map(len, conversations[:-1])])
    # A piece is trained on whole or not at all; so is each of its tokens.
    return EncodedPieces(ids, np.repeat(trained, counts), np.add.reduceat(counts, first).astype("<i4"), counts)
