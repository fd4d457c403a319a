"""Small random models of every supported shape, made by transformers itself, each with a real tokenizer."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 250
MORE_ROWS = 300  # than tokens, as in Qwen2.5 and in models padded for tensor parallelism
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": [2, 3, 4],
}


def _llama3_rope(factor: float) -> dict[str, float | str]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }


SHAPES = {
    "llama2": (LlamaConfig, {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}, torch.float16),
    "llama3": (LlamaConfig, {"rope_theta": 500000.0, "rms_norm_eps": 1e-5}, torch.bfloat16),
    "llama31": (LlamaConfig, {"rope_theta": 500000.0, "rope_scaling": _llama3_rope(8.0)}, torch.bfloat16),
    "llama32": (
        LlamaConfig,
        {"rope_theta": 500000.0, "rope_scaling": _llama3_rope(32.0), "tie_word_embeddings": True, "head_dim": 16},
        torch.bfloat16,
    ),
    "linear_rope": (LlamaConfig, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, torch.float32),
    "smollm2": (
        LlamaConfig,
        {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 100000.0},
        torch.bfloat16,
    ),
    "mistral": (MistralConfig, {"head_dim": 16, "sliding_window": None, "rope_theta": 1e6}, torch.bfloat16),
    "mistral_window": (MistralConfig, {"sliding_window": 8}, torch.bfloat16),
    "qwen2": (Qwen2Config, {"rope_theta": 1e6}, torch.bfloat16),
    "qwen25": (Qwen2Config, {"rope_theta": 1e6, "tie_word_embeddings": True}, torch.float32),
    "qwen3": (Qwen3Config, {"rope_theta": 1e6, "head_dim": 16}, torch.bfloat16),
    "gpt2": (
        GPT2Config,
        {"n_inner": 80, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True},
        torch.float32,
    ),
    "qwen3_tied": (Qwen3Config, {"rope_theta": 1e6, "head_dim": 20, "tie_word_embeddings": True}, torch.bfloat16),
}
_CLASSES = {
    GPT2Config: GPT2LMHeadModel,
    LlamaConfig: LlamaForCausalLM,
    MistralConfig: MistralForCausalLM,
    Qwen2Config: Qwen2ForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
}


def make(shape: str, folder: Path, seed: int = 0, **changes) -> Path:
    """Save a random model of a shape, in shards, with tokenizer and generation settings; returns the folder."""
    config_class, settings, dtype = SHAPES[shape]
    config = config_class(**{**_SIZES, **settings, **changes})
    torch.manual_seed(seed)
    model = _CLASSES[config_class](config)
    _randomise(model)
    model = model.to(dtype)
    model.generation_config.update(temperature=0.6, do_sample=True, top_p=0.9)
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer().save_pretrained(folder)
    return folder


def describe(shape: str, folder: Path, **changes) -> Path:
    """A NeMo base of a shape as an import would write it, without its weights: only what it says of itself."""
    from nemo_cpt.checkpoint.architecture import read_architecture
    from nemo_cpt.checkpoint.context import write_context
    from nemo_cpt.checkpoint.folders import copy_small_files

    config_class, settings, _ = SHAPES[shape]
    config_class(**{**_SIZES, **settings, **changes}, dtype="bfloat16").save_pretrained(folder / "hf")
    tokenizer().save_pretrained(folder / "hf")
    base = folder / "base"
    for part in ("weights", "context"):
        (base / part).mkdir(parents=True)
    (base / "weights" / "metadata.json").write_text("{}")
    write_context(base / "context", read_architecture(folder / "hf"), folder / "hf")
    copy_small_files(folder / "hf", base / "hf")
    return base


def _randomise(model: PreTrainedModel) -> None:
    """Norms start as ones and biases as zeros, which would hide a mix-up."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, -1.0, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.08)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCAB` words."""
    words = {f"t{i}": i for i in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="t1", eos_token="t2", unk_token="t0")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_weights(one: Path, other: Path) -> None:
    """Both folders hold the same names, dtypes, shapes and bits."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
