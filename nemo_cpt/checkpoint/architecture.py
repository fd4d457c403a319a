"""What a Hugging Face config.json says about the forward pass; everything it says is understood or refused."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_cpt.errors import CptError

# Read below, and thereby carried into NeMo's config.
_TRANSLATED = {
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "tie_word_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "max_position_embeddings", "initializer_range", "sliding_window", "torch_dtype", "dtype",
}  # fmt: skip

# No effect on the forward pass: bookkeeping, special tokens' ids, settings of generation, of the cache and of outputs.
_NEUTRAL = {
    "architectures", "transformers_version", "name_or_path", "auto_map", "use_cache",
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
    "unsloth_fixed", "max_window_layers",
}  # fmt: skip

# Of these, only the values for which Megatron's layers compute the same.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "hidden_dropout": (0,),
    "residual_dropout": (0,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
}

# What transformers assumes where config.json is silent (configuration_{llama,mistral,qwen2}.py, version 4.57).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768},
}
_WHOLE, _NUMBER = (int,), (int, float)
_TYPES: dict[str, tuple[type, ...]] = {  # of fields that may be left out
    "num_key_value_heads": _WHOLE, "head_dim": _WHOLE, "max_position_embeddings": _WHOLE, "sliding_window": _WHOLE,
    "rms_norm_eps": _NUMBER, "rope_theta": _NUMBER, "initializer_range": _NUMBER, "rope_scaling": (dict,),
    "rope_parameters": (dict,), "layer_types": (list,),
}  # fmt: skip
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling: `llama3` (Llama 3.1 and 3.2) or `linear`, which has a factor only."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Architecture:
    """A decoder's shape and the constants of its forward pass, in the names of config.json."""

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
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    sliding_window: int | None
    initializer_range: float
    dtype: str | None

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value head."""
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
        CptError: an unsupported `model_type`, a missing or impossible value, or a field that may change the forward
            pass in a way that NeMo's model would not follow.
    """
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), str(path), ignore_fields)


def parse_config(config: Mapping[str, Any], where: str, ignore_fields: Collection[str] = ()) -> Architecture:
    """Like `read_architecture`, from the parsed config; `where` names it in messages."""
    config = {name: value for name, value in config.items() if value is not None}
    model_type = str(config.get("model_type"))
    if model_type not in _DEFAULTS:
        raise CptError(
            f"{where}: model_type {model_type!r} is not supported; supported are {', '.join(_DEFAULTS)} "
            "(Llama 2 to 3.2, SmolLM2, Mistral, Qwen2 and Qwen2.5)."
        )
    if missing := [name for name in _REQUIRED if not isinstance(config.get(name), int)]:
        raise CptError(f"{where}: no whole number for {', '.join(missing)}. Download the file again.")
    if wrong := [name for name, types in _TYPES.items() if name in config and not isinstance(config[name], types)]:
        raise CptError(f"{where}: {wrong[0]} cannot be {config[wrong[0]]!r}. Download the file again.")
    _refuse_unknown(config, where, ignore_fields)
    architecture = _translate({**_DEFAULTS[model_type], **config}, where)
    _check_shape(architecture, where)
    return architecture


def _refuse_unknown(config: Mapping[str, Any], where: str, ignore_fields: Collection[str]) -> None:
    for name, value in config.items():
        known = name in _TRANSLATED or name in _NEUTRAL or name.startswith("_")  # _ is transformers' own bookkeeping
        if known or name in ignore_fields:
            continue
        if name == "layer_types":
            if set(value) <= {"full_attention"} or config.get("model_type") == "mistral":
                continue
        elif name in _FIXED and any(value == allowed for allowed in _FIXED[name]):
            continue
        reason = "NeMo's model would not follow it" if name in _FIXED else "it may change the forward pass"
        raise CptError(
            f"{where}: field {name!r} with value {value!r} is refused because {reason}. "
            f"If you know that it does not matter, allow it with ignore_fields=[{name!r}] (--ignore-field {name})."
        )


def _translate(config: Mapping[str, Any], where: str) -> Architecture:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    dtype = config.get("torch_dtype") or config.get("dtype")
    window = config.get("sliding_window") if config["model_type"] == "mistral" else None
    return Architecture(
        model_type=config["model_type"],
        num_hidden_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // max(heads, 1),
        vocab_size=config["vocab_size"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=config["model_type"] == "qwen2",
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(config.get("rope_scaling") or rope, where),
        max_position_embeddings=config["max_position_embeddings"],
        sliding_window=window if window and window < config["max_position_embeddings"] else None,
        initializer_range=float(config.get("initializer_range", 0.02)),
        dtype=str(dtype).removeprefix("torch.") if dtype else None,
    )


def _rope_scaling(scaling: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("llama3", "linear"):
        raise CptError(
            f"{where}: rope scaling of type {kind!r} is not supported; supported are 'llama3', 'linear' and none. "
            "Megatron would rotate by other angles than the model was trained with."
        )
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    if missing := [name for name in names if name not in scaling]:
        raise CptError(f"{where}: rope_scaling of type {kind!r} lacks {', '.join(missing)}.")
    if wrong := [name for name in names if not isinstance(scaling[name], _NUMBER)]:
        raise CptError(f"{where}: rope_scaling's {wrong[0]} cannot be {scaling[wrong[0]]!r}. Download the file again.")
    return RopeScaling(kind, **{name: scaling[name] for name in names})


def _check_shape(arch: Architecture, where: str) -> None:
    if min(arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim, arch.num_hidden_layers) < 1:
        raise CptError(f"{where}: heads, head size and layers have to be 1 or more.")
    if arch.num_attention_heads % arch.num_key_value_heads:
        raise CptError(
            f"{where}: {arch.num_attention_heads} attention heads do not divide into "
            f"{arch.num_key_value_heads} key-value heads."
        )
    if arch.dtype not in (None, "bfloat16", "float16", "float32"):
        raise CptError(f"{where}: dtype {arch.dtype!r} is not supported; use bfloat16, float16 or float32 weights.")
