"""The loss of a Hugging Face model on tokenized text, on the very sequences that a run validates on."""

import os
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_cpt.checkpoint.transformers_config import transformers_config
from nemo_cpt.compatibility import END_OF_TEXT, check_data, check_largest_id, read_base
from nemo_cpt.corpus import full_prefix
from nemo_cpt.errors import CptError
from nemo_cpt.training.datasets import VALIDATION, gpt_dataset

DATA_SEED = 1234  # PreTrainingDataModule's default, so that the order is the training job's


@torch.inference_mode()
def language_model_loss(
    model: str | os.PathLike[str], prefix: str, *, seq_length: int, samples: int, batch_size: int = 8
) -> float:
    """Mean cross-entropy of next-token prediction, in nats per token, in the precision of the weights.

    Args:
        model: folder or hub name of a Hugging Face causal language model with its tokenizer.
        prefix: Megatron prefix of the tokenized text, as `prepare` wrote it.
        seq_length: tokens predicted in each sequence.
        samples: sequences to read; the text is repeated when it is shorter.
        batch_size: sequences of one forward pass.

    Returns:
        The loss; `math.exp` of it is the perplexity.

    Raises:
        CptError: the text was tokenized for another model, or a number is not positive.
    """
    if min(seq_length, samples, batch_size) < 1:
        raise CptError(f"seq_length {seq_length}, samples {samples} and batch_size {batch_size} have to be 1 or more")
    if Path(model).is_dir():
        check_data(read_base(model), [prefix], unlike_base=[END_OF_TEXT])
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, config=transformers_config(model), dtype="auto").eval()
    dataset = gpt_dataset(
        {full_prefix(prefix): 1.0},
        samples,
        VALIDATION,
        random_seed=DATA_SEED,
        sequence_length=seq_length,
        path_to_cache="",
        tokenizer=SimpleNamespace(eod=tokenizer.eos_token_id, unique_identifiers={"class": "evaluation"}),
        reset_position_ids=False,
        create_attention_mask=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    rows, losses = network.get_input_embeddings().num_embeddings, []
    for start in range(0, samples, batch_size):
        batch = [dataset[index] for index in range(start, min(start + batch_size, samples))]
        tokens, labels = (torch.stack([sample[name] for sample in batch]) for name in ("tokens", "labels"))
        check_largest_id(int(torch.maximum(tokens, labels).max()), rows, prefix)
        logits = network(input_ids=tokens).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none"))
    return torch.cat(losses).mean().item()
