"""Learning merges on top of those that a byte-level BPE tokenizer has."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from nemo_cpt.vocabulary.byte_level import ByteLevelBPE, Pair, bytes_of
from nemo_cpt.vocabulary.words import text_of

MAX_CHARACTERS = 8
MIN_COUNT = 5
_BATCH = 50_000
_Ids = tuple[int, int]


@dataclass(frozen=True)
class Merge:
    """A new token and how it is made.

    Attributes:
        pair: the two tokens that become one.
        count: how often they stood side by side when it was learnt.
    """

    pair: Pair
    count: int

    @property
    def token(self) -> str:
        """The new token, in bytes' characters."""
        return "".join(self.pair)


class Learner:
    """Learns merges from counted words, most frequent pair first; a pair's two tokens with the lower ids go first.

    Every new merge makes a token that no other merge makes, of tokens that are there: encoding a word with the old and
    the new merges then gives what was counted here, and a text without any of the merged pairs stays as it was.

    Args:
        base: the tokenizer whose merges go before.
        words: counts by word, in bytes' characters.
        fixed: words that must stay as they are, some at once; no more of them are in memory.
        max_characters: of a new token.
        min_count: of a pair.
    """

    def __init__(
        self,
        base: ByteLevelBPE,
        words: Counter[str],
        fixed: Iterable[Collection[str]] = (),
        max_characters: int = MAX_CHARACTERS,
        min_count: int = MIN_COUNT,
    ) -> None:
        self._max_characters, self._min_count = max_characters, min_count
        self._names = {number: token for token, number in base.vocabulary.items()}
        # A vocabulary is a dict by text: a second token of the same text would take the id of the first away.
        self._taken = {*base.ids}
        self._next = base.size
        model = base.model_alone()
        self._counts_of_words = list(words.values())
        self._words = [list(ids) for ids in _encode(model, words)]
        self.tokens = sum(len(ids) * n for ids, n in zip(self._words, self._counts_of_words, strict=True))
        self._counts: defaultdict[_Ids, int] = defaultdict(int)
        self._places: defaultdict[_Ids, list[int]] = defaultdict(list)
        for place, (ids, count) in enumerate(zip(self._words, self._counts_of_words, strict=True)):
            for pair in pairwise(ids):
                self._counts[pair] += count
                self._places[pair].append(place)
        # No merge of two tokens that stand side by side in one of these words, or the word would change.
        self._fixed = set[_Ids]()
        whole = base.content["model"].get("ignore_merges")  # a word that is a token is that one, however it is merged
        for some in fixed:
            self._fixed.update(pair for ids in _encode(model, some) for pair in pairwise(ids) if pair in self._counts)
            if whole:
                self._taken.update(word for word in some if len(text_of(word)) <= max_characters)

    def __iter__(self) -> Iterator[Merge]:
        """Yield merges until no pair is left that stands side by side often enough; `tokens` is what is left then."""
        # A merge changes the counts of many pairs: entries are not corrected in the heap, but looked at when they come
        # out.
        queue = [(-count, pair) for pair, count in self._counts.items() if count >= self._min_count]
        heapq.heapify(queue)
        while queue:
            negative, pair = heapq.heappop(queue)
            count = self._counts.get(pair, 0)
            if count != -negative:  # it became rarer meanwhile
                if count >= self._min_count:
                    heapq.heappush(queue, (-count, pair))
                continue
            left, right = self._names[pair[0]], self._names[pair[1]]
            if pair in self._fixed or not self._is_wanted(left + right):
                continue
            new, self._next = self._next, self._next + 1
            self._names[new] = left + right
            self._taken.add(left + right)
            for changed in self._merge(pair, new):
                if self._counts[changed] >= self._min_count:
                    heapq.heappush(queue, (-self._counts[changed], changed))
            yield Merge((left, right), count)

    def _is_wanted(self, token: str) -> bool:
        """Whether a token is a new one, not of ASCII alone, and whole characters or a part of one."""
        data = bytes_of(token)
        if token in self._taken or data is None or data.isascii():
            return False
        try:
            return len(data.decode()) <= self._max_characters
        except UnicodeDecodeError:
            # Some bytes of one character, on the way to it; beside those of another they would be neither.
            part = len(data) < 4 and all(byte & 0xC0 == 0x80 for byte in data[1:])
            return part and not data.decode(errors="ignore")

    def _merge(self, pair: _Ids, new: int) -> list[_Ids]:
        """Put the new id where the pair stands; return the pairs that became more frequent."""
        left, right = pair
        changes: defaultdict[_Ids, int] = defaultdict(int)
        # Once each: a word that holds the pair twice is noted twice, and merged whole at the first.
        for place in dict.fromkeys(self._places.pop(pair)):
            old, count, merged, at = self._words[place], self._counts_of_words[place], list[int](), 0
            while at < len(old):
                if old[at] != left or at + 1 == len(old) or old[at + 1] != right:
                    merged.append(old[at])
                    at += 1
                    continue
                # The neighbour as it is by now: of a pair that stands there twice in a row it is the new token.
                if merged:
                    changes[merged[-1], left] -= count
                    changes[merged[-1], new] += count
                    self._places[merged[-1], new].append(place)
                if at + 2 < len(old):
                    changes[right, old[at + 2]] -= count
                    changes[new, old[at + 2]] += count
                    self._places[new, old[at + 2]].append(place)
                merged.append(new)
                at += 2
            self.tokens -= (len(old) - len(merged)) * count
            self._words[place] = merged
        del self._counts[pair]
        # Where the pair overlapped itself (aaa) it was counted down as its own neighbour, and none of it is left.
        changes.pop(pair, None)
        for each, change in changes.items():
            self._counts[each] += change
        return [each for each, change in changes.items() if change > 0]


def _encode(model: object, words: Iterable[str]) -> Iterator[list[int]]:
    """Ids of words in bytes' characters, a batch at a time."""
    listed = list(words)
    for start in range(0, len(listed), _BATCH):
        batch = listed[start : start + _BATCH]
        for encoding in model.encode_batch_fast(batch, add_special_tokens=False):  # type: ignore[attr-defined]
            yield encoding.ids
