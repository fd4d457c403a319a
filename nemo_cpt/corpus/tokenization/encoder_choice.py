"""Which encoder runs: fastokens where it gives the same ids as the reference, Hugging Face's own otherwise."""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nemo_cpt.corpus.preparing.workers import how_it_ended
from nemo_cpt.corpus.tokenization.characters import PER_KIND, Passage
from nemo_cpt.corpus.tokenization.tokenizer import (
    Encoder,
    FastEncoder,
    ReferenceEncoder,
    Tokenizer,
    TransformersEncoder,
)
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


PROBED_TOKENS = 1000  # added tokens that are tried, of tokenizers with very many


def probes_of(tokenizer: Tokenizer) -> list[str]:
    """Return the probes, and texts in which the tokenizer's added tokens stand between words and blanks."""
    # Spread over all of them: those of one kind stand side by side.
    tokens = tokenizer.added[:: len(tokenizer.added) // PROBED_TOKENS + 1]
    return [*PROBES, *tokens, *(f"x{token}y {token} z  {token}\n{token}{token}{token.upper()}" for token in tokens)]


class Reference:
    """An encoder in another process: its tables never count among the memory of this one and of its workers.

    Args:
        load: Makes the encoder, in that process.
    """

    def __init__(self, load: Callable[[], Encoder]) -> None:
        # Fork: `load` is a closure, which spawn could not send.
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(theirs, load), daemon=True)
        self._process.start()
        theirs.close()

    def _serve(self, connection: Connection, load: Callable[[], Encoder]) -> None:
        """Be the other process: encode the texts that come, or end with this one."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork has none of the threads that its parent's pool had
        self._connection.close()
        with suppress(EOFError, OSError):
            try:
                encoder = load()
                while True:
                    connection.send((encoder.name, *encoder.encode(connection.recv())))
            except CptError as error:
                connection.send(error)
            except (EOFError, OSError):
                raise
            except BaseException as error:  # tokenizers raises bare ones, and a Rust panic is no Exception
                connection.send(CptError(f"The reference tokenizer cannot encode a text: {error}."))

    def ask(self, texts: list[str]) -> None:
        """Begin to encode texts; `answer` gives their ids."""
        with suppress(OSError):  # it has ended; what it left says why
            self._connection.send(texts)

    def answer(self) -> tuple[str, tuple[Any, Any]]:
        """Return the encoder's name and what its `encode` gives.

        Raises:
            CptError: It could not be loaded, could not encode a text, or the process died.
        """
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            ended = how_it_ended(self._process)
            raise CptError(
                f"The process of the reference tokenizer died with {ended}. Run the same command again (where there is "
                "more memory, if that is short)."
            ) from None
        if isinstance(answer, CptError):
            raise answer
        name, ids, starts = answer
        return name, (ids, starts)

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        # No state to lose: what it was asked has been answered, or is not wanted any more.
        self._process.kill()  # its tables' orderly end would take a moment
        self._process.join()


class Candidates:
    """fastokens and the reference, which load at the same time from the moment that this is made.

    fastokens in a thread: it lets go of the interpreter while it builds its tables, a second and more for 128,000 ids.

    Args:
        definition: A `tokenizer.json`, its path or its content.
        split_special_tokens: Encode the special tokens' names in a text as ordinary text.
        load: Makes the reference; by default Hugging Face's tokenizer of the same definition.
    """

    def __init__(
        self, definition: str | Path, split_special_tokens: bool, load: Callable[[], Encoder] | None = None
    ) -> None:
        self.definition, self._split = definition, split_special_tokens
        self._fast: FastEncoder | None = None
        self._problem = ""
        # Before the thread: a fork with a second thread at work may inherit locks that nobody will release.
        self.reference = Reference(load or (lambda: ReferenceEncoder(definition, split_special_tokens)))
        self._thread = threading.Thread(target=self._load)
        self._thread.start()

    def _load(self) -> None:
        try:
            self._fast = FastEncoder(self.definition, self._split)
        except BaseException as error:  # not installed, a kind it does not know, or a Rust panic, which is no Exception
            self._problem = f"fastokens cannot run this tokenizer ({error})"

    def judge(self, texts: list[str]) -> tuple[FastEncoder | None, str]:
        """Let both encode `texts`.

        Returns:
            fastokens, None if the ids differ or it cannot run; and a sentence about it.

        Raises:
            CptError: The reference cannot be loaded.
        """
        import numpy  # noqa: F401  while there is nothing else to do

        # Both at once: the check costs the slower of the two, not their sum.
        self.reference.ask(texts)  # answered in its process, while fastokens encodes here
        self._thread.join()
        # A panic of Rust or an unknown kind of tokenizer is no error of the user's: the reference takes over.
        ours = self._try(texts)
        name, theirs = self.reference.answer()
        if ours is not None and (wrong := first_difference(ours, theirs)) is not None:
            self._problem = f"fastokens gives other ids for {texts[wrong][:80]!r}"
        if self._problem or self._fast is None:
            return None, self._problem
        return self._fast, f"same ids as {name} on {len(texts)} texts"

    def _try(self, texts: list[str]) -> tuple[Any, Any] | None:
        try:
            return self._fast.encode(texts) if self._fast else None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._problem = f"fastokens cannot run this tokenizer ({error})"
            return None

    def close(self) -> None:
        """Let go of the thread and the process."""
        self.reference.close()
        self._thread.join()


class UnlikeReferenceError(CptError):
    """The chosen encoder gave other ids than the reference for a passage of the corpus."""


class Comparison:
    """Passages of the corpus, encoded by the reference as well while the chosen encoder works.

    Args:
        name: The chosen encoder's name.
        reference: The reference, as the choice left it.
    """

    def __init__(self, name: str, reference: Reference) -> None:
        self._name, self._reference = name, reference
        self._waiting: list[Passage] = []
        self._kinds: Counter[str] = Counter()

    def add(self, passages: list[Passage]) -> None:
        """Note passages to compare, of each kind as many as are wanted, whatever the number of workers."""
        for passage in passages:
            if not passage.kind or self._kinds[passage.kind] < PER_KIND:
                self._kinds[passage.kind] += 1
                self._waiting.append(passage)

    def run(self) -> int:
        """Compare what has been noted; return how many passages that were.

        Raises:
            UnlikeReferenceError: The ids of one differ.
            CptError: The reference cannot encode one.
        """
        import numpy as np

        # Taken before they are compared: each passage is compared once, whatever becomes of the checkpoint.
        passages, self._waiting = self._waiting, []
        if not passages:
            return 0
        self._reference.ask([passage.text for passage in passages])
        name, theirs = self._reference.answer()
        ids = [np.frombuffer(passage.ids, np.uint32) for passage in passages]
        starts = np.cumsum([0, *map(len, ids)])
        if (wrong := first_difference((np.concatenate(ids), starts), theirs)) is not None:
            raise UnlikeReferenceError(
                f"{self._name} gives other ids than {name} for {passages[wrong].text[:80]!r}; nothing of it is kept. "
                "Run again with the reference tokenizer: fast=False (--no-fast)."
            )
        return len(passages)


@dataclass
class Choice:
    """An encoder that was chosen.

    Attributes:
        encoder: The encoder.
        why: One sentence that says which and why.
        reference: What judged it, still at work, None where the encoder is the reference itself.
    """

    encoder: Encoder
    why: str
    reference: Reference | None = None

    def comparison(self) -> Comparison | None:
        """Return what compares passages of the corpus with the reference, None if there is nothing to compare with."""
        return Comparison(self.encoder.name, self.reference) if self.reference else None

    def close(self) -> None:
        """Let go of the reference."""
        if self.reference:
            self.reference.close()
            self.reference = None


def choose_encoder(
    tokenizer: Tokenizer,
    samples: Iterable[str],
    split_special_tokens: bool = False,
    fast: bool = True,
    candidates: Candidates | None = None,
) -> Choice:
    """Choose fastokens where it loads and agrees with the reference on the probes and the samples, else the reference.

    Args:
        tokenizer: As `load_tokenizer` gives it.
        samples: Texts of the corpus itself, the first documents.
        split_special_tokens: Encode the special tokens' names in a text as ordinary text.
        fast: False takes the reference at once.
        candidates: The two, where they were started early; taken if they load what `tokenizer` is defined by.

    Raises:
        CptError: The reference cannot be loaded, or cannot encode the texts.
    """
    split = split_special_tokens or tokenizer.split_special_tokens
    texts = [*probes_of(tokenizer), *samples]
    if not fast:
        return _reference(tokenizer, texts, split, "as asked")
    if tokenizer.definition is None:
        return _reference(tokenizer, texts, split, "there is no tokenizer.json for it")
    # transformers may have made another definition of the folder than the file that was loaded early.
    early = candidates is not None and candidates.definition == tokenizer.definition
    judges = candidates if candidates is not None and early else _candidates(tokenizer, split)
    try:
        encoder, verdict = judges.judge(texts)
    except BaseException:
        judges.close()
        raise
    if encoder is not None:
        return Choice(encoder, f"{encoder.name}: {verdict}", judges.reference)
    judges.close()
    return _reference(tokenizer, texts, split, verdict)


def _candidates(tokenizer: Tokenizer, split: bool) -> Candidates:
    assert tokenizer.definition is not None
    if tokenizer.loaded is None:
        return Candidates(tokenizer.definition, split)
    return Candidates(tokenizer.definition, split, lambda: TransformersEncoder(tokenizer.loaded, split))


def _reference(tokenizer: Tokenizer, texts: list[str], split: bool, why: str) -> Choice:
    """Choose Hugging Face's tokenizer, that in Rust if it is all that transformers' own consists of."""
    encoder = tokenizer.reference_encoder(split)
    # transformers puts Python around some backends: its slower way is taken only where the backend alone gives other
    # ids.
    if tokenizer.loaded is not None and isinstance(encoder, ReferenceEncoder):
        strict = TransformersEncoder(tokenizer.loaded, split)
        try:
            wrong = first_difference(encoder.encode(texts), strict.encode(texts))
        except Exception as error:  # the bare one of tokenizers
            raise CptError(f"{strict.name} cannot encode a text: {error}.") from error
        if wrong is not None:
            return Choice(strict, f"{strict.name}: {encoder.name} gives other ids for {texts[wrong][:80]!r}")
    return Choice(encoder, f"{encoder.name}: {why}")


def first_difference(one: tuple[Any, Any], other: tuple[Any, Any]) -> int | None:
    """Return the number of the first text whose ids differ between two results of `encode`, None if there is none."""
    import numpy as np

    (ids, starts), (other_ids, other_starts) = one, other
    # The whole at once, which is the usual case; only a difference is looked for text by text.
    if np.array_equal(ids, other_ids) and np.array_equal(starts, other_starts):
        return None
    for i in range(len(starts) - 1):
        a, b = (slice(int(s[i]), int(s[i + 1])) for s in (starts, other_starts))
        if not np.array_equal(ids[a], other_ids[b]):
            return i
    return None
