"""A look at prepared conversations: which of their tokens are trained on, and how they fit into sequences."""

import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_cpt.arguments import checked
from nemo_cpt.conversations.dataset import ConversationSet, open_conversations
from nemo_cpt.conversations.encode import load_backend
from nemo_cpt.conversations.packing import pack
from nemo_cpt.corpus.dataset.inspection import check_index, percentiles
from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer
from nemo_cpt.errors import CptError

SEQ_LENGTH = 4096  # what is reported of packing where no length is given
MOSTLY_TRAINED = 0.95
BLOCK = 1 << 24  # tokens of a mask looked at at once


@dataclass(frozen=True)
class Fitting:
    """How conversations fit into sequences of some length.

    Attributes:
        seq_length: Positions of a sequence.
        too_long: Conversations that take more.
        left_out: Those of them that a training leaves out; the others it cuts.
        sequences: Sequences of an epoch, packed.
        filled: Share of their positions that conversations fill.
    """

    seq_length: int
    too_long: int
    left_out: int
    sequences: int
    filled: float


@dataclass(frozen=True)
class ConversationInspection:
    """What a set of conversations is.

    Attributes:
        prefix: Of its files.
        conversations: Number of conversations.
        answers: Answers that are trained on.
        tokens: Number of tokens.
        trained: Tokens that are trained on.
        percentiles: Tokens of a conversation by percentile.
        longest: Number of the longest conversation.
        template: The manifest's `template`: `name`, `sha256`, `text`, `stop`, `tokens`.
        tokenizer: The manifest's `tokenizer`.
        forms: Conversations by the form that they had.
        skipped: Lines left out, by reason.
        fitting: How they fit into sequences.
        samples: The first conversations: `conversation`, `tokens`, `trained`, and `pieces`, a list of [text, whether it
            is trained on]; without a tokenizer that can be found, `pieces` hold ids.
        manifest: The whole manifest.
        warnings: Sentences for people.
    """

    prefix: str
    conversations: int
    answers: int
    tokens: int
    trained: int
    percentiles: dict[int, int]
    longest: int
    template: dict[str, Any]
    tokenizer: dict[str, Any]
    forms: dict[str, int]
    skipped: dict[str, int]
    fitting: Fitting
    samples: list[dict[str, Any]]
    manifest: dict[str, Any] = field(repr=False, default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@checked
def inspect_conversations(
    prefix: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    samples: int = 3,
    seq_length: int = SEQ_LENGTH,
    too_long: str = "drop",
) -> ConversationInspection:
    """Read a set whole and describe it.

    Args:
        prefix: `sft/ja` or `sft/ja_conversations`.
        tokenizer: Folder or hub name of the tokenizer to decode with; by default the one that it was made with, if that
            is a folder which is still there.
        samples: Conversations to show, from the first.
        seq_length: Length of a training's sequences.
        too_long: What a training does with longer conversations: `drop` or `cut`.

    Raises:
        CptError: A file is missing, truncated or corrupt, was made with another tokenizer than the one given, or an
            argument cannot be used.
    """
    if samples < 0:
        raise CptError(f"samples is {samples}; it is a number of conversations, 0 for none.")
    chats = open_conversations(prefix)
    check_index(chats.index)
    trained = _count_trained(chats)
    fitting = fit_and_pack(chats, seq_length, too_long)
    manifest = chats.manifest
    report = ConversationInspection(
        prefix=chats.prefix,
        conversations=len(chats),
        answers=manifest["answers"],
        tokens=chats.index.tokens,
        trained=trained,
        percentiles=percentiles(chats.index.lengths),
        longest=int(chats.index.lengths.argmax()),
        template=manifest["template"],
        tokenizer=manifest["tokenizer"],
        forms=manifest["forms"],
        skipped=manifest["skipped"],
        fitting=fitting,
        samples=_samples(chats, _decoder(chats, tokenizer), samples),
        manifest=manifest,
    )
    report.warnings.extend(warnings_of(report.trained, report.tokens, report.fitting, too_long))
    return report


def fit_and_pack(chats: ConversationSet, seq_length: int, too_long: str) -> Fitting:
    """Return how a set fits into sequences.

    Raises:
        CptError: An argument cannot be used.
    """
    fit = chats.fit(seq_length, too_long)
    packing = pack(fit.positions, seq_length)
    return Fitting(seq_length, fit.too_long, fit.too_long - fit.cut, len(packing), packing.filled)


def warnings_of(trained: int, tokens: int, fitting: Fitting, too_long: str) -> list[str]:
    """Return what the user should know about a set."""
    found = []
    if trained > MOSTLY_TRAINED * tokens:
        found.append(
            f"{100 * trained / tokens:.1f} % of the tokens are trained on: the questions seem to be among them, as "
            "with train_on='all', or where answers repeat their questions."
        )
    if fitting.too_long:
        what = "left out" if too_long == "drop" else "cut or left out"
        found.append(
            f"{fitting.too_long:,} conversations do not fit into {fitting.seq_length:,} positions; in a training of "
            f"that seq_length they are {what}."
        )
    return found


def _count_trained(chats: ConversationSet) -> int:
    """Return how many tokens are trained on."""
    import numpy as np

    trained = 0
    for begin in range(0, len(chats.mask), BLOCK):
        # Signed, so that a byte above 127 shows as negative.
        part = np.asarray(chats.mask[begin : begin + BLOCK], np.int8)
        if part.min(initial=0) < 0 or part.max(initial=0) > 1:
            raise CptError(f"{chats.prefix}.mask is corrupt: near its byte {begin} is something else than 0 and 1.")
        trained += int(part.sum(dtype=np.int64))
    return trained


def _decoder(chats: ConversationSet, tokenizer: str | os.PathLike[str] | None) -> Any:
    """Return what turns ids into text, None where there is no tokenizer."""
    made_with = chats.manifest["tokenizer"]
    if tokenizer is None and not Path(made_with["name"]).exists():
        return None
    loaded = load_tokenizer(tokenizer if tokenizer is not None else made_with["name"])
    # By content: the folder of that name may hold another tokenizer by now.
    if loaded.sha256 == made_with["sha256"]:
        return load_backend(loaded)
    if tokenizer is None:
        return None
    raise CptError(
        f"{chats.prefix} was made with {made_with['name']}, whose vocabulary differs from that of {loaded.name}: its "
        "tokens would be decoded to other words."
    )


def _samples(chats: ConversationSet, decoder: Any, count: int) -> list[dict[str, Any]]:
    import numpy as np

    samples = []
    for number in range(min(count, len(chats))):
        ids, mask = chats.read(number)
        # Cut where the mask changes: each piece is trained on whole, or not at all.
        bounds = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
        pieces = []
        for begin, end in pairwise(bounds):
            part = ids[begin:end].tolist()
            text = decoder.decode(part, skip_special_tokens=False) if decoder else part
            pieces.append([text, bool(mask[begin])])
        samples.append({"conversation": number, "tokens": len(ids), "trained": int(mask.sum()), "pieces": pieces})
    return samples
