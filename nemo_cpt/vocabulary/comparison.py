"""Tokenizers side by side on the same texts: what a token holds, what of the vocabulary is used, what is lost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_cpt.arguments import checked
from nemo_cpt.corpus.reading.sources import Inputs
from nemo_cpt.corpus.tokenization.tokenizer import Tokenizer, load_tokenizer
from nemo_cpt.errors import CptError
from nemo_cpt.page import drawing, legend_name
from nemo_cpt.vocabulary.samples import draw

SAMPLE_BYTES = 16 * 2**20
_LONGEST = 5
_BATCH = 256


@dataclass(frozen=True)
class Measured:
    """One tokenizer on one corpus.

    Attributes:
        tokenizer: as it was named.
        corpus: its label.
        documents: that were encoded.
        characters: of them.
        nbytes: of them in UTF-8.
        tokens: that they became.
        used: different tokens among these.
        used_share: of the vocabulary.
        round_trip_failures: documents that do not come back from their tokens as they were.
        seconds: of encoding with Hugging Face's library.
    """

    tokenizer: str
    corpus: str
    documents: int
    characters: int
    nbytes: int
    tokens: int
    used: int
    used_share: float
    round_trip_failures: int
    seconds: float

    @property
    def characters_per_token(self) -> float:
        """More is cheaper: training and serving cost by the token."""
        return self.characters / self.tokens

    @property
    def bytes_per_token(self) -> float:
        """The same by bytes of UTF-8."""
        return self.nbytes / self.tokens


@dataclass(frozen=True)
class Comparison:
    """Tokenizers on corpora.

    Attributes:
        measured: a line for each tokenizer on each corpus.
        vocabulary_sizes: by tokenizer.
        longest: the longest tokens that the corpora use, by tokenizer.
        odd: how many tokens that the corpora use are no whole characters, by tokenizer.
        shared: ids that stand for the same token in all.
    """

    measured: tuple[Measured, ...]
    vocabulary_sizes: dict[str, int]
    longest: dict[str, tuple[str, ...]]
    odd: dict[str, int]
    shared: int

    def as_dict(self) -> dict[str, Any]:
        """The comparison as a JSON-serialisable dict."""
        rates = [(each.characters_per_token, each.bytes_per_token) for each in self.measured]
        lines = [
            asdict(each) | {"characters_per_token": round(characters, 4), "bytes_per_token": round(nbytes, 4)}
            for each, (characters, nbytes) in zip(self.measured, rates, strict=True)
        ]
        return asdict(self) | {"measured": lines}

    def plot(self, path: str | Path) -> None:
        """Draw characters a token, a bar for each tokenizer on each corpus, as PNG, SVG or PDF by the path's ending.

        Raises:
            CptError: matplotlib is missing, or the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise CptError("plots need matplotlib: pip install matplotlib") from None
        with drawing():
            corpora = list(dict.fromkeys(each.corpus for each in self.measured))
            width = 0.8 / len(self.vocabulary_sizes)
            figure = Figure((6, 4), layout="constrained")
            axes = figure.subplots()
            for number, name in enumerate(self.vocabulary_sizes):
                rates = [each.characters_per_token for each in self.measured if each.tokenizer == name]
                places = [place + number * width for place in range(len(corpora))]
                axes.bar(places, rates, width, label=legend_name(name))
            axes.set_xticks([place + 0.4 - width / 2 for place in range(len(corpora))], corpora)
            axes.set_ylabel("characters a token")
            axes.legend()
            try:
                figure.savefig(path)
            except (OSError, ValueError) as error:
                raise CptError(f"the plot {path} cannot be written: {error}") from error


@checked
def compare(
    tokenizers: Sequence[str],
    corpora: Mapping[str, Inputs],
    *,
    json_key: str = "text",
    sample_bytes: float = SAMPLE_BYTES,
) -> Comparison:
    """Encode the same documents with each tokenizer, and decode them again.

    Args:
        tokenizers: folders, or names on the hub.
        corpora: inputs as `prepare` takes them, by the label under which they are reported.
        json_key: the field that holds the text.
        sample_bytes: of each corpus at most; documents are drawn by the hash of their text.

    Raises:
        CptError: a tokenizer or a corpus is missing or unreadable, or one is named twice.
    """
    # Results are kept by name: one of the two would be lost.
    if len(set(tokenizers)) < len(tokenizers):
        raise CptError(f"a tokenizer is named twice among {', '.join(tokenizers)}")
    if not corpora:
        raise CptError("name a corpus to compare on, such as --corpus ja=ja.jsonl")
    # Drawn once: all tokenizers are given the very same documents.
    samples = {label: draw(inputs, json_key, sample_bytes, hold_out=False).texts for label, inputs in corpora.items()}
    loaded = {name: load_tokenizer(name) for name in tokenizers}
    measured, longest, odd = list[Measured](), dict[str, tuple[str, ...]](), dict[str, int]()
    for name, tokenizer in loaded.items():
        used = set[int]()
        for label, texts in samples.items():
            line, ids = _measure(name, tokenizer, label, texts)
            measured.append(line)
            used |= ids
        texts_of_tokens = _texts(tokenizer, sorted(used))
        longest[name] = tuple(sorted(texts_of_tokens, key=lambda text: (-len(text.strip()), text))[:_LONGEST])
        # What decoding puts where bytes are no whole character.
        odd[name] = sum("\ufffd" in text for text in texts_of_tokens)
    sizes = {name: tokenizer.vocabulary_size for name, tokenizer in loaded.items()}
    return Comparison(tuple(measured), sizes, longest, odd, _shared(list(loaded.values())))


def _measure(name: str, tokenizer: Tokenizer, label: str, texts: Sequence[str]) -> tuple[Measured, set[int]]:
    # As text: a token's name that stands in a document would be one control token, and not what the words cost.
    encoder = tokenizer.reference_encoder(split_special_tokens=True)
    tokens, used, failures, seconds = 0, set[int](), 0, 0.0
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        # The encoding alone: decoding is for the round trips.
        began = time.perf_counter()
        ids, bounds = encoder.encode(batch)
        seconds += time.perf_counter() - began
        tokens += len(ids)
        used.update(ids.tolist())
        for number, text in enumerate(batch):
            failures += encoder.decode(ids[int(bounds[number]) : int(bounds[number + 1])].tolist()) != text
    line = Measured(
        tokenizer=name,
        corpus=label,
        documents=len(texts),
        characters=sum(map(len, texts)),
        nbytes=sum(len(text.encode()) for text in texts),
        tokens=tokens,
        used=len(used),
        used_share=round(len(used) / tokenizer.vocabulary_size, 4),
        round_trip_failures=failures,
        seconds=round(seconds, 3),
    )
    return line, used


def _texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    encoder = tokenizer.reference_encoder()
    return [encoder.decode([number]) for number in ids]


def _shared(tokenizers: Sequence[Tokenizer]) -> int:
    """Ids that all tokenizers have the same token for."""
    vocabularies = [_tokens(each) for each in tokenizers]
    first = vocabularies[0]
    return sum(all(other.get(number) == token for other in vocabularies[1:]) for number, token in first.items())


def _tokens(tokenizer: Tokenizer) -> dict[int, str]:
    from tokenizers import Tokenizer as Backend

    if tokenizer.definition is None:
        vocabulary = tokenizer.loaded.get_vocab()
    else:
        load = Backend.from_file if isinstance(tokenizer.definition, Path) else Backend.from_str
        vocabulary = load(str(tokenizer.definition)).get_vocab()
    return {number: token for token, number in vocabulary.items()}
