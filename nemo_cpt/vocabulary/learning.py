"""Hugging Face's library learns tokens in a process of its own: while it does it hears no Ctrl-C, and can be killed."""

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, BinaryIO

import orjson

from nemo_cpt.corpus.processes import follow
from nemo_cpt.errors import CptError
from nemo_cpt.python_files import environment_of_children

MAX_BYTES = 24  # of a token: 8 characters of Japanese, 24 letters
# Japanese and Chinese write no blanks: a run of one script is a word there, or a whole clause would become a token.
# Ranges, since fastokens takes \p{Han} and its like for something else than Hugging Face's library.
UNSPACED = r"[㐀-䶿一-鿿々〆]+|[ぁ-ゟ]+|[゠-ヿ]+"
WORDS = (  # Llama-3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SIZE = struct.Struct("<I")


def learn(texts: Sequence[str], special: Sequence[str], size: int, kind: str) -> str:
    """Learn a vocabulary, and return its tokenizer.json.

    Args:
        texts: what is learnt from.
        special: the special tokens, which have the first ids.
        size: ids in all; fewer where the texts give no more.
        kind: "bpe" or "unigram".

    Raises:
        CptError: the process died.
    """
    command = [sys.executable, "-P", "-m", "nemo_cpt.vocabulary.learning", str(os.getpid())]
    # In a session of its own: a terminal's Ctrl-C is for this process, which ends that one.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=environment_of_children()
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        asked = orjson.dumps({"special": list(special), "size": size, "kind": kind})
        with suppress(BrokenPipeError):  # it died: its code says how
            for part in chain([asked], (text.encode() for text in texts)):
                process.stdin.write(_SIZE.pack(len(part)) + part)
            process.stdin.close()
        definition = process.stdout.read()
        code = process.wait()
    finally:
        process.kill()  # first: to close the pipe would wait for it to read
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()
    if code:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise CptError(
            f"the process that learnt the tokens died with {how}: where memory was short, give less text "
            "(sample_bytes, --sample-mb) or a smaller vocabulary_size (--vocabulary-size)"
        )
    return definition.decode()


def _serve() -> None:
    """Be that process: what is asked for and the texts come on stdin, each behind its size; the answer is stdout's."""
    follow(int(sys.argv[1]))
    parts = _parts(sys.stdin.buffer)
    if (request := next(parts, None)) is None:  # interrupted before it could ask, or end this process
        return
    asked = orjson.loads(request)
    tokenizer = _untrained(asked["kind"])
    trainer = _trainer(asked["special"], asked["size"], asked["kind"])
    # Given one by one: the library counts their words, and keeps no text.
    tokenizer.train_from_iterator((part.decode() for part in parts), trainer)
    sys.stdout.buffer.write(tokenizer.to_str().encode())


def _parts(pipe: BinaryIO) -> Iterator[bytes]:
    while head := pipe.read(_SIZE.size):
        (size,) = _SIZE.unpack(head)
        yield pipe.read(size)


def _untrained(kind: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # In this order: the last one turns bytes into characters of its own, which no pattern behind it would know.
            pre_tokenizers.Split(Regex(UNSPACED), "isolated"),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _trainer(special: Sequence[str], size: int, kind: str) -> Any:
    from tokenizers import pre_tokenizers, trainers

    common = {
        "vocab_size": size,
        "special_tokens": list(special),
        # Every byte, seen or not, so that no text is unknown; sorted, since they come in no order of their own.
        "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet()),
        "show_progress": False,
    }
    if kind == "unigram":
        return trainers.UnigramTrainer(max_piece_length=MAX_BYTES, **common)
    return trainers.BpeTrainer(max_token_length=MAX_BYTES, min_frequency=2, **common)


if __name__ == "__main__":
    _serve()
