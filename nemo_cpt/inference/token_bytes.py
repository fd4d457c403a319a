"""The bytes that single tokens stand for: a character may fall apart into several, none of which decodes by itself."""

from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

BLANK = "\u2581"  # as sentencepiece spells it; no character of byte-level pieces


class TokenBytes:
    """Looks up the bytes of a tokenizer's tokens, byte-level (GPT-2, Llama-3) or sentencepiece (Llama-2, Gemma)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = {number: each.content for number, each in tokenizer.added_tokens_decoder.items()}
        # Not by the pieces' letters: a large sentencepiece vocabulary has those that spell bytes elsewhere (Ġ) too. Nor
        # by added tokens, which are spelled as text: DeepSeek's byte-level <｜begin▁of▁sentence｜>.
        self.byte_level = not any(BLANK in piece for piece in tokenizer.get_vocab().keys() - self.added.values())
        self.byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def __call__(self, token: int) -> bytes:
        """The bytes in UTF-8, of special tokens too; none for a row of the model that the tokenizer does not have."""
        if token in self.added:
            return self.added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self.byte_level:
            return b"".join(bytes([self.byte_of[each]]) if each in self.byte_of else each.encode() for each in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # sentencepiece's fallback, <0xE3>
            return bytes.fromhex(piece[3:5])
        return piece.replace(BLANK, " ").encode()
