"""The data module of instruction tuning: whole conversations, packed, that do not see each other.

A sequence holds several conversations. On a GPU Transformer Engine is told where each begins (`cu_seqlens`), and
neither attends nor rotates positions across; the sequences of a micro batch become one. Megatron's plain attention,
which the CPU stack has, gets a block-diagonal mask instead.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from nemo.utils.get_rank import is_global_rank_zero
from torch.utils.data import Dataset

from nemo_cpt.conversations.dataset import conversations_prefix, lay_out, open_conversations
from nemo_cpt.conversations.mixture import (
    SEED,
    Conversations,
    TrainingSequences,
    check_replay,
    other_than_replay,
    sequences_of,
)
from nemo_cpt.corpus import Blend
from nemo_cpt.errors import CptError
from nemo_cpt.training.data import NamedSetsDataModule, blend_of, weights_of, whole_batches
from nemo_cpt.training.datasets import TRAIN, VALIDATION, FirstSamples

FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


class ConversationDataModule(NamedSetsDataModule):
    """Trains on packed conversations, perhaps with a share of pretraining text, and validates on named sets.

    An epoch goes through every conversation as often as its set's weight says, each epoch in another order; the order
    follows from the seed, so that a run which is resumed goes on where it was. A validation goes through each set of
    conversations once, and through no more than `trainer.limit_val_batches` global batches of it; the last one is
    filled up with empty sequences. Of each validation set of the replay it takes just as many global batches.

    Args:
        paths: weights and prefixes of the training sets in turn, as in `Conversations.train`.
        validation: prefix of each named validation set, as in `Conversations.validation`.
        too_long: `drop` or `cut`, as in `Conversations.too_long`.
        replay_paths: weights and prefixes of prepared texts to mix in, as in `Blend.train`.
        replay_validation: prefix of each of their named validation sets.
        replay_weighting: as in `Blend.weighting`.
        replay_share: share of the sequences that are such text.
        epochs: given where `trainer.max_steps` could not be counted from them, because the data were not there: the
            job does not begin with another number of steps than they take.
        seed: of the order.
        **kwargs: see NeMo's `PreTrainingDataModule` (seq_length, micro_batch_size, global_batch_size, tokenizer, …).

    Raises:
        CptError: a set is missing or damaged, a weight is not positive, two sets have different templates or one name,
            or the replay's share does not fit its data.
    """

    template: dict[str, Any]

    def __init__(
        self,
        paths: list[Any],
        validation: Optional[dict[str, str]] = None,  # noqa: UP045  NeMo-Run cannot parse `| None`
        too_long: str = "drop",
        replay_paths: Optional[list[Any]] = None,  # noqa: UP045
        replay_validation: Optional[dict[str, str]] = None,  # noqa: UP045
        replay_weighting: str = "share",
        replay_share: float = 0.0,
        epochs: Optional[float] = None,  # noqa: UP045
        seed: int = SEED,
        **kwargs: Any,
    ):
        self.conversations = Conversations(weights_of(paths), dict(validation or {}), too_long)
        self.replay = blend_of(replay_paths, replay_validation, replay_weighting) if replay_paths else None
        check(self.conversations, self.replay, replay_share)
        self.too_long, self.replay_share, self.epochs = too_long, replay_share, epochs
        self.template = self.conversations.template
        # By full prefix, under which manifests, records and reports know a set.
        chats = {conversations_prefix(prefix): weight for prefix, weight in self.conversations.train.items()}
        texts = self.replay.shares() if self.replay else {}
        self.training_sets = chats | {prefix: share * replay_share for prefix, share in texts.items()}
        self.validation_sets = self._conversation_sets() | (self.replay.validation_paths() if self.replay else {})
        # NeMo's own `paths` are only looked at for their form: `build` does not use them.
        super().__init__(paths=list(chats), seed=seed, **kwargs)

    @property
    def training_texts(self) -> Any:
        """The replayed text; None without any."""
        return self._train_ds.texts

    def _conversation_sets(self) -> dict[str, str]:
        return {name: conversations_prefix(prefix) for name, prefix in self.conversations.validation.items()}

    def setup(self, stage: str = "") -> None:
        """Check the parallel layout, and build the datasets.

        Raises:
            CptError: packed conversations cannot be cut as the layout asks; see `check_layout`.
        """
        strategy = self.trainer.strategy
        # Here and not in __init__: only with the strategy is the layout known.
        check_layout(
            strategy.context_parallel_size,
            strategy.pipeline_model_parallel_size,
            1 if self.create_attention_mask else self.micro_batch_size,
        )
        super().setup(stage)

    def build(
        self,
        trainer_max_steps: int,
        trainer_val_check_interval: int,
        trainer_limit_val_batches: int | float,
        trainer_limit_test_batches: int | float,
    ) -> None:
        """Build training's sequences for `max_steps` global batches, and every validation set."""
        del trainer_val_check_interval, trainer_limit_test_batches
        self._check_epochs(trainer_max_steps)
        samples = trainer_max_steps * self.global_batch_size
        # Counted, not rounded from the share: each index below `samples` must find its text.
        replayed = samples - other_than_replay(samples, self.replay_share)
        texts = self._text(self.replay.shares(), replayed, TRAIN) if self.replay and replayed else None
        order = TrainingSequences(self.conversations, self.seq_length, self.seed)
        for sentence in order.left_out() if is_global_rank_zero() else []:
            print(f"nemo_cpt: warning: {sentence}", file=sys.stderr, flush=True)
        self._train_ds = _Training(order, samples, texts, self.replay_share, self.create_attention_mask)
        self._validation_ds = self._build_validation(whole_batches(trainer_limit_val_batches))
        self._test_ds = None

    def _check_epochs(self, max_steps: int) -> None:
        if self.epochs is None:
            return
        sizes = (self.global_batch_size, self.seq_length, self.replay_share, self.seed)
        steps = self.conversations.steps(self.epochs, *sizes)
        if steps != max_steps:
            raise CptError(
                f"the recipe was made where its conversations are not, and {self.epochs:g} epochs of them are {steps} "
                f"steps, not {max_steps}: give the recipe max_steps={steps}, or launch it with `nemo-cpt run`, which "
                "makes it in the job"
            )

    def _build_validation(self, most: int) -> "_Validation | None":
        parts: list[tuple[Any, int]] = []
        self.validation_weights = {}
        for name, prefix in self._conversation_sets().items():
            chats = _OneSet(prefix, self.seq_length, self.too_long)
            if not len(chats):
                raise CptError(
                    f"no conversation of the validation set {name!r} ({prefix}) fits into a sequence of "
                    f"{self.seq_length} positions: take a larger seq_length, or data's too_long: cut"
                )
            batches = min(most, math.ceil(len(chats) / self.global_batch_size))
            starts = range(0, batches * self.global_batch_size, self.global_batch_size)
            # A batch weighs what it has of trained tokens: the last one is mostly padding, and an equal share would
            # distort the mean.
            self.validation_weights[name] = [chats.trained(start, self.global_batch_size) for start in starts]
            parts.append((chats, batches * self.global_batch_size))
        for name, prefix in (self.replay.validation_paths() if self.replay else {}).items():
            # Texts fill every sequence, so that all their batches weigh the same.
            self.validation_weights[name] = [1.0] * most
            count = most * self.global_batch_size
            parts.append((self._text({prefix: 1.0}, count, VALIDATION) if count else [], count))
        return _Validation(FirstSamples(parts), self.create_attention_mask) if parts and most else None


def parts_of(config: Any) -> tuple[Conversations, Blend | None, float]:
    """Conversations, replayed text and its share, of the run.Config of a `ConversationDataModule`.

    Raises:
        CptError: paths are no list of a weight and a prefix in turn.
    """
    chats = Conversations(weights_of(config.paths), config.validation or {}, config.too_long)
    paths, validation, weighting = config.replay_paths, config.replay_validation, config.replay_weighting
    return chats, blend_of(paths, validation, weighting) if paths else None, config.replay_share


def check(conversations: Conversations, replay: Blend | None, replay_share: float) -> None:
    """Check what a data module of conversations reads.

    Raises:
        CptError: a file is missing or damaged, the replay's share does not fit its data, or a name stands for two sets.
    """
    conversations.check()
    check_replay(replay, replay_share, conversations)
    if replay is not None:
        replay.check()


def check_layout(context_parallel_size: int, pipeline_model_parallel_size: int, micro_batch_size: int) -> None:
    """Refuse a layout that packed conversations cannot be cut to.

    Raises:
        CptError: a conversation would be cut between GPUs, or pipeline stages would expect another shape.
    """
    if context_parallel_size > 1:
        raise CptError(
            f"context_parallel_size is {context_parallel_size}: packed conversations are not cut between GPUs. Take 1, "
            "with tensor_model_parallel_size and recomputation for long sequences"
        )
    if pipeline_model_parallel_size > 1 and micro_batch_size > 1:
        raise CptError(
            f"micro_batch_size is {micro_batch_size} with pipeline_model_parallel_size {pipeline_model_parallel_size}: "
            "packed sequences of a micro batch become one, which the next stage does not expect. Take micro_batch_size "
            "1 and a larger seq_length, which holds more conversations"
        )


class _Packed(Dataset):
    """Sequences of conversations that become micro batches."""

    def __init__(self, block_mask: bool) -> None:
        self.block_mask = block_mask

    def collate_fn(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A micro batch, with a mask or with the stretches' starts."""
        return (with_block_mask if self.block_mask else as_one_sequence)(samples)


class _Training(_Packed):
    """Conversations, among them other text, evenly spread: its share of the first n sequences is right for every n."""

    def __init__(
        self, order: TrainingSequences, samples: int, texts: Any, replay_share: float, block_mask: bool
    ) -> None:
        super().__init__(block_mask)
        self.order, self.samples, self.texts, self.replay_share = order, samples, texts, replay_share

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        # How many of the first `index` sequences are conversations: the count rises exactly where the next one is.
        before, after = (other_than_replay(each, self.replay_share) for each in (index, index + 1))
        return self.order[before] if after > before else self.texts[index - before]


class _Validation(_Packed):
    """Validation sets, one after the other."""

    def __init__(self, samples: FirstSamples, block_mask: bool) -> None:
        super().__init__(block_mask)
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.samples[index]


class _OneSet(Sequence[dict[str, Any]]):
    """A set's sequences, always the same; behind the last one empty ones, without end."""

    def __init__(self, prefix: str, seq_length: int, too_long: str) -> None:
        self.chats = open_conversations(prefix)
        self.packing, self.fit = sequences_of(self.chats, seq_length, too_long)

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: Any) -> Any:
        # Empty ones have no trained token, and so no part in the loss.
        return lay_out(self.chats, self.packing[index] if index < len(self.packing) else [], self.fit)

    def trained(self, start: int, count: int) -> float:
        """Trained tokens in `count` sequences."""
        return float(sum(self[index]["loss_mask"].sum() for index in range(start, start + count)))


def with_block_mask(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A micro batch for Megatron's plain attention.

    Returns:
        `tokens`, `labels`, `loss_mask` and `position_ids` of shape [samples, length], and `attention_mask`, bool of
        shape [samples, 1, length, length]: True where a position may not look.
    """
    batch = {name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]) for name in FIELDS}
    length = batch["tokens"].shape[1]
    # Which conversation each position belongs to, by number.
    stretches = torch.stack([torch.repeat_interleave(_starts(sample).diff(), output_size=length) for sample in samples])
    # [samples, query, key]: a position may look only within its own conversation, and not ahead.
    others = stretches[:, :, None] != stretches[:, None, :]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return batch | {"attention_mask": (others | later)[:, None]}


def as_one_sequence(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A micro batch for Transformer Engine's attention, its sequences one behind the other.

    Returns:
        `tokens`, `labels`, `loss_mask` and `position_ids` of shape [1, samples x length]; `cu_seqlens`, int32 of shape
        [1, stretches + 1]: where each stretch begins, and the end; `cu_seqlens_argmin` and `max_seqlen`, by which
        NeMo's `get_packed_seq_params` knows how many they are, and the longest.
    """
    batch = {name: torch.cat([torch.as_tensor(sample[name]) for sample in samples])[None] for name in FIELDS}
    length = batch["tokens"].shape[1] // len(samples)
    # Without each sequence's end, which is where the next one begins.
    starts = [_starts(sample)[:-1] + number * length for number, sample in enumerate(samples)]
    cu_seqlens = torch.cat([*starts, torch.tensor([len(samples) * length])]).int()
    return batch | {
        "cu_seqlens": cu_seqlens[None],
        # NeMo expects the array padded with -1 and looks for the first; there is no padding here, so it is the length.
        "cu_seqlens_argmin": torch.tensor(len(cu_seqlens)),
        "max_seqlen": cu_seqlens.diff().max(),
    }


def _starts(sample: Mapping[str, Any]) -> torch.Tensor:
    """Where each stretch of a sequence begins, and its end; a sequence of other text is one stretch."""
    if "cu_seqlens" in sample:
        return torch.as_tensor(sample["cu_seqlens"])
    return torch.tensor([0, len(sample["tokens"])])
