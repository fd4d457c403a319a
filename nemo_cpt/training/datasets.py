"""Megatron's GPTDataset over tokenized prefixes: what training, validation and evaluation read."""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset

TRAIN, VALIDATION = 0, 1


def gpt_dataset(
    weights: Mapping[str, float], samples: int, split: int, *, path_to_cache: str | None = None, **config: Any
) -> MegatronDataset:
    """Build a dataset of at least `samples` sequences from a weighted blend of Megatron prefixes.

    Args:
        weights: weight of each prefix (without `.bin`, `.idx`); they need not sum to 1.
        samples: sequences wanted; the documents are gone through as often as that takes.
        split: `TRAIN` or `VALIDATION`; takes part in the name of Megatron's index cache only.
        path_to_cache: folder of Megatron's index cache; beside the data when None.
        **config: further fields of `GPTDatasetConfig` (random_seed, sequence_length, tokenizer, …).

    Returns:
        A dataset of dicts: tokens, labels, loss_mask and position_ids of shape [sequence_length].
    """
    if _builds_the_indices():
        for prefix in weights:
            _drop_torn_indices(Path(path_to_cache) if path_to_cache else Path(prefix, "cache"))
    blends: list[Any] = [None, None, None]
    blends[split] = (list(weights), list(weights.values()) if len(weights) > 1 else None)
    sizes = [samples if index == split else 0 for index in range(3)]
    full_config = GPTDatasetConfig(blend_per_split=blends, path_to_cache=path_to_cache, **config)
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, full_config).build()[split]


class FirstSamples(Sequence[dict[str, Any]]):
    """The first `count` sequences of each of several datasets, one dataset after the other."""

    def __init__(self, datasets: Sequence[MegatronDataset], count: int):
        self.datasets = datasets
        self.starts = list(itertools.accumulate([count] * len(datasets), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: Any) -> Any:
        which = bisect.bisect_right(self.starts, index) - 1
        return self.datasets[which][index - self.starts[which]]


def _builds_the_indices() -> bool:
    """Whether this process is the one that writes them, while Megatron lets the others wait."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _drop_torn_indices(cache: Path) -> None:
    """Remove index files that a killed run left half-written: Megatron takes any file that exists for a whole one."""
    for path in cache.glob("**/*.npy"):
        try:
            numpy.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError):
            path.unlink(missing_ok=True)
