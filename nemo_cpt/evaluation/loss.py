"""The loss of a Hugging Face model on tokenized text, on the very sequences that a run validates on."""

import os
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_cpt.corpus import full_prefix
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
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
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
    losses = []
    for start in range(0, samples, batch_size):
        batch = [dataset[index] for index in range(start, min(start + batch_size, samples))]
        logits = network(input_ids=torch.stack([sample["tokens"] for sample in batch])).logits.float()
        labels = torch.stack([sample["labels"] for sample in batch])
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none"))
    return torch.cat(losses).mean().item()
