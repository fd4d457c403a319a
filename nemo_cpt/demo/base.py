"""The demo's base: a tokenizer of both languages, and a small Llama-3.1-shaped model that has read English only."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
# How Llama 3 cuts a text before it merges bytes (the pattern of its tokenizer.json).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the Llama-3 kind, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        # All 256 bytes, also those that the corpus lacks: no text may have an unknown token.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def pretrain(
    texts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    dest: Path,
    *,
    steps: int,
    progress: Callable[[int, float], None],
    seq_length: int = 128,
    batch_size: int = 16,
    lr: float = 2e-3,
    seed: int = 1234,
) -> None:
    """Train the base on `texts` with plain PyTorch and save it in the Hugging Face format, as any base comes.

    Args:
        texts: one string a document.
        tokenizer: its tokenizer; saved beside the model.
        dest: folder to write.
        steps: steps of `batch_size` sequences.
        progress: called after each step with the step's number and its loss in nats per token.
        seq_length: tokens of a sequence.
        batch_size: sequences of a step.
        lr: peak learning rate, reached after a tenth of the steps; a cosine leads up to it and down from it.
        seed: of initial weights and order.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1, final_div_factor=10)
    # English alone: that it forgets English without replay is what the demo is to show.
    batches = _batches(texts, tokenizer, seq_length, batch_size, seed)
    for step in range(1, steps + 1):
        tokens = next(batches)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step, loss.item())
    model.save_pretrained(dest)
    tokenizer.save_pretrained(dest)


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The shape of `nemo_cpt.recipes.tiny.model`, with Llama 3.1's rope."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=131072,
        rope_theta=500_000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _batches(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, seq_length: int, batch_size: int, seed: int
) -> Iterator[torch.Tensor]:
    """Batches [batch_size, seq_length] of token ids from random places of the documents, laid end to end."""
    # As `prepare` lays out documents: an EOS behind each, no BOS before it.
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]
    stream = torch.tensor([token for document in ids for token in document])
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(stream) - seq_length, (batch_size,), generator=generator)
        yield torch.stack([stream[start : start + seq_length] for start in starts])
