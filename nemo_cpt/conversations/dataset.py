"""Prepared conversations on disk, read by mapping them into memory: what a training's data module builds on.

A set is four files. `PREFIX_conversations.bin` and `.idx` are a Megatron dataset with one document a conversation;
`.mask` has one byte for each token of the `.bin`, 1 where the token is trained on; `.json` is the manifest. Nothing in
them depends on a training's sequence length: conversations are whole, and are left out, cut and packed when they are
read.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nemo_cpt.arguments import checked
from nemo_cpt.corpus.dataset.index import ANEW, Index, full_prefix, read_index
from nemo_cpt.errors import CptError

SUFFIX = "_conversations"
KIND = "conversations"
TOO_LONG = ("drop", "cut")


def conversations_prefix(prefix: str | os.PathLike[str]) -> str:
    """Return the prefix of a set's files for that prefix, or for the one given to `prepare`."""
    text = str(prefix)
    for end in (".bin", ".idx", ".mask", ".json"):
        text = text.removesuffix(end)
    # Unlike `full_prefix` it asks no file: a set that is yet to be written has its prefix already.
    return text if text.endswith(SUFFIX) else text + SUFFIX


def is_conversations(prefix: str | os.PathLike[str]) -> bool:
    """Say whether a prefix, maybe the one given to `prepare`, stands for a set of conversations.

    Raises:
        CptError: It stands for a dataset of texts as well.
    """
    chats = conversations_prefix(prefix)
    if not Path(chats + ".idx").exists():
        return False
    texts = full_prefix(prefix)
    if texts != chats and Path(texts + ".idx").exists():
        raise CptError(f"{prefix} stands for {texts} and for {chats}: name the one that you mean.")
    return True


@dataclass(frozen=True)
class Fit:
    """A set's conversations in sequences of some length.

    Attributes:
        seq_length: Positions of a sequence.
        positions: Positions that each conversation takes, int32 of shape [conversations]; 0 for one left out. Its first
            `positions + 1` tokens count: the last of them is only predicted.
        too_long: Conversations that take more positions than a sequence has.
        cut: Those of them that were cut; the others were left out.
    """

    seq_length: int
    positions: Any
    too_long: int
    cut: int


def check_fit(seq_length: int, too_long: str) -> None:
    """Check what `ConversationSet.fit` takes.

    Raises:
        CptError: An argument cannot be used.
    """
    if seq_length < 1:
        raise CptError(f"seq_length is {seq_length}; it must be positive.")
    if too_long not in TOO_LONG:
        raise CptError(f"too_long is {too_long!r}; it can be {' or '.join(TOO_LONG)}.")


@dataclass(frozen=True)
class ConversationSet:
    """Conversations as `prepare` wrote them.

    Attributes:
        prefix: Of its files, without .bin, .idx, .mask or .json.
        index: What the `.idx` says.
        manifest: The manifest.
        tokens: All tokens, mapped, of shape [tokens].
        mask: Whether each is trained on, uint8 of shape [tokens], mapped.
    """

    prefix: str
    index: Index
    manifest: dict[str, Any]
    tokens: Any
    mask: Any

    def __len__(self) -> int:
        """Return the number of conversations."""
        return len(self.index.lengths)

    def read(self, number: int) -> tuple[Any, Any]:
        """Return a conversation's tokens and which of them are trained on, two arrays of shape [tokens]."""
        # Pointers count bytes of the `.bin`; the mask has one byte a token, so that it is cut by tokens.
        begin = int(self.index.pointers[number]) // self.index.itemsize
        stretch = slice(begin, begin + int(self.index.lengths[number]))
        return self.tokens[stretch], self.mask[stretch]

    def fit(self, seq_length: int, too_long: str = "drop") -> Fit:
        """Return how the conversations fit into sequences.

        Args:
            seq_length: Positions of a sequence.
            too_long: `drop` leaves longer conversations out. `cut` cuts them after the last answer that fits, or within
                the first answer where none fits; one whose first answer does not begin within a sequence is left out.

        Raises:
            CptError: An argument cannot be used.
        """
        import numpy as np

        check_fit(seq_length, too_long)
        # The last token is only predicted: it needs a label, and no position.
        positions = self.index.lengths - np.int32(1)
        over = np.flatnonzero(positions > seq_length)
        for number in over:
            positions[number] = self._positions_of_a_part(int(number), seq_length) if too_long == "cut" else 0
        return Fit(seq_length, positions, len(over), int(np.count_nonzero(positions[over])))

    def _positions_of_a_part(self, number: int, seq_length: int) -> int:
        """Return how many positions of a conversation to keep so that it ends with an answer."""
        import numpy as np

        # One more than can be used: an answer's end shows in the token after it. Signed, or 0 - 1 would be 255.
        mask = self.read(number)[1][: seq_length + 2].astype(np.int8)
        ends = np.flatnonzero(np.diff(mask) == -1)  # the last tokens of answers
        if len(ends):
            return int(ends[-1])
        return seq_length if mask[1 : seq_length + 1].any() else 0


@checked
def open_conversations(prefix: str | os.PathLike[str]) -> ConversationSet:
    """Open a set that `prepare` wrote.

    Args:
        prefix: `sft/ja` or `sft/ja_conversations`.

    Raises:
        CptError: A file is missing, truncated or foreign, or the files do not belong together.
    """
    import numpy as np

    from nemo_cpt.corpus.dataset.manifest import read_manifest  # needs orjson, which the doctor may miss

    full = conversations_prefix(prefix)
    if not any(Path(full + end).exists() for end in (".idx", ".journal")):
        texts = full_prefix(full.removesuffix(SUFFIX))
        instead = f" ({texts} is a dataset of texts)" if Path(texts + ".idx").exists() else ""
        raise CptError(
            f"There is no set of conversations {full}{instead}. Make it with `nemo-cpt prepare CHATS --template …`, "
            "or correct the prefix."
        )
    index, manifest, mask = read_index(full), read_manifest(full), Path(full + ".mask")
    if manifest.get("kind") == KIND and not mask.is_file():
        raise CptError(f"There is no {mask}. Restore it; or {ANEW}.")
    if manifest.get("kind") != KIND:
        raise CptError(f"{full} is not a set of conversations. Make one with `nemo-cpt prepare --template …`.")
    # Sizes of all four files against one another: a copy that broke off or a mixture of two runs shows here.
    size, recorded = mask.stat().st_size, (manifest["documents"], manifest["tokens"])
    if size != index.tokens or (index.documents, index.tokens) != recorded:
        raise CptError(
            f"The files of {full} do not belong together: {index.documents} conversations of {index.tokens} tokens in "
            f"the .idx, {recorded[0]} of {recorded[1]} in the manifest, {size} in the .mask; {ANEW}."
        )
    tokens: Any = np.memmap(full + ".bin", dtype=index.dtype, mode="r")
    return ConversationSet(full, index, manifest, tokens, np.memmap(mask, dtype=np.uint8, mode="r"))


class Readable(Protocol):
    """What conversations can be read from by number."""

    def read(self, number: int) -> tuple[Any, Any]:
        """See `ConversationSet.read`."""


def lay_out(chats: Readable, numbers: Any, fit: Fit) -> dict[str, Any]:
    """Put conversations into one sequence, as a training step takes it.

    A conversation's tokens are shifted against its own labels, never against the next one's; its positions begin at 0.
    What is left at the end is a stretch of its own, of which nothing is trained on.

    Args:
        chats: The set.
        numbers: Of the conversations, in order; what they take must fit.
        fit: What each takes.

    Returns:
        `tokens`, `labels` and `position_ids`, int64 of shape [seq_length]; `loss_mask`, float32 of the same shape;
        `cu_seqlens`, int32: where each stretch begins, and the sequence's end.
    """
    import numpy as np

    # Token 0 where nothing stands: the mask has no loss there, whatever it is.
    tokens, labels, position_ids = (np.zeros(fit.seq_length, np.int64) for _ in range(3))
    loss_mask, starts, at = np.zeros(fit.seq_length, np.float32), [0], 0
    for number in numbers:
        count = int(fit.positions[number])
        ids, trained = chats.read(number)
        stretch = slice(at, at + count)
        tokens[stretch], labels[stretch] = ids[:count], ids[1 : count + 1]
        # The mask of the labels, not of the tokens: what is trained is to predict a token of an answer.
        loss_mask[stretch], position_ids[stretch] = trained[1 : count + 1], np.arange(count)
        starts.append(at := at + count)
    if at < fit.seq_length:
        position_ids[at:] = np.arange(fit.seq_length - at)
        starts.append(fit.seq_length)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": loss_mask,
        "position_ids": position_ids,
        "cu_seqlens": np.array(starts, np.int32),
    }
