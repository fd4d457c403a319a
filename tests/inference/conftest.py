"""Small random models of several shapes with a real byte-level tokenizer, in Hugging Face folders."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_theta": 500_000.0}),
    "mistral_window": (MistralConfig, MistralForCausalLM, {"sliding_window": 12}),
    "long_context": (LlamaConfig, LlamaForCausalLM, {"max_position_embeddings": 65_536, "eos_token_id": None}),
    "qwen2_tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {}),
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Trained on the packaged Japanese and English, so that characters fall apart into several tokens."""
    texts = [(files("nemo_cpt.demo") / "corpus" / f"{name}.jsonl").read_text("utf-8") for name in ("ja", "en")]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<end>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    trained.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """Folders by shape; made once."""
    made: dict[str, Path] = {}

    def make(shape: str) -> Path:
        if shape not in made:
            config_class, model_class, extra = SHAPES[shape]
            torch.manual_seed(7)
            network = model_class(
                config_class(
                    vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, bos_token_id=0,
                    **{"max_position_embeddings": 256, "eos_token_id": [1, 2]} | extra,
                )
            )  # fmt: skip
            for parameter in network.parameters():  # far from ties, so that rounding cannot change a greedy reply
                if parameter.dim() > 1:
                    parameter.data.normal_(std=0.4)
            made[shape] = tmp_path_factory.mktemp("model") / shape
            network.save_pretrained(made[shape])
            tokenizer.save_pretrained(made[shape])
        return made[shape]

    return make
