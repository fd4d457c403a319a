"""Which prepared conversations a training sees, how often, and in which order. Needs neither torch nor NeMo."""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_cpt.arguments import checked, names_checked
from nemo_cpt.conversations.dataset import (
    ConversationSet,
    Fit,
    check_fit,
    conversations_prefix,
    lay_out,
    open_conversations,
)
from nemo_cpt.conversations.packing import Packing, pack
from nemo_cpt.corpus.dataset.blend import (
    BlendReport,
    check_distinct,
    check_held_out,
    check_mapping,
    check_weights,
    plain_mapping,
)
from nemo_cpt.errors import CptError

KIND = "mixture of conversations"
SEED = 1234  # of the order, as NeMo's data modules have it
EPOCHS = 2.0  # of a tuning, where nothing else is said: Tülu 3's for Llama-3.1-8B (arXiv 2411.15124)
REPLAY_SHARE = 0.05  # of text that is replayed, likewise: for a weak shift of the distribution (arXiv 2403.08763)
MANY_LEFT_OUT = 0.05
MANY_EPOCHS = 8  # the tuned model's answers on held-out questions get worse long before


@names_checked
@dataclass(frozen=True)
class Conversations:
    """Sets of conversations to train on, and named ones to validate on.

    A prefix is the one given to `prepare` (`sft/ja`) or that of the files (`sft/ja_conversations`). Plain data only, so
    that it can stand in a Fiddle or NeMo-Run config; nothing is read before a method needs it.

    Attributes:
        train: How often an epoch goes through each set, by prefix: 1.0 sees each conversation once, 2.0 twice, 0.25
            another quarter of them in each epoch.
        validation: Prefixes by name, one validation loss each.
        too_long: What becomes of a conversation that is longer than a sequence: `drop` or `cut`, after the last answer
            that fits.
    """

    train: Mapping[str, float]
    validation: Mapping[str, str] = field(default_factory=dict)
    too_long: str = "drop"

    def __post_init__(self) -> None:
        """Make Paths and numpy's numbers plain."""
        for name in ("train", "validation"):
            object.__setattr__(self, name, plain_mapping(getattr(self, name)))

    def check(self) -> None:
        """Check everything that can be known before the job starts.

        Raises:
            CptError: A mapping is a string or has the wrong kind of value, a weight is not positive, a file is missing
                or damaged, a set is trained on twice, or trained on and held out, or the sets have several templates.
        """
        self.check_form()
        templates: dict[str, str] = {}
        for prefix in self.prefixes():
            template = open_conversations(prefix).manifest["template"]
            templates.setdefault(template["sha256"], f"{prefix} ({template['name']})")
        if len(templates) > 1:
            raise CptError(
                f"The sets have different templates: {' and '.join(templates.values())}. A model learns one: prepare "
                "them again with the same --template."
            )
        # By full prefix, or `full_prefix` would look for sets of texts.
        held_out = {name: conversations_prefix(prefix) for name, prefix in self.validation.items()}
        check_held_out(map(conversations_prefix, self.train), {"validation": held_out}, KIND)

    def check_form(self) -> None:
        """Check what can be known without the files.

        Raises:
            CptError: As `check`.
        """
        check_mapping("train", self.train, KIND)
        check_mapping("validation", self.validation, KIND)
        if not self.train:
            raise CptError(f"The {KIND} has nothing to train on: Conversations(train={{'sft/ja': 1.0}}).")
        check_weights(self.train, KIND)
        check_distinct(self.train, KIND, conversations_prefix)
        check_fit(1, self.too_long)

    def prefixes(self) -> list[str]:
        """Return the full prefix of every set, each one once."""
        return list(dict.fromkeys(map(conversations_prefix, [*self.train, *self.validation.values()])))

    @property
    def template(self) -> dict[str, Any]:
        """The sets' template, as a manifest holds it: `name`, `sha256`, `text`, `stop` and other special `tokens`."""
        template: dict[str, Any] = open_conversations(next(iter(self.train))).manifest["template"]
        return template

    @checked
    def steps(
        self, epochs: float, global_batch_size: int, seq_length: int, replay_share: float = 0.0, seed: int = SEED
    ) -> int:
        """Return the fewest steps that go through `epochs` epochs of the conversations.

        Args:
            epochs: May be a fraction.
            global_batch_size: Sequences a step.
            seq_length: Positions of a sequence.
            replay_share: Share of the sequences that are other text.
            seed: Of the training's order.

        Raises:
            CptError: As `check`, or an argument is not positive.
        """
        if not math.isfinite(epochs) or epochs <= 0 or global_batch_size < 1:
            raise CptError(f"epochs is {epochs} and global_batch_size {global_batch_size}; both must be positive.")
        wanted = TrainingSequences(self, seq_length, seed).count(epochs)
        steps = max(math.ceil(wanted / global_batch_size), 1)
        # Replayed text takes its share of each step: counted up, since rounding makes a formula be off by one.
        while other_than_replay(steps * global_batch_size, replay_share) < wanted:
            steps += 1
        return steps

    @checked
    def report(self, global_batch_size: int, seq_length: int, steps: int, replay_share: float = 0.0) -> BlendReport:
        """Return tokens, shares and epochs of a training with these conversations.

        Args:
            global_batch_size: Sequences a step.
            seq_length: Positions of a sequence.
            steps: Of the training.
            replay_share: Share of the sequences that are other text.

        Raises:
            CptError: As `check`, or no conversation fits.
        """
        self.check()
        sequences = TrainingSequences(self, seq_length)
        seen = other_than_replay(steps * global_batch_size, replay_share)
        epochs = seen / max(sequences.count(1), 1)
        weights = list(self.train.values())
        # By positions, not by conversations: the loss counts tokens.
        filled = [weight * int(fit.positions.sum()) for weight, fit in zip(weights, sequences.fits, strict=True)]
        sets = [
            {
                "prefix": chats.prefix,
                "dtype": chats.index.dtype,
                "documents": len(chats),
                "tokens": chats.index.tokens,
                "share": positions / sum(filled),
                "epochs": epochs * weight,
            }
            for chats, weight, positions in zip(sequences.sets, weights, filled, strict=True)
        ]
        validation = {name: open_conversations(prefix).index.tokens for name, prefix in self.validation.items()}
        warnings = _warnings(self, sequences, sets)
        return BlendReport(steps, seen * seq_length, sets, validation, warnings, note="")


def _warnings(data: Conversations, sequences: "TrainingSequences", sets: list[dict[str, Any]]) -> list[str]:
    warnings = sequences.left_out(MANY_LEFT_OUT)
    warnings += [
        f"{each['prefix']} is gone through {each['epochs']:.1f} times: its conversations may be learnt by heart."
        for each in sets
        if each["epochs"] > MANY_EPOCHS
    ]
    if not data.validation:
        warnings.append("There is no validation set: nothing will show overfitting.")
    return warnings


def replay_share(replay: Any, share: float | None) -> float:
    """Return the share of the sequences that are replayed text: as given, else `REPLAY_SHARE` of what there is."""
    return share if share is not None else REPLAY_SHARE if replay is not None else 0.0


def check_replay(replay: Any, share: float, conversations: Conversations | None = None) -> None:
    """Refuse a share without text, text without a share, and a name that stands for two validation sets.

    Args:
        replay: the Blend that is replayed; None for none.
        share: of the sequences.
        conversations: beside which it is; None looks at the share alone.

    Raises:
        CptError: it is one of these, or no share.
    """
    if not 0 <= share < 1 or bool(share) != (replay is not None):
        raise CptError(
            f"replay_share is {share} with {'' if replay else 'no '}replay: give both, the share between 0 and 1, such "
            "as 0.05, or neither"
        )
    if replay and conversations and (twice := sorted(set(conversations.validation) & set(replay.validation))):
        raise CptError(f"conversations and replay both have a validation set {twice[0]!r}: call one otherwise")


def other_than_replay(samples: int, share: float) -> int:
    """Of a training's first sequences those that are conversations; replay is spread evenly among them."""
    # A function of the count alone: a resumed run, another process and the planner all come to the same.
    return samples - math.floor(samples * share)


class SeveralSets:
    """Sets of conversations under one numbering, one set after the other."""

    def __init__(self, sets: Sequence[ConversationSet]) -> None:
        import numpy as np

        self.sets = sets
        self.starts = np.cumsum([0, *map(len, sets)]).tolist()

    def read(self, number: int) -> tuple[Any, Any]:
        """Return a conversation's tokens and which of them are trained on, two arrays of shape [tokens]."""
        which = bisect.bisect_right(self.starts, number) - 1
        return self.sets[which].read(number - self.starts[which])


class TrainingSequences:
    """The sequences of a training, epoch after epoch: whole conversations, packed anew for each epoch.

    What stands where follows from the sets, the length and the seed alone, so a training that is resumed goes on where
    it was, and every process has the same.

    Args:
        data: What is trained on.
        seq_length: Positions of a sequence.
        seed: Of the order.

    Raises:
        CptError: A set is missing or damaged, or no conversation fits into a sequence.
    """

    def __init__(self, data: Conversations, seq_length: int, seed: int = SEED) -> None:
        import numpy as np

        data.check_form()
        self.sets = [open_conversations(prefix) for prefix in data.train]
        self.weights = [float(weight) for weight in data.train.values()]
        self.seq_length, self.seed = seq_length, seed
        self.fits = [chats.fit(seq_length, data.too_long) for chats in self.sets]
        self.chats = SeveralSets(self.sets)
        self.fit = Fit(
            seq_length,
            np.concatenate([each.positions for each in self.fits]),
            sum(each.too_long for each in self.fits),
            sum(each.cut for each in self.fits),
        )
        if not self.fit.positions.any():
            raise CptError(
                f"None of the {len(self.fit.positions)} conversations of {', '.join(data.train)} fits into a sequence "
                f"of {seq_length} positions: take a larger seq_length, or data's too_long: cut."
            )
        self._ends = [0]  # sequences before each epoch, as far as they were needed
        # One epoch's at a time: a training goes through them in order.
        self._packed: tuple[int, Packing] | None = None

    def left_out(self, share: float = 0.0) -> list[str]:
        """Return a sentence for each set of which more than a share is longer than a sequence and left out."""
        return [
            f"{fit.too_long - fit.cut} of the {len(fit.positions)} conversations of {chats.prefix} are longer than "
            f"{fit.seq_length} positions and left out: take a larger seq_length, or data's too_long: cut."
            for chats, fit in zip(self.sets, self.fits, strict=True)
            if fit.too_long - fit.cut > share * len(fit.positions)
        ]

    def count(self, epochs: float) -> int:
        """Return the number of sequences in the first epochs, of which the last one may be a part."""
        whole = math.floor(epochs)
        begin = self._end(whole)
        return begin + (math.ceil((epochs - whole) * (self._end(whole + 1) - begin)) if epochs > whole else 0)

    def members(self, sequence: int) -> Any:
        """Return the numbers of a sequence's conversations, in their order."""
        while self._ends[-1] <= sequence:
            self._end(len(self._ends))
        epoch = bisect.bisect_right(self._ends, sequence) - 1
        return self._pack(epoch)[sequence - self._ends[epoch]]

    def __getitem__(self, sequence: int) -> dict[str, Any]:
        """Return a sequence as `lay_out` gives it."""
        return lay_out(self.chats, self.members(sequence), self.fit)

    def _end(self, epoch: int) -> int:
        """Return the number of sequences before an epoch."""
        while len(self._ends) <= epoch:
            self._ends.append(self._ends[-1] + len(self._pack(len(self._ends) - 1)))
        return self._ends[epoch]

    def _pack(self, epoch: int) -> Packing:
        import numpy as np

        if self._packed is None or self._packed[0] != epoch:
            numbers = np.concatenate([self._chosen(which, epoch) for which in range(len(self.sets))])
            # Mixed, not added: seed 1 of epoch 2 must not be seed 2 of epoch 1.
            seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
            packed = pack(self.fit.positions[numbers], self.seq_length, seed)
            members = numbers[packed.members]
            self._packed = epoch, Packing(packed.seq_length, members, packed.starts, packed.positions)
        return self._packed[1]

    def _chosen(self, which: int, epoch: int) -> Any:
        """Return the numbers of a set's conversations in an epoch: all of them as often as its weight says.

        The rest of a weight that is no whole number is a window of the set in random order, which goes on from epoch to
        epoch: all conversations are seen equally often in the end.
        """
        import numpy as np

        count, start, weight = len(self.sets[which]), self.chats.starts[which], self.weights[which]
        whole = math.floor(weight)
        # Rounded from the epoch's number, not summed up, so that no epoch depends on those before it.
        begin, end = (round(each * (weight - whole) * count) for each in (epoch, epoch + 1))
        parts = [np.tile(np.arange(count), whole)]
        if end > begin:
            # The same order in every epoch: the window goes on where the last one ended.
            order = np.random.RandomState(self.seed % 2**32).permutation(count)
            parts.append(order[np.arange(begin, end) % count])
        return start + np.concatenate(parts)


def check_any_fits(fit: Fit, prefix: str) -> None:
    """Refuse a set of which nothing is left in sequences of some length.

    Raises:
        CptError: It is so.
    """
    if not fit.positions.any():
        raise CptError(
            f"None of the {len(fit.positions)} conversations of {prefix} fits into {fit.seq_length} positions: there "
            "is nothing to measure."
        )


def sequences_of(chats: ConversationSet, seq_length: int, too_long: str = "drop") -> tuple[Packing, Fit]:
    """Return a whole set's packing, always the same: what a validation goes through once."""
    fit = chats.fit(seq_length, too_long)
    return pack(fit.positions, seq_length), fit
