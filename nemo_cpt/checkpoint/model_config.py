"""The constants of a model's forward pass, whoever states them, in one form that can be compared.

They are stated by config.json (`Architecture`), by a recipe's or a running job's model config, and by the context of a
checkpoint. Tensors of one shape fit models with other constants, so nothing but this comparison tells those apart.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_cpt.checkpoint.architecture import Architecture
from nemo_cpt.checkpoint.rope import RopeScaling
from nemo_cpt.errors import CptError

Constants = dict[str, Any]

_MODELS = "nemo.collections.llm.gpt.model."
# The modules whose classes compute what config.json says.
_FAMILIES = ("llama", "llama_nemotron", "mistral", "qwen2", "qwen3")
GPT_CLASS = f"{_MODELS}base.GPTConfig"  # of GPT-2's kin: what the families' classes build on
_LLAMA3 = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")  # of Llama31Config
_ROPE_SCALING = (*_LLAMA3, "seq_len_interpolation_factor")

# Megatron's names of what config.json has under another name.
_MEGATRON_NAMES = {
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_hidden_size",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "attention_bias": "add_qkv_bias",
    "qk_layernorm": "qk_layernorm",  # of which config.json speaks by its model_type
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "sliding_window": "window_size",
    "max_position_embeddings": "seq_length",
}

# What Megatron can vary and no supported config.json can say.
_FIXED: Constants = {
    "normalization": "RMSNorm",
    "activation_func": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "no_rope_freq": None,
    "window_attn_skip_freq": None,
    "num_moe_experts": None,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "heterogeneous_block_specs": False,
}
_GPT2 = _FIXED | {
    "normalization": "LayerNorm",
    "activation_func": "openai_gelu",
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "position_embedding_type": "learned_absolute",
}


# What NeMo's config class has to be called with for its model to compute the same; functions are left to the class.
FIELDS = (
    "hidden_size", "num_attention_heads", *_MEGATRON_NAMES.values(), *_ROPE_SCALING,
    *(name for name in _FIXED if name != "activation_func"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Difference:
    """One constant that two models do not share, by its name in config.json (or Megatron's, if that has none)."""

    name: str
    one: Any
    other: Any

    @property
    def megatron_name(self) -> str:
        """What Megatron and NeMo call it."""
        return ", ".join(_ROPE_SCALING) if self.name == "rope_scaling" else _MEGATRON_NAMES.get(self.name, self.name)

    def described(self, one: str, other: str) -> str:
        """The difference in words, given the names of both sides."""
        names = self.name if self.name == self.megatron_name else f"{self.name} (NeMo: {self.megatron_name})"
        return f"{names} is {_shown(self.one)} in {one} and {_shown(self.other)} in {other}"


def constants_of(arch: Architecture) -> Constants:
    """The constants that a config.json states, those that it cannot state included."""
    # Learnt positions are rows: their number is the model's, where a rotary embedding knows none.
    positions = {"max_position_embeddings": arch.max_position_embeddings} if arch.like_gpt2 else {}
    return {
        "model": GPT_CLASS if arch.like_gpt2 else None,
        "num_hidden_layers": arch.num_hidden_layers,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_key_value_heads,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "tie_word_embeddings": arch.tie_word_embeddings,
        "attention_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "rms_norm_eps": arch.rms_norm_eps,
        "rope_theta": arch.rope_theta,
        "rope_scaling": _unless_one(arch.rope_scaling),
        "sliding_window": arch.sliding_window,
        **positions,
        **(_GPT2 if arch.like_gpt2 else _FIXED),
    }


def constants_of_nemo(config: Any) -> Constants:
    """The constants that a NeMo model config states.

    Args:
        config: a recipe's `recipe.model.config` (a `run.Config`, defaults included), a running job's
            `pl_module.config`, or what `read_model_config` returns of a checkpoint.

    Returns:
        The mapping that `constants_of` gives of a config.json, without what `config` leaves open: `vocab_size` where
        it is to follow from the tokenizer, and in a mapping every field that is left to the class.
    """
    get = _getter(config)
    found: Constants = {"model": _foreign_class(config)}
    hidden, heads = get("hidden_size"), get("num_attention_heads")
    # What Megatron itself takes where a config leaves these open.
    derived = {
        "num_query_groups": heads,
        "kv_channels": hidden // heads if hidden and heads else None,
        "ffn_hidden_size": 4 * hidden if hidden else None,
    }
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "vocab_size", "tie_word_embeddings", "attention_bias", "qk_layernorm",
                 "rms_norm_eps", "rope_theta"):  # fmt: skip
        megatron_name = _MEGATRON_NAMES.get(name, name)
        value = get(megatron_name)
        if value is None:
            value = derived.get(megatron_name)
        if value is not None:
            found[name] = value
    # A mapping that is silent on it says nothing; Llama31Config's own default would be taken for none.
    if not _leaves_scaling_open(config):
        found["rope_scaling"] = _rope_scaling(get)
    if (window := get("window_size", _ABSENT)) is not _ABSENT:
        found["sliding_window"] = _window(window)
    if get("position_embedding_type") == "learned_absolute":
        found["max_position_embeddings"] = get("seq_length")
    for name in _FIXED:
        if (value := get(name, _ABSENT)) is not _ABSENT:
            found[name] = _plain(value)
    return found


def differences(one: Constants, other: Constants) -> list[Difference]:
    """The constants that both state and that are not the same, in a fixed order."""
    # What only one of them states is not compared: a context may hold no more than what was set.
    shared = [name for name in one if name in other]
    return [Difference(name, one[name], other[name]) for name in shared if not _same(one[name], other[name])]


def _same(one: Any, other: Any) -> bool:
    """Whether two values are one to a forward pass in fp32: GGUF files hold 1e-5 as 9.999999747378752e-06."""
    if isinstance(one, RopeScaling) and isinstance(other, RopeScaling):
        return all(map(_same, dataclasses.astuple(one), dataclasses.astuple(other)))
    if isinstance(one, float) or isinstance(other, float):
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        return numbers and math.isclose(one, other, rel_tol=2**-23)
    return bool(one == other)


def context_differences(recorded: Mapping[str, Any], arch: Architecture) -> list[Difference]:
    """Where a checkpoint's context, as `read_model_config` gives it, and a config.json differ.

    The rows of the embedding are left out: a context may count Megatron's padding, and the tensors tell.
    """
    found = differences(constants_of_nemo(recorded), constants_of(arch))
    return [difference for difference in found if difference.name != "vocab_size"]


def described(found: Iterable[Difference], one: str, other: str) -> str:
    """Differences in words, one after the other."""
    return "; ".join(difference.described(one, other) for difference in found)


def read_model_config(nemo: str | Path) -> dict[str, Any]:
    """The model config that a checkpoint's context records, as a mapping with the class's name under `_target_`.

    `io.json` is what NeMo builds the model from, but it holds only what was set; `model.yaml` also has the class's
    defaults, in what NeMo itself wrote.

    Args:
        nemo: a checkpoint's folder.

    Returns:
        The fields; empty where the checkpoint has no context.

    Raises:
        CptError: the context cannot be read.
    """
    context = Path(nemo) / "context"
    found: dict[str, Any] = {}
    # In this order: what io.json says goes before, because NeMo builds from it.
    for name, read in (("model.yaml", _from_yaml), ("io.json", _from_fiddle)):
        if not (context / name).is_file():
            continue
        try:
            found |= read((context / name).read_text(encoding="utf-8"))
        except Exception as error:
            raise CptError(f"{context / name} cannot be read ({error!r}). Copy the checkpoint again.") from error
    return found


_ABSENT = object()
Get = Callable[..., Any]


def _getter(config: Any) -> Get:
    """Reads a field by name; a second argument is what an absent one gives."""
    if isinstance(config, Mapping):
        return lambda name, default=None: config.get(name, default)

    def get(name: str, default: Any = None) -> Any:
        try:
            return getattr(config, name, default)
        except ValueError:  # Fiddle's word for a field with a default factory that was not set
            return _made_by_factory(config.__fn_or_cls__, name)

    return get


def _made_by_factory(config_class: type, name: str) -> Any:
    (field,) = (field for field in dataclasses.fields(config_class) if field.name == name)
    return field.default_factory() if callable(field.default_factory) else None


def _foreign_class(config: Any) -> str | None:
    """The NeMo class that a config builds on, where that may compute something else than config.json says."""
    if isinstance(config, Mapping):
        names = [str(config.get("_target_", ""))]
    else:
        config_class = getattr(config, "__fn_or_cls__", type(config))
        names = [f"{each.__module__}.{each.__qualname__}" for each in config_class.__mro__]
    # A user's subclass is judged by the class of NeMo's that it is made from.
    nearest = next((name for name in names if name.startswith("nemo.")), None)
    return None if nearest is None or (is_known_class(nearest) and nearest != GPT_CLASS) else nearest


def is_known_class(name: str) -> bool:
    """Whether a class, by its full name, is one of NeMo's that compute what config.json says."""
    return name == GPT_CLASS or name.rpartition(".")[0] in [_MODELS + family for family in _FAMILIES]


def _leaves_scaling_open(config: Any) -> bool:
    """Whether a mapping says nothing of the rotary scaling, and its class has one by default."""
    if not isinstance(config, Mapping) or any(name in config for name in _ROPE_SCALING):
        return False
    return not config or str(config.get("_target_")).rpartition(".")[2].startswith(("Llama31", "Llama32", "Llama33"))


def _rope_scaling(get: Get) -> RopeScaling | None:
    factor, low, high, old, interpolation = (get(name) for name in _ROPE_SCALING)
    # Megatron's two ways of scaling are two sets of fields; a factor that is None or 0 scales nothing.
    llama3 = _unless_one(RopeScaling("llama3", factor, low, high, old) if factor else None)
    linear = _unless_one(RopeScaling("linear", interpolation) if interpolation else None)
    if llama3 and linear:  # Megatron applies one after the other; config.json has room for one
        return dataclasses.replace(llama3, kind="llama3 and linear")
    return llama3 or linear


def _unless_one(scaling: RopeScaling | None) -> RopeScaling | None:
    """None for a scaling by 1, which changes nothing."""
    return None if scaling is None or scaling.factor == 1 else scaling


def _window(window: Any) -> int | None:
    """Keys that a position sees, itself included; Megatron counts those to its left, -1 for all."""
    if window is None or window[0] < 0:
        return None
    return int(window[0]) + 1


def _plain(value: Any) -> Any:
    """A function or enumeration member by its bare name, however it is written."""
    if isinstance(value, Mapping):
        value = value.get("_target_", value)
    if callable(value):
        value = value.__name__
    return value.rpartition(".")[2] if isinstance(value, str) else value


def _shown(value: Any) -> str:
    if isinstance(value, RopeScaling):
        numbers = [getattr(value, field.name) for field in dataclasses.fields(value)[1:]]
        return f"{value.kind} {numbers[0]}" if value.kind == "linear" else f"{value.kind} {tuple(numbers)}"
    return "none" if value is None else str(value)


def _from_yaml(text: str) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load(text)["config"])


def _from_fiddle(text: str) -> dict[str, Any]:
    return fiddle_call(json.loads(text), "<root>.model.config")


def fiddle_call(context: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What is called at a path of a context's io.json: the arguments by name, and `_target_`; empty where nothing is.

    Args:
        context: the content of io.json.
        path: such as `<root>.model.config`.
    """
    objects = context.get("objects", {})
    for entry in objects.values():
        if path in entry.get("paths", ()):
            # Fiddle writes what is called into another entry, the first one's metadata.
            called = dict(objects[entry["metadata"]["key"]]["items"])["Attr(name='fn_or_cls')"]
            fields = {key.removeprefix("Attr(name='").removesuffix("')"): value for key, value in entry["items"]}
            return {
                "_target_": f"{called['module']}.{called['name']}",
                **{name: _fiddle_value(value, objects) for name, value in fields.items()},
            }
    return {}


def _fiddle_value(value: Mapping[str, Any], objects: Mapping[str, Any]) -> Any:
    """A number, text or list as it is; a function or class by its name."""
    if value["type"] == "leaf":
        return value["value"]
    if value["type"] == "pyref":
        return value["name"]
    items = objects[value["key"]]["items"]
    if all(key.startswith("Index(") for key, _ in items):
        return [_fiddle_value(item, objects) for _, item in items]
    return value["key"]
