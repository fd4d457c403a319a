"""Megatron datasets of a few documents, and their sequences computed from nothing but these documents."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from nemo_cpt.training.datasets import TRAIN, gpt_dataset

SEQ_LENGTH, EOS, ORDINARY = 16, 2, 7


def documents(seed: int, count: int = 20, vocabulary: int = 50) -> list[list[int]]:
    """Documents of 1 to 40 tokens, each with EOS at its end."""
    chosen = random.Random(seed)
    return [[chosen.randrange(3, vocabulary) for _ in range(chosen.randrange(40))] + [EOS] for _ in range(count)]


def write(prefix: Path, texts: list[list[int]]) -> str:
    """Write PREFIX.bin and PREFIX.idx, over what is there."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for text in texts:
        builder.add_document(torch.IntTensor(text), [len(text)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def dataset(*prefixes: str, samples: int = 40, pad: int | None = None, split: int = TRAIN, **options: Any) -> Any:
    """`gpt_dataset` of equal shares, with a tokenizer that pads with `pad`."""
    tokenizer = SimpleNamespace(eod=EOS, pad=pad, unique_identifiers={"class": "test"})
    config = {"reset_position_ids": False, "reset_attention_mask": False, "create_attention_mask": False}
    return gpt_dataset(
        dict.fromkeys(prefixes, 1.0), samples, split, random_seed=1, sequence_length=SEQ_LENGTH, tokenizer=tokenizer,
        eod_mask_loss=False, **config, **options,
    )  # fmt: skip


def expected(built: Any, texts: list[list[int]]) -> list[list[int]]:
    """Every sequence of a dataset of one prefix, with the token behind it, cut from its documents in its order."""
    stream = [token for document in built.document_index for token in texts[document]]
    starts = [int(index) * SEQ_LENGTH for index in built.shuffle_index]
    return [stream[start : start + SEQ_LENGTH + 1] for start in starts]


def sequences(built: Any) -> list[list[int]]:
    """Every sequence of a dataset, with the token behind it, as training reads it."""
    samples = [built[index] for index in range(len(built))]
    return [[*sample["tokens"].tolist(), int(sample["labels"][-1])] for sample in samples]
