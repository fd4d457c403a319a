"""Whether a grown tokenizer pays: text costs fewer tokens, each token a little more, and new rows must be learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_cpt.arguments import checked
from nemo_cpt.corpus.reading.sources import Inputs
from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer
from nemo_cpt.errors import CptError
from nemo_cpt.records import AsDict
from nemo_cpt.vocabulary.byte_level import grew_from, read_byte_level
from nemo_cpt.vocabulary.comparison import SAMPLE_BYTES
from nemo_cpt.vocabulary.growing import few_at_a_time
from nemo_cpt.vocabulary.samples import draw

TRAINING_BYTES = 18  # a parameter: bf16 weight, fp32 gradient, fp32 master weight and two moments
SERVING_BYTES = 2
SELDOM = 1000  # times that a row is seen in the training, below which it is hardly learnt


@dataclass(frozen=True)
class Worth(AsDict):
    """What a grown tokenizer buys and costs.

    Attributes:
        tokens_before: of the training's text, with the base's tokenizer.
        tokens: of the same text, grown.
        tokens_saved: share of them; serving the same text saves the same share of steps.
        new_tokens: ids that the base has not.
        new_rows: of the embedding, for those of them that the model has no spare row for.
        parameters: of the model before.
        new_parameters: in the embedding, and in an output layer of its own.
        dearer_token: by how much a token costs more operations, those of the larger output layer.
        compute_saved: share of the training's operations, the dearer tokens counted.
        training_gib: of the new parameters with their gradients and Adam's states, over all GPUs.
        serving_gib: of the new parameters in bf16.
        break_even_tokens: that the saved operations would train: the growth pays in this training if the grown model,
            continued on so many tokens more, makes up for what its new rows had to learn.
        pays_back_each: what serving saves later, tokens for a million characters of such text.
        seldom: share of the new tokens that the training sees fewer than 1,000 times.
    """

    tokens_before: int
    tokens: int
    tokens_saved: float
    new_tokens: int
    new_rows: int
    parameters: int
    new_parameters: int
    dearer_token: float
    compute_saved: float
    training_gib: float
    serving_gib: float
    break_even_tokens: int
    pays_back_each: int
    seldom: float


@checked
def worth(
    base: str,
    grown: str,
    inputs: Inputs,
    *,
    tokens: float,
    parameters: float,
    hidden_size: int,
    tied: bool,
    model_rows: int | None = None,
    json_key: str = "text",
    sample_bytes: float = SAMPLE_BYTES,
) -> Worth:
    """Work out what a grown tokenizer saves in a training on such text, and what it costs.

    Operations are counted as 6 for each parameter and token, in which an embedding that is only looked up has no part;
    what the model loses until its new rows are learnt, no formula says: compare bits per byte of a short run.

    Args:
        base: the tokenizer that it grew from.
        grown: the grown one.
        inputs: text like the training's, whole: with the share of other languages that is replayed.
        tokens: of the training, with the base's tokenizer.
        parameters: of the model.
        hidden_size: of the model.
        tied: whether its output layer is the embedding.
        model_rows: of the model's embedding, spare ones included; one for each token of `base` when None.
        json_key: the field that holds the text.
        sample_bytes: of the inputs that are encoded at most.

    Raises:
        CptError: the one did not grow from the other, or a number is not above 0.
    """
    for name, value in (("tokens", tokens), ("parameters", parameters), ("hidden_size", hidden_size)):
        if not 0 < value < float("inf"):
            raise CptError(f"{name} is {value}; it must be above 0")
    old, new = read_byte_level(base), read_byte_level(grown)
    if reason := grew_from(new, old):
        raise CptError(f"the tokenizer {grown} did not grow from {base}: {reason}")
    if new.size == old.size:
        raise CptError(f"the tokenizer {grown} has no token that {base} has not")
    texts = draw(inputs, json_key, sample_bytes, hold_out=False).texts
    before, after = (_encoded(each, texts) for each in (base, grown))
    seen = Counter(number for number in after.tolist() if number >= old.size)
    # Each document has a token at its end, which no growth saves.
    length_before, length = (len(each) + len(texts) for each in (before, after))
    scale, new_tokens = tokens / length_before, new.size - old.size
    seldom = sum(seen[number] * scale < SELDOM for number in range(old.size, new.size))
    there = old.size if model_rows is None else model_rows
    new_rows = max(new.size - there, 0)
    outputs = new_rows * hidden_size
    # A tied embedding is multiplied with, as the output layer; one of its own is only looked up.
    computed = parameters - (0 if tied else there * hidden_size)
    dearer = outputs / computed
    # Fewer tokens, each of which costs a little more.
    compute = length / length_before * (1 + dearer)
    new_parameters = outputs * (1 if tied else 2)
    return Worth(
        tokens_before=round(tokens),
        tokens=round(length * scale),
        tokens_saved=round(1 - length / length_before, 4),
        new_tokens=new_tokens,
        new_rows=new_rows,
        parameters=round(parameters),
        new_parameters=new_parameters,
        dearer_token=round(dearer, 5),
        compute_saved=round(1 - compute, 4),
        training_gib=round(new_parameters * TRAINING_BYTES / 2**30, 5),
        serving_gib=round(new_parameters * SERVING_BYTES / 2**30, 5),
        break_even_tokens=max(round((1 - compute) * tokens / (1 + dearer)), 0),
        pays_back_each=round((len(before) - len(after)) / sum(map(len, texts)) * 1e6),
        seldom=round(seldom / new_tokens, 4),
    )


def _encoded(tokenizer: str, texts: Sequence[str]) -> Any:
    """The ids of all texts."""
    import numpy as np

    encoder = load_tokenizer(tokenizer).reference_encoder()
    return np.concatenate([encoder.encode(batch)[0] for batch in few_at_a_time(texts)])
