"""What a Hugging Face config.json says about the forward pass; everything it says is understood or refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_cpt.checkpoint.folders import require_model
from nemo_cpt.checkpoint.rope import Rope, RopeScaling, read_rope
from nemo_cpt.checkpoint.tokenizer_ids import end_ids
from nemo_cpt.errors import CptError

# Read below, and thereby carried into NeMo's config.
_TRANSLATED = {
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "tie_word_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "max_position_embeddings", "initializer_range", "torch_dtype", "dtype",
}  # fmt: skip

# What GPT-2's config.json calls otherwise than the other families' (attribute_map of transformers' GPT2Config, and two
# that it has no other name for).
_GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "rms_norm_eps",
}

# No effect on the forward pass: bookkeeping, special tokens' ids, settings of generation, of the cache and of outputs.
_NEUTRAL = {
    "transformers_version", "name_or_path", "use_cache",
    "cache_implementation", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
    "pretraining_tp", "is_llama_config", "transformers.js_config", "attn_implementation",
    "return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "torchscript", "use_bfloat16", "problem_type", "id2label", "label2id", "num_labels", "finetuning_task",
    "task_specific_params", "prefix", "tokenizer_class", "begin_suppress_tokens", "suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "decoder_start_token_id", "max_length",
    "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "exponential_decay_length_penalty",
    "remove_invalid_values", "chunk_size_feed_forward", "pruned_heads", "tf_legacy_loss", "unsloth_version",
    "unsloth_fixed", "max_window_layers", "n_ctx", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout",
}  # fmt: skip

# Of these, only the values for which Megatron's layers compute the same; null is what transformers takes for false.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "residual_dropout": (0, None),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False, None),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
    "is_decoder": (True, False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    # GPT-2's. Dropout is no part of a trained model, but transformers would train on with it, and NeMo here without.
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "attn_pdrop": (0,),
    "embd_pdrop": (0,),
    "resid_pdrop": (0,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
}

# What transformers assumes where config.json is silent (configuration_{llama,mistral,qwen2,qwen3,gpt2}.py, version
# 4.57).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "gpt2": {"max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
}
_COMMON_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False}
_CAUSAL_LM = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_WHOLE_NUMBERS = (*_REQUIRED, "max_position_embeddings", "num_key_value_heads", "head_dim", "sliding_window")
_NUMBERS = (*_WHOLE_NUMBERS, "rms_norm_eps")
# Null means: as many as query heads; hidden size by heads; no window. Of another number it means nothing.
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")


@dataclass(frozen=True)
class Architecture:
    """A decoder's shape and the constants of its forward pass, in the names of config.json.

    Attributes:
        qkv_bias: whether query, key and value have biases, as in Qwen2.
        qk_norm: whether each head's query and key are normalised before they are rotated, as in Qwen3.
    """

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    sliding_window: int | None
    initializer_range: float
    dtype: str | None

    @property
    def like_gpt2(self) -> bool:
        """Whether the layers are GPT-2's, and not Llama's: LayerNorm, whose epsilon `rms_norm_eps` then is, biases
        throughout, an MLP of a GELU without a gate, learnt positions, of which there are `max_position_embeddings`."""
        return self.model_type == "gpt2"

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value head."""
        # Whole: `_check_shape` refuses what does not divide.
        return self.num_attention_heads // self.num_key_value_heads

    def with_dtype(self, dtype: str) -> Architecture:
        """The same architecture in another dtype ("bfloat16", "float16", "float32")."""
        return replace(self, dtype=dtype)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; a missing file, broken JSON or another type is a CptError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CptError(f"{path} does not exist. Give the folder of a Hugging Face model.") from None
    except (OSError, ValueError) as error:
        raise CptError(f"{path} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise CptError(f"{path} holds a {type(value).__name__}, not a JSON object. Download it again.")
    return value


def read_architecture(folder: str | Path, ignore_fields: Collection[str] = ()) -> Architecture:
    """Read `folder`/config.json.

    Args:
        folder: a Hugging Face model folder.
        ignore_fields: names of config fields to accept although they are unknown here.

    Raises:
        CptError: there is no such folder, it holds adapters alone or a NeMo checkpoint, an unsupported `model_type`, a
            missing or impossible value, or a field that may change the forward pass in a way that NeMo's model would
            not follow.
    """
    require_model(folder)
    return read_carried(folder, ignore_fields)


def read_carried(folder: str | Path, ignore_fields: Collection[str] = ()) -> Architecture:
    """Like `read_architecture`, of the small files that a checkpoint carries, whatever lies beside config.json.

    An import of an older version carries its source's adapter_config.json.

    Raises:
        CptError: as `parse_config`, or there is no config.json.
    """
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), str(path), ignore_fields)


def parse_config(config: Mapping[str, Any], where: str, ignore_fields: Collection[str] = ()) -> Architecture:
    """Like `read_architecture`, from the parsed config; `where` names it in messages.

    Raises:
        CptError: as `read_architecture`.
    """
    model_type = str(config.get("model_type"))
    # First: every other message would be about fields that nobody here knows the meaning of.
    if model_type not in _DEFAULTS:
        raise CptError(
            f"{where}: model_type {model_type!r} is not supported; supported are {', '.join(_DEFAULTS)} "
            "(Llama 2 to 3.2, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3 and GPT-2)."
        )
    # Before the defaults are put in, so that only what the file says is judged.
    _refuse_unknown(config, where, ignore_fields)
    if model_type == "gpt2":
        config = _in_common_names(config)
    # Nulls stay nulls: `"sliding_window": null` is full attention, and not a default.
    config = {**_COMMON_DEFAULTS, **_DEFAULTS[model_type], **config}
    _check_values(config, where)
    rope = read_rope(config, where, ignore_fields)
    if rope.scaling and rope.scaling.kind == "llama3" and model_type != "llama":
        raise CptError(
            f"{where}: rope scaling of type 'llama3' is supported for model_type 'llama', not {model_type!r}: NeMo's "
            "model of it has no such scaling."
        )
    architecture = _translate(config, rope)
    _check_shape(architecture, where)
    return architecture


def _refuse_unknown(config: Mapping[str, Any], where: str, ignore_fields: Collection[str]) -> None:
    for name, value in config.items():
        common = _GPT2_NAMES.get(name, name) if config["model_type"] == "gpt2" else name
        known = common in _TRANSLATED or name in _NEUTRAL or name.startswith("_")  # _ is transformers' own bookkeeping
        if known or name in ignore_fields:
            continue
        if name in _FIXED:
            if any(value == allowed for allowed in _FIXED[name]):
                continue
        # An unknown field that is null asks for nothing.
        elif value is None or (name in _PECULIAR and _PECULIAR[name](value, config)):
            continue
        reason = "NeMo's model would not follow it" if name in _FIXED else "it may change the forward pass"
        raise CptError(
            f"{where}: field {name!r} with value {value!r} is refused because {reason}. "
            f"If you know that it does not matter, allow it with ignore_fields=[{name!r}] (--ignore-field {name})."
        )


def _in_common_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-2's config with the other families' names, and without what it has no use for."""
    common = {_GPT2_NAMES.get(name, name): value for name, value in config.items() if not name.startswith("rope_")}
    if common.get("intermediate_size") is None and isinstance(hidden := common.get("hidden_size"), int):
        common["intermediate_size"] = 4 * hidden
    return common | {"num_key_value_heads": None, "head_dim": None}


def own_name(name: str, model_type: str) -> str:
    """What a model's config.json calls a field of `Architecture`."""
    own = {common: name for name, common in _GPT2_NAMES.items()} if model_type == "gpt2" else {}
    return own.get(name, name)


def context_length(folder: str | Path) -> int | None:
    """The longest sequence by a folder's config.json; None where it does not say.

    Raises:
        CptError: it is no whole number above 0.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    length = config.get("max_position_embeddings", config.get("n_positions"))
    if length is not None and (type(length) is not int or length < 1):
        raise CptError(f"{path}: max_position_embeddings cannot be {length!r}. Download the file again.")
    return length


def _uniform_layers(value: Any, config: Mapping[str, Any]) -> bool:
    """Whether all layers attend alike, and as the rest of the config says."""
    sliding = config["model_type"] == "mistral" and config.get("sliding_window", 4096) is not None
    kind = "sliding_attention" if sliding else "full_attention"
    return isinstance(value, list) and all(each == kind for each in value)


def _own_class(value: Any, config: Mapping[str, Any]) -> bool:
    """Whether transformers' own language model is meant, and not a class that computes something else."""
    return isinstance(value, list) and _CAUSAL_LM[config["model_type"]] in value


def _no_own_model(value: Any, config: Mapping[str, Any]) -> bool:
    """Whether the repository brings no code of its own for the model."""
    return isinstance(value, dict) and not any(name.startswith("AutoModel") for name in value)


# Fields whose meaning depends on the rest of the file; true where they change nothing.
_PECULIAR: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "sliding_window": lambda value, config: config["model_type"] != "llama",
    "layer_types": _uniform_layers,
    "architectures": _own_class,
    "auto_map": _no_own_model,
}


def _check_values(config: Mapping[str, Any], where: str) -> None:
    """Refuse a number that is none, is not above 0, or is null where that has no meaning."""
    for name in _NUMBERS:
        value: Any = config.get(name)
        if value is None and name in _MAY_BE_NULL:
            continue
        if name not in config:
            raise CptError(f"{where}: {name} is missing. Download the file again.")
        whole = name in _WHOLE_NUMBERS
        # `true` is an int in Python, and JSON has numbers beyond any float.
        right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right_type or not 0 < value <= sys.float_info.max:
            kind = "whole number" if whole else "number"
            raise CptError(f"{where}: {name} cannot be {value!r}; it is a {kind} above 0. Download the file again.")
    for name, types in (("tie_word_embeddings", bool), ("initializer_range", (int, float))):
        if config[name] is not None and not isinstance(config[name], types):
            raise CptError(f"{where}: {name} cannot be {config[name]!r}. Download the file again.")
    end_ids(config, where)  # of no effect on the forward pass, but an export may have to add one


def _translate(config: Mapping[str, Any], rope: Rope) -> Architecture:
    heads = config["num_attention_heads"]
    dtype = config.get("dtype") or config.get("torch_dtype")  # transformers' order where both are given
    window = config.get("sliding_window") if config["model_type"] == "mistral" else None
    head_dim = config.get("head_dim")
    return Architecture(
        model_type=config["model_type"],
        num_hidden_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        # Not `or`: a 0 must be refused and not replaced.
        head_dim=config["hidden_size"] // heads if head_dim is None else head_dim,
        vocab_size=config["vocab_size"],
        tie_word_embeddings=bool(config["tie_word_embeddings"]),
        # By the family: no field of config.json says it, transformers' class has it built in.
        qkv_bias=config["model_type"] == "qwen2",
        qk_norm=config["model_type"] == "qwen3",
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope_theta=float(rope.theta),
        rope_scaling=rope.scaling,
        max_position_embeddings=config["max_position_embeddings"],
        # A window that no position reaches is none.
        sliding_window=window if window and window < config["max_position_embeddings"] else None,
        initializer_range=float(config["initializer_range"] or _COMMON_DEFAULTS["initializer_range"]),
        dtype=str(dtype).removeprefix("torch.") if dtype else None,
    )


def _check_shape(arch: Architecture, where: str) -> None:
    if arch.like_gpt2 and arch.hidden_size % arch.num_attention_heads:
        raise CptError(
            f"{where}: {arch.num_attention_heads} attention heads do not divide a hidden size of {arch.hidden_size}."
        )
    if not arch.like_gpt2 and (arch.head_dim < 2 or arch.head_dim % 2):
        raise CptError(f"{where}: a head size of {arch.head_dim} is refused: rotary embeddings turn pairs of values.")
    if arch.num_attention_heads % arch.num_key_value_heads:
        raise CptError(
            f"{where}: {arch.num_attention_heads} attention heads do not divide into "
            f"{arch.num_key_value_heads} key-value heads."
        )
    if arch.dtype not in (None, "bfloat16", "float16", "float32"):
        raise CptError(f"{where}: dtype {arch.dtype!r} is not supported; use bfloat16, float16 or float32 weights.")
