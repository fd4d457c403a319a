"""Whole conversations in sequences: each once, none too long, nearly no room lost, in linear time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_cpt.conversations.packing import Packing, pack
from nemo_cpt.errors import CptError


def alpaca_like(count: int) -> np.ndarray:
    """Lengths as those of alpaca's 52,002 conversations: log-normal, half of them below 100 tokens, few above 500."""
    return np.exp(np.random.RandomState(0).normal(4.6, 0.7, count)).astype(np.int32) + 10


@given(st.lists(st.integers(0, 50), max_size=200), st.integers(50, 60), st.integers(0, 3))
def test_every_conversation_stands_in_one_sequence_that_it_fits_in(lengths: list[int], room: int, seed: int) -> None:
    packing = pack(np.array(lengths, np.int32), room, seed)
    assert sorted(packing.members.tolist()) == [i for i, length in enumerate(lengths) if length]
    sums = [sum(lengths[i] for i in packing[k]) for k in range(len(packing))]
    assert all(0 < total <= room for total in sums)
    assert packing.positions == sum(lengths)
    assert len(packing) == len(pack(np.array(lengths, np.int32), room, seed + 1))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60))
def test_best_fit_is_what_a_slow_search_finds(lengths: list[int]) -> None:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 12) - length)
    assert len(pack(np.array(lengths), 12)) == len(rooms)


@pytest.mark.parametrize("seq_length", [512, 2048, 4096])
def test_alpaca_like_lengths_fill_95_percent(seq_length: int) -> None:
    assert pack(np.minimum(alpaca_like(20_000), seq_length), seq_length).filled > 0.95


def test_half_a_million_conversations() -> None:
    """A second's work; first fit, which looks at every sequence, would run into the suite's time limit."""
    lengths = np.minimum(alpaca_like(500_000), 4096)
    packing = pack(lengths, 4096)
    assert len(packing.members) == len(lengths)
    assert packing.filled > 0.99


def test_a_seed_gives_one_order_and_another_seed_another() -> None:
    lengths = alpaca_like(1000)

    def order(packing: Packing) -> list[int]:
        return packing.members.tolist()

    assert order(pack(lengths, 4096, seed=5)) == order(pack(lengths, 4096, seed=5))
    assert order(pack(lengths, 4096, seed=5)) != order(pack(lengths, 4096, seed=6))


def test_nothing_packs_to_nothing() -> None:
    assert len(pack(np.array([], np.int32), 8)) == 0
    assert pack(np.array([], np.int32), 8).filled == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(CptError, match="takes 9 positions, more than a sequence of 8"):
        pack(np.array([3, 9]), 8)
    with pytest.raises(CptError, match="must be positive"):
        pack(np.array([3]), 0)
