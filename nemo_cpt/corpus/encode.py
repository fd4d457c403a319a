"""A task's lines turned into the bytes of the `.bin`."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from nemo_cpt.corpus.feed import Task, texts_of
from nemo_cpt.corpus.index import ITEMSIZE
from nemo_cpt.corpus.lines import Reading
from nemo_cpt.corpus.tokenizer import Encoder

BATCH = 256  # texts given to the tokenizer at once


@dataclass(frozen=True)
class Layout:
    """How documents are laid out in the `.bin`.

    Attributes:
        json_key: Name of the text's field.
        dtype: Type of the tokens, `int32` or `uint16`.
        bos: Id put before each document, None for none.
        eod: Id put after each document, None for none.
        keep_empty: Give an empty text a document of no tokens, as Megatron-LM's script does; NeMo's leaves it out.
        special: Ids to count: the tokenizer's special tokens.
    """

    json_key: str
    dtype: str
    bos: int | None
    eod: int | None
    keep_empty: bool
    special: tuple[int, ...]


@dataclass
class Encoded:
    """What became of a task; `payload` stays in the worker, the rest travels.

    Attributes:
        lengths: int32 lengths of its documents as bytes, with 0 for an empty one that is kept.
        nbytes: Size of the payload.
        largest: Largest token id, -1 where there is none.
        special: How often each special token stood in the texts, by id.
        reading: What the task's lines held.
    """

    reading: Reading
    lengths: bytes = b""
    nbytes: int = 0
    documents: int = 0
    tokens: int = 0
    longest: int = 0
    largest: int = -1
    empty: int = 0
    special: dict[int, int] = field(default_factory=dict)


def encode_task(task: Task, encoder: Encoder, layout: Layout) -> tuple[Encoded, list[bytes]]:
    """Read and encode a task; return its description and its payload in pieces."""
    import numpy as np

    found = texts_of(task, layout.json_key)
    encoded = Encoded(found.reading)
    pieces, lengths = [], []
    for i in range(0, len(found.texts), BATCH):
        ids, offsets = encoder.encode(found.texts[i : i + BATCH])
        _count_special(ids, layout.special, encoded.special)
        encoded.largest = max(encoded.largest, int(ids.max()) if len(ids) else -1)
        piece, lens = lay_out(ids, offsets, layout)
        encoded.empty += int(np.count_nonzero(lens == 0))
        pieces.append(piece)
        lengths.append(lens if layout.keep_empty else lens[lens > 0])
    if lengths:
        all_lengths = np.concatenate(lengths)
        encoded.lengths = all_lengths.tobytes()
        encoded.documents = len(all_lengths)
        encoded.tokens = int(all_lengths.sum(dtype=np.int64))
        encoded.longest = int(all_lengths.max(initial=0))
    encoded.nbytes = sum(map(len, pieces))
    return encoded, pieces


def lay_out(ids: Any, offsets: Any, layout: Layout) -> tuple[bytes, Any]:
    """Put BOS and end-of-document ids around the documents that have tokens.

    Args:
        ids: uint32 array of shape [tokens].
        offsets: Where each document begins, of shape [documents + 1].
        layout: The layout.

    Returns:
        The bytes and each document's length, an int32 array of shape [documents].
    """
    import numpy as np

    item = ITEMSIZE[layout.dtype]
    view = memoryview(ids.astype(layout.dtype, copy=False)).cast("B")
    before, after = (b"" if i is None else np.array([i], layout.dtype).tobytes() for i in (layout.bos, layout.eod))
    counts = np.diff(offsets.astype(np.int64))
    ends = (offsets * item).tolist()
    slices = [view[a:b] for a, b in pairwise(ends) if b > a]
    lengths = np.where(counts > 0, counts + (len(before) + len(after)) // item, 0).astype("<i4")
    return (before + (after + before).join(slices) + after if slices else b""), lengths


def _count_special(ids: Any, special: tuple[int, ...], counts: dict[int, int]) -> None:
    """Count special tokens; they stand at an end of the vocabulary, so that two comparisons leave few ids to see."""
    import numpy as np

    if not special:
        return
    suspects = ids[(ids >= special[0]) & (ids <= special[-1])]
    for number in np.unique(suspects).tolist() if len(suspects) else ():
        if number in special:
            counts[number] = counts.get(number, 0) + int(np.count_nonzero(suspects == number))
