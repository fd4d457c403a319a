"""A task's lines turned into the bytes of the `.bin`."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from nemo_cpt.corpus.dataset.index import ITEMSIZE
from nemo_cpt.corpus.reading.chunks import Task, texts_of
from nemo_cpt.corpus.reading.lines import Reading
from nemo_cpt.corpus.tokenization.characters import Lookout, Passage, around
from nemo_cpt.corpus.tokenization.tokenizer import Encoder

BATCH = 256  # texts given to the tokenizer at once
COMPARED_TASKS, COMPARED_TEXT = 4, 2000  # one task in so many gives a document for comparison, of so many characters


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
    """What became of a task; its payloads stay in the worker, the rest travels.

    Attributes:
        lengths: int32 lengths of its documents as bytes, with 0 for an empty one that is kept.
        nbytes: Size of the tokens.
        largest: Largest token id, -1 where there is none.
        special: How often each special token stood in the texts, by id.
        passages: What is to be encoded by the reference as well.
        reading: What the task's lines held.
        counts: Whatever else is to be counted, by name.
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
    passages: list[Passage] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class Work(Protocol):
    """What workers do with a task.

    Attributes:
        encoder: What encodes texts in it.
    """

    encoder: Encoder

    def __call__(self, task: Task) -> tuple[Encoded, list[list[bytes]]]:
        """Return what became of a task, and what goes into each output file, in pieces."""


class TextWork:
    """Encodes texts; each worker's copy has a lookout of its own."""

    def __init__(self, encoder: Encoder, layout: Layout, lookout: Lookout | None) -> None:
        self.encoder, self._layout, self._lookout = encoder, layout, lookout

    def __call__(self, task: Task) -> tuple[Encoded, list[list[bytes]]]:
        """Encode a task; see `Work`."""
        encoded, pieces = encode_task(task, self.encoder, self._layout, self._lookout)
        return encoded, [pieces]


def encode_task(
    task: Task, encoder: Encoder, layout: Layout, lookout: Lookout | None = None
) -> tuple[Encoded, list[bytes]]:
    """Read and encode a task; return its description and its tokens in pieces.

    With a lookout it also chooses passages to compare: a document of each fourth task, and the surroundings of
    characters of a kind that is new to the lookout.
    """
    import numpy as np

    # The lines are read in the worker: the parent hands out byte ranges, and no text crosses a pipe.
    found = texts_of(task, layout.json_key)
    encoded = Encoded(found.reading)
    pieces, lengths = [], []
    for i in range(0, len(found.texts), BATCH):
        texts = found.texts[i : i + BATCH]
        ids, offsets = encoder.encode(texts)
        _count_special(ids, layout.special, encoded.special)
        encoded.largest = max(encoded.largest, int(ids.max()) if len(ids) else -1)
        if lookout is not None:
            # By the task's number, so that the choice does not depend on which worker had it.
            first = i == 0 and task.index % COMPARED_TASKS == 0
            encoded.passages += choose_passages(texts, ids, offsets, encoder, lookout, first)
        piece, lens = lay_out(ids, offsets, layout)
        # Counted before they are left out: the report names them in both layouts.
        encoded.empty += int(np.count_nonzero(lens == 0))
        pieces.append(piece)
        lengths.append(lens if layout.keep_empty else lens[lens > 0])
    count_lengths(encoded, lengths)
    encoded.nbytes = sum(map(len, pieces))
    return encoded, pieces


def count_lengths(encoded: Encoded, lengths: list[Any]) -> None:
    """Count in the documents' lengths, int32 arrays of shape [documents of a batch]."""
    import numpy as np

    if lengths:
        all_lengths = np.concatenate(lengths)
        encoded.lengths = all_lengths.tobytes()
        encoded.documents = len(all_lengths)
        encoded.tokens = int(all_lengths.sum(dtype=np.int64))
        encoded.longest = int(all_lengths.max(initial=0))


def choose_passages(
    texts: list[str], ids: Any, offsets: Any, encoder: Encoder, lookout: Lookout, document: bool
) -> list[Passage]:
    """Choose passages of a batch to compare: where a kind of character is new, and a document if one is wanted."""
    found = _characteristic(texts, encoder, lookout)
    return [*found, _document(texts, ids, offsets, encoder)] if document else found


def _characteristic(texts: list[str], encoder: Encoder, lookout: Lookout) -> list[Passage]:
    found = [(kind, around(texts[number], character)) for kind, number, character in lookout.look(texts)]
    return [Passage(text, encoder.encode([text])[0].tobytes(), kind) for kind, text in found]


def _document(texts: list[str], ids: Any, offsets: Any, encoder: Encoder) -> Passage:
    """The first document of a batch that is short enough, with the ids that go into the dataset; or a beginning."""
    for number, text in enumerate(texts):
        if 0 < len(text) <= COMPARED_TEXT:
            return Passage(text, ids[int(offsets[number]) : int(offsets[number + 1])].tobytes())
    beginning = texts[0][:COMPARED_TEXT]
    return Passage(beginning, encoder.encode([beginning])[0].tobytes())


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
    # Bytes joined in C, and not an array that is filled document by document.
    view = memoryview(ids.astype(layout.dtype, copy=False)).cast("B")
    before, after = (b"" if i is None else np.array([i], layout.dtype).tobytes() for i in (layout.bos, layout.eod))
    counts = np.diff(offsets.astype(np.int64))
    # Plain ints: each slice by NumPy's scalars would convert them once more.
    ends = (offsets * item).tolist()
    slices = [view[a:b] for a, b in pairwise(ends) if b > a]
    lengths = np.where(counts > 0, counts + (len(before) + len(after)) // item, 0).astype("<i4")
    # Between two documents stand the end of the one and the beginning of the next.
    return (before + (after + before).join(slices) + after if slices else b""), lengths


def _count_special(ids: Any, special: tuple[int, ...], counts: dict[int, int]) -> None:
    """Count special tokens; they stand at an end of the vocabulary, so that two comparisons leave few ids to see."""
    import numpy as np

    if not special:
        return
    suspects = ids[(ids >= special[0]) & (ids <= special[-1])]
    # Ordinary tokens may lie between special ones, so that each suspect is looked up.
    for number in np.unique(suspects).tolist() if len(suspects) else ():
        if number in special:
            counts[number] = counts.get(number, 0) + int(np.count_nonzero(suspects == number))
