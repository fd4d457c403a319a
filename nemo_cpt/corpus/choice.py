"""Which encoder runs: fastokens where it gives the same ids as the reference, Hugging Face's own otherwise."""

import multiprocessing
import threading
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nemo_cpt.corpus.tokenizer import Encoder, FastEncoder, ReferenceEncoder, Tokenizer
from nemo_cpt.errors import CptError

# What libraries get wrong: mixed scripts, joiners, combining marks, odd spaces, line ends, digits, long runs.
PROBES = (
    "",
    " ",
    "Hello, world!  I'm  here.\r\n\r\n\tTabs\tand   spaces   \n",
    "東京都は、1943年（昭和18年）7月1日に設置された。人口は14,047,594人。",
    "ｶﾀｶﾅとカタカナ、ＡＢＣとABC、㍻㌔①Ⅳ\u3000全角空白\u00a0nbsp\u200bzwsp",
    "が が ﾊﾞ é é Å Å ﷺ",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇯🇵 emoji",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": None}  # comment\n\n\n",
    "1234567890 12 123 1234 0x1F 3.14159 １２３",
    "Привет мир! 안녕하세요 你好，世界。 مرحبا שלום नमस्ते ไทย",
    "a" * 300 + " " * 300 + "\n" * 50 + "漢字" * 150 + "。" * 100,
    "\x00\x01\x7f\ufeff\ufffd\U0010ffff",
    "word'S WORD'LL don't DON'T it’s",
    "<s>[INST] <|begin_of_text|><|endoftext|> </s><pad>",
)


class Rivals:
    """fastokens and the reference, which load at the same time from the moment that this is made.

    fastokens in a thread: it lets go of the interpreter while it builds its tables, a second and more for 128,000 ids.
    The reference in another process: its tables never count among the memory of this one and of its workers.

    Args:
        definition: A `tokenizer.json`, its path or its content.
        split_special_tokens: Encode the special tokens' names in a text as ordinary text.
    """

    def __init__(self, definition: str | Path, split_special_tokens: bool) -> None:
        self.definition, self._split = definition, split_special_tokens
        self._fast: FastEncoder | None = None
        self._problem = ""
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=self._refer, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._thread = threading.Thread(target=self._load)
        self._thread.start()

    def _load(self) -> None:
        try:
            self._fast = FastEncoder(self.definition, self._split)
        except BaseException as error:  # not installed, a kind it does not know, or a Rust panic, which is no Exception
            self._problem = f"fastokens cannot run this tokenizer ({error})"

    def _refer(self, connection: Connection) -> None:
        """Be the other process: encode the texts that come, or end with this one."""
        self._connection.close()
        try:
            encoder = ReferenceEncoder(self.definition, self._split)
            connection.send((encoder.name, encoder.encode(connection.recv())))
        except CptError as error:
            connection.send(error)
        except (EOFError, OSError):
            pass

    def judge(self, texts: list[str]) -> tuple[FastEncoder | None, str]:
        """Let both encode `texts`.

        Returns:
            fastokens, None if the ids differ or it cannot run; and a sentence.

        Raises:
            CptError: The reference cannot be loaded.
        """
        import numpy  # noqa: F401  while there is nothing else to do

        self._ask(texts)
        self._thread.join()
        ours = self._try(texts)
        name, theirs = self._answer()
        if ours is not None and (wrong := first_difference(ours, theirs)) is not None:
            self._problem = f"fastokens gives other ids for {texts[wrong][:80]!r}"
        if self._problem or self._fast is None:
            return None, f"{name}: {self._problem}"
        return self._fast, f"{self._fast.name}: same ids as {name} on {len(texts)} texts"

    def _try(self, texts: list[str]) -> tuple[Any, Any] | None:
        try:
            return self._fast.encode(texts) if self._fast else None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._problem = f"fastokens cannot run this tokenizer ({error})"
            return None

    def _ask(self, texts: list[str]) -> None:
        with suppress(OSError):  # it has ended; what it left says why
            self._connection.send(texts)

    def _answer(self) -> tuple[str, tuple[Any, Any]]:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise CptError("The reference tokenizer died while it was loaded; is there enough memory?") from None
        if isinstance(answer, CptError):
            raise answer
        return answer

    def close(self) -> None:
        """Let go of the thread and the process."""
        self._connection.close()
        self._process.kill()  # its tables' orderly end would take a moment
        self._process.join()
        self._thread.join()


def choose_encoder(
    tokenizer: Tokenizer,
    samples: Iterable[str],
    split_special_tokens: bool = False,
    fast: bool = True,
    rivals: Rivals | None = None,
) -> tuple[Encoder, str]:
    """Return fastokens where it loads and agrees with the reference on the probes and the samples, else the reference.

    Args:
        tokenizer: As `load_tokenizer` gives it.
        samples: Texts of the corpus itself, the first documents.
        split_special_tokens: Encode the special tokens' names in a text as ordinary text.
        fast: False takes the reference at once.
        rivals: The two, where they were started early; taken if they load what `tokenizer` is defined by.

    Returns:
        The encoder and one sentence that says which and why.

    Raises:
        CptError: The reference cannot be loaded.
    """
    if not fast or tokenizer.definition is None:
        reference = tokenizer.reference_encoder(split_special_tokens)
        return reference, f"{reference.name}, as asked" if not fast else f"{reference.name}: it has no tokenizer.json"
    early = rivals is not None and rivals.definition == tokenizer.definition
    judges = rivals if rivals is not None and early else Rivals(tokenizer.definition, split_special_tokens)
    try:
        encoder, verdict = judges.judge([*PROBES, *tokenizer.special, *samples])
    finally:
        judges.close()
    return encoder or tokenizer.reference_encoder(split_special_tokens), verdict


def first_difference(one: tuple[Any, Any], other: tuple[Any, Any]) -> int | None:
    """Return the number of the first text whose ids differ between two results of `encode`, None if there is none."""
    import numpy as np

    (ids, starts), (other_ids, other_starts) = one, other
    if np.array_equal(ids, other_ids) and np.array_equal(starts, other_starts):
        return None
    for i in range(len(starts) - 1):
        a, b = (slice(int(s[i]), int(s[i + 1])) for s in (starts, other_starts))
        if not np.array_equal(ids[a], other_ids[b]):
            return i
    return None
