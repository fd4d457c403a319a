"""Reads a Workload out of a recipe, the run.Partial itself, without building anything of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_cpt.compatibility import TILE, given
from nemo_cpt.errors import CptError
from nemo_cpt.planning.workload import LINEAR, Workload
from nemo_cpt.rounding import rounded_up

LLAMA3_VOCABULARY = 128_256
MODELLED_CALLBACKS = {
    "Guards", "EveryTrainableParameterHasGradient", "OutOfMemoryAdvice", "ValidationLossBySet", "MetricsFile",
    "TimingCallback", "GarbageCollectionCallback", "PreemptionCallback", "SaveWhenStopped", "StopAtStep",
    "StopEarly", "Seed", "MegatronCommOverlapCallback", "DescribeRun", "ForgettingAlarm", "ExportCheckpoints",
    "RecomputeOutputs",
}  # fmt: skip
MOMENTS = ("exp_avg_dtype", "exp_avg_sq_dtype")
ADAPTERS = {"LoRA", "DoRA", "LoRAWithEmbeddings", "DoRAWithEmbeddings"}
STRATEGIES = {"MegatronStrategy", "CpuStrategy"}


def read(recipe: Any) -> Workload:
    """Read a recipe: the run.Partial that a recipe function returned, edited or not; nothing of it is built.

    Raises:
        CptError: it is no recipe of a Llama-shaped model, or its sizes do not go together.
    """
    try:
        config, strategy, optimizer = recipe.model.config, recipe.trainer.strategy, recipe.optim.config
    except AttributeError as error:
        raise CptError(
            f"the planner reads recipes with model.config, trainer.strategy and optim.config: {error}"
        ) from error
    return Workload(
        **_model(recipe, config, strategy),
        **_batches(recipe, strategy),
        **_recompute(config),
        recompute_outputs=any(_name(each) == "RecomputeOutputs" for each in _get(recipe.trainer, "callbacks", [])),
        **_adapters(getattr(recipe, "peft", None)),
        **_precision(recipe, config, strategy, optimizer),
        unmodelled=tuple(_left_out(recipe, config)),
    )


def check_layout(recipe: Any) -> None:
    """Refuse a recipe whose model cannot be cut over its GPUs, or not multiply in fp8 there, before there is a job.

    Raises:
        CptError: as `read`.
    """
    read(recipe)


def _get(config: Any, name: str, default: Any) -> Any:
    """A field of a run.Config: as set, else the class's default; `default` where there is neither, or it is None."""
    try:
        # A run.Config raises for a field with a default factory that was not set, besides for an unknown one.
        value = getattr(config, name)
    except (AttributeError, TypeError, ValueError):
        return default
    return default if value is None else value


def _model(recipe: Any, config: Any, strategy: Any) -> dict[str, Any]:
    heads = _get(config, "num_attention_heads", 0)
    hidden = _get(config, "hidden_size", 0)
    if not heads or not hidden:
        raise CptError(f"model.config is {_name(config)}: the planner needs its hidden_size and num_attention_heads")
    tensor = _get(strategy, "tensor_model_parallel_size", 1)
    # NeMo pads to this times the tensor parallel size, so that every GPU has equally many rows.
    multiple = (given(config, "make_vocab_size_divisible_by") or TILE) * tensor
    return {
        "num_layers": _get(config, "num_layers", 0),
        "hidden_size": hidden,
        "ffn_hidden_size": _get(config, "ffn_hidden_size", 4 * hidden),
        "num_attention_heads": heads,
        "num_query_groups": _get(config, "num_query_groups", heads),
        "kv_channels": _get(config, "kv_channels", hidden // heads),
        "vocab_size": rounded_up(_vocabulary(recipe, config), multiple),
        # Megatron's defaults where a config is silent, not Llama's.
        "tied": _get(config, "share_embeddings_and_output_weights", True),
        "gated": _get(config, "gated_linear_unit", False),
        "qkv_bias": _get(config, "add_qkv_bias", False),
        "qk_norm": _get(config, "qk_layernorm", False),
    }


def _vocabulary(recipe: Any, config: Any) -> int:
    """The configuration's own size, else that of the tokenizer's or the base's config.json, else Llama 3's."""
    if size := _get(config, "vocab_size", 0):
        return size
    path = configuration_of(recipe)
    return json.loads(path.read_text()).get("vocab_size", LLAMA3_VOCABULARY) if path.is_file() else LLAMA3_VOCABULARY


def configuration_of(recipe: Any) -> Path:
    """The config.json of the tokenizer's folder, which the vocabulary's size is read from; it need not be there."""
    tokenizer = _get(_get(recipe, "data", None), "tokenizer", None)
    return Path(str(_get(tokenizer, "pretrained_model_name", "")), "config.json")


def _batches(recipe: Any, strategy: Any) -> dict[str, Any]:
    devices = _devices(recipe.trainer)
    return {
        "seq_length": _get(recipe.data, "seq_length", _get(recipe.model.config, "seq_length", 0)),
        "micro_batch_size": _get(recipe.data, "micro_batch_size", 1),
        "global_batch_size": _get(recipe.data, "global_batch_size", 1),
        "max_steps": _get(recipe.trainer, "max_steps", 0),
        "data_workers": _get(recipe.data, "num_workers", 2),
        # `devices` are a node's, in Lightning's words.
        "gpus": devices * _get(recipe.trainer, "num_nodes", 1),
        "gpus_per_node": devices,
        "tensor_model_parallel_size": _get(strategy, "tensor_model_parallel_size", 1),
        "pipeline_model_parallel_size": _get(strategy, "pipeline_model_parallel_size", 1),
        "virtual_pipeline_model_parallel_size": _get(strategy, "virtual_pipeline_model_parallel_size", 1),
        "context_parallel_size": _get(strategy, "context_parallel_size", 1),
        "sequence_parallel": _get(strategy, "sequence_parallel", False),
    }


def _devices(trainer: Any) -> int:
    """How many devices a trainer takes of a machine, in any of Lightning's ways to say it."""
    given = _get(trainer, "devices", 1)
    if isinstance(given, str) and "," in given:
        given = [each for each in given.split(",") if each.strip()]
    if isinstance(given, list | tuple):
        return len(given)
    try:
        count = int(given)
    except (TypeError, ValueError):
        count = -1
    if count < 1:  # "auto" and -1 are whatever the job's machine has
        raise CptError(f"the planner reads recipes that say how many GPUs they take, and trainer.devices is {given!r}")
    return count


def _recompute(config: Any) -> dict[str, Any]:
    granularity = _get(config, "recompute_granularity", "none")
    loss = "plain"
    if _get(config, "cross_entropy_loss_fusion", True):
        loss = "te" if _get(config, "cross_entropy_fusion_impl", "native") == "te" else "native"
    return {
        "recompute": granularity if granularity != "full" else _get(config, "recompute_method", "block"),
        "recompute_num_layers": _get(config, "recompute_num_layers", 0),
        "recompute_modules": tuple(_get(config, "recompute_modules", ("core_attn",))),
        "loss": loss,
        "fused_gradients": bool(_get(config, "gradient_accumulation_fusion", False)),
    }


def _adapters(peft: Any) -> dict[str, Any]:
    if peft is None:
        return {"lora_rank": None}
    return {
        "lora_rank": _get(peft, "dim", 32),
        "lora_targets": tuple(name for name in _get(peft, "target_modules", LINEAR) if name in LINEAR),
        "lora_dropout": _get(peft, "dropout", 0.0),
        "dora": _name(peft).startswith("DoRA"),
        "trained_embeddings": _name(peft).endswith("WithEmbeddings"),
    }


def _precision(recipe: Any, config: Any, strategy: Any, optimizer: Any) -> dict[str, Any]:
    plugin = _get(recipe.trainer, "plugins", None)
    # Megatron's mixed precision keeps fp32 masters; without a plugin, or in fp32, the weights are the masters.
    low = plugin is not None and "32" not in str(_get(plugin, "precision", "32"))
    aware = _get(optimizer, "use_precision_aware_optimizer", False)
    ddp = _get(strategy, "ddp", None)
    # Megatron heeds the moments' types only with the precision-aware optimizer.
    exp_avg = _bytes(_get(optimizer, "exp_avg_dtype", "float32")) if aware else 4
    exp_avg_sq = _bytes(_get(optimizer, "exp_avg_sq_dtype", "float32")) if aware else 4
    fp32_gradients = _get(ddp, "grad_reduce_in_fp32", False) or not low
    return {
        "weight_bytes": 2 if low else 4,
        "grad_bytes": 4 if fp32_gradients else 2,
        "exp_avg_bytes": exp_avg,
        "exp_avg_sq_bytes": exp_avg_sq,
        "master_bytes": (2 if aware and _get(optimizer, "store_param_remainders", True) else 4) if low else 0,
        "precision_aware": aware,
        "fp8_moments": aware and any("uint8" in str(_get(optimizer, name, "")) for name in MOMENTS),
        "host_states": tuple(_get(recipe.optim, "host_states", ())),
        "optimizer_offload_fraction": _offloaded(optimizer),
        "distributed_optimizer": _get(optimizer, "use_distributed_optimizer", False),
        "overlap_grad_reduce": _get(ddp, "overlap_grad_reduce", False),
        "fp8": _get(plugin, "fp8", None) is not None,
        "fp8_param": bool(_get(plugin, "fp8_param_gather", False)),
    }


def _offloaded(optimizer: Any) -> float:
    if not _get(optimizer, "optimizer_cpu_offload", False):
        return 0.0
    return float(_get(optimizer, "optimizer_offload_fraction", 0.0))


def _bytes(dtype: Any) -> int:
    """Bytes of an element; fp8 moments keep their transpose too (measured: benchmarks/planner.py)."""
    name = str(dtype).removeprefix("torch.")
    return {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 2}.get(name, 4)


def _name(config: Any) -> str:
    return getattr(getattr(config, "__fn_or_cls__", type(config)), "__name__", str(config))


def _left_out(recipe: Any, config: Any) -> Iterator[str]:
    """What the planner leaves out, in words."""
    for callback in _get(recipe.trainer, "callbacks", []):
        # An unknown callback may hold memory: the plan then is a lower bound, and says so.
        if _name(callback) not in MODELLED_CALLBACKS:
            yield f"callback {_name(callback)}"
    if _name(recipe.trainer.strategy) not in STRATEGIES:
        yield f"strategy {_name(recipe.trainer.strategy)}"
    if (peft := getattr(recipe, "peft", None)) is not None and _name(peft) not in ADAPTERS:
        yield f"peft {_name(peft)}"
    for target in _get(peft, "target_modules", LINEAR):
        if target not in LINEAR:
            yield f"adapters on {target}"
    if _get(config, "num_layers_in_first_pipeline_stage", 0) or _get(config, "num_layers_in_last_pipeline_stage", 0):
        yield "pipeline stages of unequal length"
    for module in sorted(set(_get(config, "recompute_modules", ())) - {"core_attn", "mlp"}):
        yield f"selective recompute of {module}"
    if _get(config, "num_moe_experts", 0):
        yield "experts (num_moe_experts)"
    if _get(config, "cpu_offloading", False):
        yield "activation offloading (cpu_offloading)"
    if _get(config, "add_bias_linear", False):
        yield "biases of linear layers"
    if _get(config, "position_embedding_type", "rope") == "learned_absolute":
        yield "learnt positions"
