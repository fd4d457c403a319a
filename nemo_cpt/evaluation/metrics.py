"""What is measured of replies: against answers that are right, and by themselves."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.bootstrap import Measure, mean, percentile, ratio
from nemo_cpt.inference.engine import Reply
from nemo_cpt.installed import extra

NORMALIZATION = "NFKC, lower case, without blanks, punctuation and symbols, but for those of numbers: -1.5, 3/4"
BLEU_TOKENIZERS = {"ja": "ja-mecab", "zh-tw": "zh", "zh-cn": "zh", "ko": "char", "th": "char"}
_WORD = re.compile(
    r"[\u3041-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff]|[^\W_\u3041-\u30ff\u3400-\u9fff\uac00-\ud7a3]+"
)
_AS_TYPED = str.maketrans({"\N{MINUS SIGN}": "-", "\N{FRACTION SLASH}": "/"})
# A sign before a number, which is no hyphen, and what stands between digits; not the comma, which thousands may lack.
_OF_NUMBERS = re.compile(r"(?<![^\W_])-(?=\d)|(?<=\d)[./](?=\d)")


def normalized(text: str) -> str:
    """The text as exact match and character F1 compare it: see `NORMALIZATION`.

    A text of nothing but punctuation and symbols keeps them: "+" is not "-".
    """
    folded = unicodedata.normalize("NFKC", text).lower().translate(_AS_TYPED)
    kept = {found.start() for found in _OF_NUMBERS.finditer(folded)}
    chars = (char for at, char in enumerate(folded) if at in kept or unicodedata.category(char)[0] not in "PSZC")
    return "".join(chars) or "".join(folded.split())


def exact_match(reply: str, answers: Sequence[str]) -> float:
    """1 where the reply is one of the answers after `normalized`, else 0."""
    return float(normalized(reply) in map(normalized, answers))


def character_f1(reply: str, answers: Sequence[str]) -> float:
    """The best F1 of the reply's characters and an answer's, after `normalized`: JSQuAD's (JGLUE, 2022)."""
    # The best of the answers: any of them is right.
    return max(_f1(*map(Counter, (normalized(reply), normalized(answer)))) for answer in answers)


def _f1(reply: Counter[str], answer: Counter[str]) -> float:
    if not reply or not answer:
        return float(reply == answer)
    return 2 * (reply & answer).total() / (reply.total() + answer.total())


def rouge_l(reply: str, answers: Sequence[str]) -> float:
    """The best ROUGE-L (Lin, 2004): F1 of the longest common subsequence of words.

    A Chinese, Japanese or Korean character is a word of its own, and words are compared in lower case after NFKC.
    """
    return max(_rouge_l(_words(reply), _words(answer)) for answer in answers)


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _rouge_l(reply: list[str], answer: list[str]) -> float:
    if not reply or not answer:
        return 0.0
    return 2 * _common_subsequence(reply, answer) / (len(reply) + len(answer))


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table as the bits of a number (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for at, word in enumerate(one):
        # For each word the positions at which it stands, as bits: a row of the table is then a few operations on
        # integers.
        places[word] = places.get(word, 0) | 1 << at
    ones = (1 << len(one)) - 1
    row = ones
    for word in other:
        hit = row & places.get(word, 0)
        row = (row + hit) | (row - hit)
    return (~row & ones).bit_count()


def answer_measures(
    replies: Sequence[str], answers: Sequence[Sequence[str]], language: str | None
) -> Iterator[Measure]:
    """The measures of replies against the answers that are right, one or more for each.

    Args:
        replies: the texts.
        answers: of each reply, at least one.
        language: of the replies, for BLEU's words.

    Raises:
        CptError: sacrebleu is not installed.
    """
    pairs = list(zip(replies, answers, strict=True))
    for name, score, note in (
        ("exact match", exact_match, NORMALIZATION),
        ("character F1", character_f1, NORMALIZATION),
        ("ROUGE-L", rouge_l, "F1 of words; a CJK character is a word"),
    ):
        yield mean(name, [100 * score(*pair) for pair in pairs], better="higher", unit="%", note=note)
    yield from _sacrebleu_measures(replies, answers, language)


def _sacrebleu_measures(
    replies: Sequence[str], answers: Sequence[Sequence[str]], language: str | None
) -> Iterator[Measure]:
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise CptError(f"BLEU and chrF need sacrebleu: {extra('eval')}") from error
    most = max(map(len, answers))
    # sacrebleu wants as many references of each reply; None stands for one that is not there.
    references: Any = [[each[at] if at < len(each) else None for each in answers] for at in range(most)]
    for metric in (BLEU(tokenize=BLEU_TOKENIZERS.get(language or "", "13a")), CHRF()):
        # The counts of each reply, which sacrebleu's corpus_score sums: a resample is a sum of its own.
        counts = np.asarray(metric._extract_corpus_statistics(list(replies), references))
        score = _from_counts(metric, counts)
        signature = str(metric.get_signature())
        yield Measure(_sacrebleu_name(metric), len(replies), score, better="higher", note=signature)


def _from_counts(metric: Any, counts: Any) -> Callable[[Any], float]:
    return lambda chosen: float(metric._compute_score_from_stats(counts[chosen].sum(axis=0).tolist()).score)


def _sacrebleu_name(metric: Any) -> str:
    return {"BLEU": "BLEU", "CHRF": "chrF"}[type(metric).__name__]


def reply_measures(replies: Sequence[Reply]) -> Iterator[Measure]:
    """What replies are by themselves: how long, how many cut off, how fast.

    Replies share the time of the batch that they are in, so that times have no interval. Where an endpoint does not
    count its tokens, what is reckoned with them is not defined.
    """
    lengths = [len(reply.text) for reply in replies]
    yield mean("length", lengths, unit="characters")
    cut = [100 * (reply.finish_reason == "length") for reply in replies]
    yield mean("cut off at the most tokens", cut, better="lower", unit="%")
    # Endpoints that do not count tokens say 0 of a reply that has some: not known, and no length.
    tokens = [reply.completion_tokens if reply.completion_tokens or not reply.text else math.nan for reply in replies]
    yield mean("tokens of a reply", tokens)
    seconds = [reply.seconds for reply in replies]
    first = [reply.first_token_seconds for reply in replies]
    yield ratio("tokens a second of a reply", tokens, seconds, better="higher", resampled=False)
    for name, values in (("time to first token", first), ("latency", seconds)):
        for percent in (50, 95):
            yield percentile(f"{name}, p{percent}", values, percent, better="lower", unit="s", resampled=False)
