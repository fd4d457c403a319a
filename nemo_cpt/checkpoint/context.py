"""The `context` folder of a NeMo checkpoint: which model and tokenizer it is, as NeMo's own saver describes it.

`io.json` is a Fiddle configuration of NeMo's TrainerContext. It is written here as text, without importing NeMo, which
takes 20 seconds. The tokenizer's folder also carries config.json and the other small files of the Hugging Face model:
NeMo copies that folder into every checkpoint that a training writes, so an export finds them there.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_cpt.checkpoint.architecture import Architecture
from nemo_cpt.checkpoint.folders import copy_small_files

TOKENIZER_FOLDER = "nemo_tokenizer"  # in `context`, as NeMo's importer names it
HF_FOLDER = "hf"  # beside `context`, the same files, for people and recipes
RUN_JSON = "run.json"  # beside `context`, in a training's checkpoints: the step, and how the run was started
UNFINISHED = "-unfinished"  # NeMo's marker beside a checkpoint that is being written or removed
_LLM = "nemo.collections.llm.gpt.model."
_FIDDLE = "fiddle._src.config"


@dataclass(frozen=True)
class Name:
    """A Python object by its module and name, not called."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """A class or function, by name, to be called with these keyword arguments."""

    target: Name
    arguments: Mapping[str, Any] = field(default_factory=dict)


def write_context(folder: Path, arch: Architecture, hf_folder: Path) -> None:
    """Write `io.json`, `model.yaml`, the tokenizer's folder and the generation settings.

    Args:
        folder: the checkpoint's `context` folder, to be created.
        arch: the model; its dtype has to be set.
        hf_folder: where the tokenizer and the other small files come from.
    """
    import yaml

    # Into the tokenizer's folder: of a context, it is the only one that NeMo hands on to a training's checkpoints.
    copy_small_files(hf_folder, folder / TOKENIZER_FOLDER, in_checkpoint=True)
    has_generation_config = (hf_folder / "generation_config.json").is_file()
    if has_generation_config:
        (folder / "artifacts").mkdir()
        shutil.copyfile(hf_folder / "generation_config.json", folder / "artifacts" / "generation_config.json")
    model = nemo_model(arch, has_generation_config)
    # NeMo's loader wants a trainer; a training brings its own.
    trainer = Call(
        Name("nemo.lightning.pytorch.trainer", "Trainer"),
        {
            "accelerator": "cpu",
            "strategy": Call(
                Name("nemo.lightning.pytorch.strategies.megatron_strategy", "MegatronStrategy"),
                {"ckpt_save_optimizer": False},
            ),
            "devices": 1,
        },
    )
    root = Call(Name("nemo.lightning.io.pl", "TrainerContext"), {"model": model, "trainer": trainer})
    (folder / "io.json").write_text(json.dumps(fiddle_json(root)), encoding="utf-8")
    (folder / "model.yaml").write_text(yaml.safe_dump(_as_yaml(model)), encoding="utf-8")


def nemo_model(arch: Architecture, has_generation_config: bool) -> Call:
    """NeMo's model of an architecture, with its tokenizer, as a description."""
    module, model = {
        "llama": ("llama", "LlamaModel"),
        "mistral": ("mistral", "MistralModel"),
        "qwen2": ("qwen2", "Qwen2Model"),
        "qwen3": ("qwen3", "Qwen3Model"),
        "gpt2": ("base", "GPTModel"),
    }[arch.model_type]
    # A name relative to the context: the loader puts the folder's place in front, wherever it was moved.
    tokenizer = Call(
        Name("nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer"),
        {"pretrained_model_name": TOKENIZER_FOLDER},
    )
    arguments = config_arguments(arch)
    if has_generation_config:
        arguments["generation_config"] = Call(
            Name("nemo.lightning.io.artifact.hf_auto", "from_pretrained"),
            {
                "auto_cls": Name("transformers.generation.configuration_utils", "GenerationConfig"),
                "pretrained_model_name_or_path": "./artifacts",
            },
        )
    config = Call(Name(_LLM + module, config_class(arch)), arguments)
    return Call(Name(_LLM + module, model), {"config": config, "tokenizer": tokenizer})


def config_class(arch: Architecture) -> str:
    """The name of NeMo's config class for an architecture."""
    if arch.model_type == "llama":
        return "Llama31Config" if arch.rope_scaling and arch.rope_scaling.kind == "llama3" else "LlamaConfig"
    return {
        "mistral": "MistralConfig7B",
        "qwen2": "Qwen2Config",
        "qwen3": "Qwen3Config",
        "gpt2": "GPTConfig",
    }[arch.model_type]


def plain_config(arch: Architecture) -> dict[str, Any]:
    """NeMo's model config of a shape, in the form of `model_config.read_model_config`."""
    config = nemo_model(arch, has_generation_config=False).arguments["config"]
    named = {"_target_": config.target} | config.arguments
    return {name: f"{each.module}.{each.name}" if isinstance(each, Name) else each for name, each in named.items()}


def config_arguments(arch: Architecture) -> dict[str, Any]:
    """What NeMo's config class is called with, parallelism left to the training."""
    arguments: dict[str, Any] = {
        "num_layers": arch.num_hidden_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.intermediate_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_key_value_heads,
        "kv_channels": arch.head_dim,
        "layernorm_epsilon": arch.rms_norm_eps,
        "init_method_std": arch.initializer_range,
        "rotary_base": arch.rope_theta,
        "seq_length": arch.max_position_embeddings,
        "vocab_size": arch.vocab_size,
        # NeMo pads the vocabulary to a multiple of this; the weights have no rows for padding.
        "make_vocab_size_divisible_by": _largest_power_of_two(arch.vocab_size),
        "share_embeddings_and_output_weights": arch.tie_word_embeddings,
        "gated_linear_unit": not arch.like_gpt2,
        # Needs Transformer Engine; without it, NeMo's config class refuses to be built from its own default.
        "apply_rope_fusion": False,
        "fp16": arch.dtype == "float16",
        "bf16": arch.dtype == "bfloat16",
        "params_dtype": Name("torch", str(arch.dtype)),
    }
    if arch.rope_scaling and arch.rope_scaling.kind == "llama3":
        arguments |= {
            "scale_factor": arch.rope_scaling.factor,
            "low_freq_factor": arch.rope_scaling.low_freq_factor,
            "high_freq_factor": arch.rope_scaling.high_freq_factor,
            "old_context_len": arch.rope_scaling.original_max_position_embeddings,
        }
    elif arch.rope_scaling:
        arguments["seq_len_interpolation_factor"] = arch.rope_scaling.factor
    if arch.like_gpt2:
        arguments |= _GPT2_ARGUMENTS
    if arch.model_type == "mistral":
        # Megatron counts the keys to the left, transformers the position itself too.
        window = arch.sliding_window
        arguments |= {"window_size": (window - 1, 0) if window else None, "cp_comm_type": "a2a" if window else None}
    return arguments


# What the families' own classes say, and NeMo's class for all of them leaves to Megatron.
_GPT2_ARGUMENTS: dict[str, Any] = {
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "add_bias_linear": True,
    # GPT-2's GELU, by tanh. Megatron's fused one is it too, its plain one is not: a CPU would train another model.
    "activation_func": Name("megatron.core.transformer.utils", "openai_gelu"),
    "bias_activation_fusion": False,
    "bias_dropout_fusion": True,
    "persist_layer_norm": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}


def _largest_power_of_two(vocab_size: int) -> int:
    # 128 at most, as Megatron has it by itself.
    return next(base for base in (128, 64, 32, 16, 8, 4, 2, 1) if vocab_size % base == 0)


def _as_yaml(value: Any) -> Any:
    if isinstance(value, Name):
        return {"_target_": f"{value.module}.{value.name}", "_call_": False}
    if isinstance(value, Call):
        arguments = {name: _as_yaml(argument) for name, argument in value.arguments.items()}
        return {"_target_": f"{value.target.module}.{value.target.name}", **arguments}
    # YAML knows no tuples; NeMo's reader does not ask for them.
    return list(value) if isinstance(value, tuple) else value


def fiddle_json(root: Call) -> dict[str, Any]:
    """The JSON that Fiddle's serialization writes for a configuration, version 0.0.1 of its format."""
    writer = _FiddleWriter()
    return {
        "root": writer.value(root, "<root>"),
        "objects": writer.objects,
        "refcounts": writer.counts,
        "version": "0.0.1",
    }


class _FiddleWriter:
    """Writes the graph that `fiddle._src.experimental.serialization` reads.

    Every container is an entry of `objects`, under a key of its own, and stands elsewhere as a `ref` to it; everything
    else is a `leaf`, or a `pyref` where it is a Python object. A Call is a container of its arguments whose `metadata`,
    made of further objects, says what is called; tags and history, which Fiddle keeps as well, are empty. `paths` is
    where a value stands in the configuration, as Fiddle writes it: `<root>.model.config`. Only values that are part of
    the configuration have them, what metadata are made of has none.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.counts: dict[str, int] = {}
        self._numbers: defaultdict[str, int] = defaultdict(int)

    def value(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Name):
            return {**_pyref(value.module, value.name), "paths": [path]}
        if isinstance(value, Call):
            return self._call(value, path)
        if isinstance(value, tuple):
            items = [[f"Index(index={i})", self.value(item, f"{path}[{i}]")] for i, item in enumerate(value)]
            return self._object("tuple", _pyref("builtins", "tuple"), items, None, path)
        return {"type": "leaf", "value": value, "paths": [path]}

    def _call(self, call: Call, path: str) -> dict[str, Any]:
        # Before its own entry: Fiddle's `objects` name what is inside first.
        items = [[f"Attr(name='{name}')", self.value(v, f"{path}.{name}")] for name, v in call.arguments.items()]
        metadata = self._metadata(call)
        return self._object(call.target.name.lower(), _pyref(_FIDDLE, "Config"), items, metadata, path)

    def _metadata(self, call: Call) -> dict[str, Any]:
        names = [[f"Index(index={i})", name] for i, name in enumerate(call.arguments)]
        fields = {
            "fn_or_cls": _pyref(call.target.module, call.target.name),
            "argument_names": self._object("tuple", _pyref("builtins", "tuple"), names, None),
            "argument_tags": self._empty_dict(),
            "argument_history": self._empty_dict(),
        }
        kind = _pyref(_FIDDLE, "BuildableTraverserMetadata")
        items = [[f"Attr(name='{name}')", value] for name, value in fields.items()]
        return self._object("buildable_traverser_metadata", kind, items, kind)

    def _empty_dict(self) -> dict[str, Any]:
        keys: dict[str, Any] = {"type": _pyref("builtins", "tuple"), "items": [], "metadata": None}
        return self._object("dict", _pyref("builtins", "dict"), [], keys)

    def _object(self, stem: str, kind: Any, items: list[Any], metadata: Any, path: str | None = None) -> dict[str, Any]:
        self._numbers[stem] += 1
        key = f"{stem}_{self._numbers[stem]}"
        self.objects[key] = {"type": kind, "items": items, "metadata": metadata}
        if path:
            self.objects[key]["paths"] = [path]
        self.counts[key] = 1  # no object is shared
        return {"type": "ref", "key": key}


def _pyref(module: str, name: str) -> dict[str, str]:
    return {"type": "pyref", "module": module, "name": name}
