"""Megatron's GPTDataset over tokenized prefixes: what training, validation and evaluation read."""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset

from nemo_cpt.training import patches

TRAIN, VALIDATION = 0, 1

patches.mend_datasets()  # not only in the job's callbacks: Lightning builds the data before it calls them


def gpt_dataset(
    weights: Mapping[str, float], samples: int, split: int, *, path_to_cache: str | None = None, **config: Any
) -> MegatronDataset:
    """Build a dataset of at least `samples` sequences from a weighted blend of Megatron prefixes.

    Args:
        weights: weight of each prefix (without `.bin`, `.idx`); they need not sum to 1.
        samples: sequences wanted; the documents are gone through as often as that takes.
        split: `TRAIN` or `VALIDATION`; tells apart what is kept in the index cache only.
        path_to_cache: folder of the index cache, see `nemo_cpt.training.index_cache`: beside the data when None, and
            none when empty.
        **config: further fields of `GPTDatasetConfig` (random_seed, sequence_length, tokenizer, …).

    Returns:
        A dataset of dicts: tokens, labels, loss_mask and position_ids of shape [sequence_length].
    """
    blends: list[Any] = [None, None, None]
    # None for a single one: with a weight, Megatron would put a BlendedDataset around it, which takes 0.5 % more
    # samples.
    blends[split] = (list(weights), list(weights.values()) if len(weights) > 1 else None)
    sizes = [samples if index == split else 0 for index in range(3)]
    full_config = GPTDatasetConfig(blend_per_split=blends, path_to_cache=path_to_cache, **config)
    # `lambda: True`: every rank builds. The index cache makes that cheap, and no rank waits for another.
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, full_config).build()[split]


def in_another_order(dataset: Any, share: float) -> list[str]:
    """Prefixes of a dataset whose sequences would come in another order if a part of them had been asked for.

    Args:
        dataset: as `gpt_dataset` builds it.
        share: the part; above 1 for more of them.
    """
    parts = getattr(dataset, "datasets", [dataset])
    return [
        each.dataset.path_prefix
        for each in parts
        if _passes(each, each.num_samples) != _passes(each, round(each.num_samples * share))
    ]


def _passes(dataset: GPTDataset, samples: int) -> tuple[int, bool]:
    """By what Megatron draws an order (`GPTDataset._build_document_sample_shuffle_indices`, core_v0.15.3).

    Returns:
        The passes over the documents, and whether the last one is shuffled by itself: where it is short enough.
    """
    tokens, length = dataset._get_num_tokens_per_epoch(), dataset.config.sequence_length
    label = int(dataset.config.add_extra_token_to_sequence)  # of the last sequence
    passes = max(math.ceil((samples * length + label) / tokens), 1)
    of_the_last = samples - ((passes - 1) * tokens - label) // length
    return passes, passes > 1 and of_the_last < int(0.8 * ((tokens - label) // length))


class FirstSamples(Sequence[dict[str, Any]]):
    """The first sequences of each of several datasets, one dataset after the other.

    Args:
        parts: each dataset, and how many of its sequences.
    """

    def __init__(self, parts: Sequence[tuple[Any, int]]):
        self.datasets = [dataset for dataset, _ in parts]
        self.starts = list(itertools.accumulate((count for _, count in parts), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: Any) -> Any:
        # `right`: an index that begins a part belongs to it.
        which = bisect.bisect_right(self.starts, index) - 1
        return self.datasets[which][index - self.starts[which]]
