"""Whole conversations put together to sequences of a fixed length.

Best fit, longest first: each conversation goes where the least room is left that it fits in. The rooms that are open
are bits of one integer, so that the time is linear in the number of conversations.
"""

from dataclasses import dataclass
from typing import Any

from nemo_cpt.arguments import checked
from nemo_cpt.errors import CptError


@dataclass(frozen=True)
class Packing:
    """Which conversations stand together.

    Attributes:
        seq_length: Positions of a sequence.
        members: Conversations' numbers, sequence after sequence, int32 of shape [conversations].
        starts: Where each sequence's members begin, int64 of shape [sequences + 1].
        positions: Positions that the conversations fill in all.
    """

    seq_length: int
    members: Any
    starts: Any
    positions: int

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.starts) - 1

    def __getitem__(self, sequence: int) -> Any:
        """Return the numbers of a sequence's conversations, in the order in which they stand in it."""
        return self.members[self.starts[sequence] : self.starts[sequence + 1]]

    @property
    def filled(self) -> float:
        """Share of all positions that conversations fill."""
        return self.positions / max(len(self) * self.seq_length, 1)


@checked
def pack(lengths: Any, seq_length: int, seed: int = 0) -> Packing:
    """Pack conversations into as few sequences as best fit finds.

    The number of sequences follows from the lengths alone; the seed chooses which of equally long conversations stands
    where, and the order of the sequences. So every epoch can have its own packing, and all are as long.

    Args:
        lengths: Positions that each conversation takes, of shape [conversations]; those of 0 are left out.
        seq_length: Positions of a sequence.
        seed: Of the order.

    Raises:
        CptError: The length is not positive, or a conversation is longer.
    """
    import numpy as np

    lengths = np.asarray(lengths)
    if seq_length < 1:
        raise CptError(f"seq_length is {seq_length}; it must be positive.")
    if (longest := int(lengths.max(initial=0))) > seq_length:
        raise CptError(f"A conversation takes {longest} positions, more than a sequence of {seq_length} has.")
    random = np.random.RandomState(seed)  # whose numbers NumPy promises not to change
    # Shuffled before the stable sort: of equally long ones each may come first.
    numbers = random.permutation(np.flatnonzero(lengths))
    numbers = numbers[np.argsort(-lengths[numbers].astype(np.int64), kind="stable")]
    sequence_of, count = _best_fit(lengths[numbers].tolist(), seq_length)
    # Sequences are drawn in another order: best fit puts the long conversations first.
    place = random.permutation(count)[np.asarray(sequence_of, np.int64)]
    return Packing(
        seq_length=seq_length,
        members=numbers[np.argsort(place, kind="stable")].astype(np.int32),
        starts=np.concatenate(([0], np.cumsum(np.bincount(place, minlength=count), dtype=np.int64))),
        positions=int(lengths.sum(dtype=np.int64)),
    )


def _best_fit(lengths: list[int], room: int) -> tuple[list[int], int]:
    """Return each item's bin, for items from the longest to the shortest, and the number of bins."""
    shortest = lengths[-1] if lengths else 0
    bins_with: list[list[int]] = [[] for _ in range(room + 1)]  # open bins by the room left in them
    occupied, count = 0, 0  # bit r: there is a bin with room r
    chosen = []
    for length in lengths:
        # The lowest bit from `length` on: the tightest room that this one fits into.
        if fitting := occupied >> length:
            left = length + (fitting & -fitting).bit_length() - 1
            number = bins_with[left].pop()
            if not bins_with[left]:
                occupied ^= 1 << left
        else:
            number, left, count = count, room, count + 1
        chosen.append(number)
        # A room that not even the shortest fits into is closed.
        if (left := left - length) >= shortest:
            bins_with[left].append(number)
            occupied |= 1 << left
    return chosen, count
