"""How a run was started, written down with each checkpoint."""

import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.collections.llm.gpt.model.base import HAVE_TE, local_layer_spec

from nemo_cpt.checkpoint.chat_template import RECORD, recorded_template
from nemo_cpt.checkpoint.provenance import BEFORE, trainings_of
from nemo_cpt.checkpoint.weights_digest import BASE_WEIGHTS, base_weights_of, weights_digest
from nemo_cpt.conversations.dataset import is_conversations
from nemo_cpt.corpus.dataset.index import full_prefix
from nemo_cpt.training.changes import GROWN_ROWS_FIRST, content_of, same, sets_of
from nemo_cpt.training.masks import RESETS
from nemo_cpt.training.run_folder import resumed_from

_OPTIMIZER = ("optimizer", "adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "clip_grad", "sgd_momentum")
_MOMENTS = ("exp_avg_dtype", "exp_avg_sq_dtype")  # checkpoints hold them in fp32
_STATES = ("use_precision_aware_optimizer", "store_param_remainders")
_DATA = (
    "global_batch_size", "seq_length", "seed", "too_long", "replay_share",
    "reset_position_ids", "reset_attention_mask", "eod_mask_loss",
)  # fmt: skip
_NOT_OF_A_SCHEDULE = ("interval", "frequency", "monitor", "max_steps")  # max_steps: NeMo takes the trainer's

# Weak: a trainer that is done with must not be kept alive, with its model, for a few settings.
_known: weakref.WeakKeyDictionary[pl.Trainer, dict[str, Any]] = weakref.WeakKeyDictionary()


def record_of(trainer: pl.Trainer) -> dict[str, Any]:
    """What a checkpoint's `run.json` holds: the step, how the run was started, its validation."""
    return {"step": trainer.global_step, **_start(trainer), "validated_on": _validated_on(trainer)}


def _validated_on(trainer: pl.Trainer) -> dict[str, Any]:
    """Where the validation texts are, and how they are read: not compared when a run is resumed elsewhere."""
    data, config = trainer.datamodule, trainer.lightning_module.config
    sets = _validation_sets(data)
    texts = {name: prefix for name, prefix in sets.items() if not is_conversations(prefix)}
    batches = next((len(getattr(data, "validation_weights", {}).get(name, [])) for name in texts), None)
    # What comes of the settings: rotary embeddings read no positions (megatron-core, GPTModel.forward).
    heeded = {
        "reset_attention_mask": reads_masks(data, config),
        "reset_position_ids": config.position_embedding_type == "learned_absolute",
    }
    return {
        "sets": {name: str(Path(full_prefix(prefix)).absolute()) for name, prefix in texts.items()},
        "conversations": {name: str(Path(prefix).absolute()) for name, prefix in sets.items() if name not in texts},
        "samples": batches and batches * data.global_batch_size,
        "seq_length": getattr(data, "seq_length", None),
        **{name: bool(heeded[name] and getattr(data, name, False)) for name in RESETS},
    }


def reads_masks(data: Any, model_config: Any) -> bool:
    """Whether a model's attention reads a mask that its data give: Transformer Engine's causal one reads none."""
    is_megatrons = not HAVE_TE or model_config.transformer_layer_spec is local_layer_spec  # as on a CPU, also beside it
    return is_megatrons and getattr(data, "create_attention_mask", False)


def settings_of(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """A run's settings by group, as they were at its start: what decides its losses, step by step.

    The model's own shape and constants are compared elsewhere, with the base's.
    """
    return _start(trainer)["settings"]


def template_of(trainer: pl.Trainer) -> Mapping[str, Any] | None:
    """The chat template that exports of a run's checkpoints carry; see `_template`."""
    found: Mapping[str, Any] | None = _start(trainer)[RECORD]
    return found


def validated_otherwise(trainer: pl.Trainer) -> list[str]:
    """The validation sets that hold, or are validated on, other samples than where the checkpoint was written."""
    checkpoint, now = resumed_from(trainer.ckpt_path), settings_of(trainer)["validation"]
    was = checkpoint.record.get("settings", {}).get("validation", {}) if checkpoint else {}
    return [
        name
        for name in now["sets"]
        if any(name in was.get(kind, {}) and not same(was[kind][name], now[kind].get(name)) for kind in now)
    ]


def _start(trainer: pl.Trainer) -> dict[str, Any]:
    """A run's settings and chat template as they were when this was first called."""
    # Once, at the start: what changes while the run goes on is not how it was started.
    if trainer not in _known:
        data = trainer.datamodule
        settings = deciding_settings(trainer.lightning_module, data, trainer.max_steps, trainer.callbacks) | {
            "states": {name: getattr(_optimizer(trainer.lightning_module), name, None) for name in _STATES},
            "layout": _layout(trainer),
            "validation": {
                "sets": {name: content_of(prefix) for name, prefix in _validation_sets(data).items()},
                "batches": {name: len(of_set) for name, of_set in getattr(data, "validation_weights", {}).items()},
            },
        }
        _known[trainer] = {
            "settings": settings,
            RECORD: _template(trainer),
            BEFORE: _before(trainer),
            BASE_WEIGHTS: _base_weights(trainer),
        }
    return _known[trainer]


def deciding_settings(
    module: Any, data: Any, max_steps: int, callbacks: Iterable[Any] = ()
) -> dict[str, dict[str, Any]]:
    """The settings, by group, that decide what weights a run ends with.

    Args:
        module: NeMo's model, with its optimizer and PEFT.
        data: the data module.
        max_steps: the run's length.
        callbacks: the trainer's, or their configs.
    """
    optimizer = {name: getattr(_optimizer(module), name, None) for name in _OPTIMIZER}
    return {
        "schedule": _schedule(module, max_steps),
        "optimizer": optimizer | {GROWN_ROWS_FIRST: _grown_rows_first(callbacks)},
        "data": {name: getattr(data, name, None) for name in _DATA} | {"train": _training_sets(data)},
        "adapters": _adapters(module),
    }


def _base_weights(trainer: pl.Trainer) -> str | None:
    """What tells the weights of the base that the run began with from others'; None where it was not written down."""
    if trainer.ckpt_path:
        return base_weights_of(_start_folder(trainer.ckpt_path))
    base = getattr(getattr(trainer.strategy, "restore_config", None), "path", None)
    # On rank 0, which writes records: a thousand ranks need not read them.
    return weights_digest(_start_folder(base)) if base and trainer.is_global_zero else None


def _before(trainer: pl.Trainer) -> list[Mapping[str, Any]]:
    """The records of the trainings that led to the checkpoint that this one started from, the first one first."""
    if trainer.ckpt_path:
        return trainings_of(_start_folder(trainer.ckpt_path))[:-1]
    base = getattr(getattr(trainer.strategy, "restore_config", None), "path", None)
    return trainings_of(_start_folder(base)) if base else []


def _start_folder(path: Any) -> Path:
    return Path(str(path).removesuffix("/weights"))


def _template(trainer: pl.Trainer) -> Mapping[str, Any] | None:
    """The chat template of the data's conversations, as their manifest has it, for exports of the checkpoints.

    A run that reads texts alone hands on what the checkpoint that it started from has recorded.
    """
    base = getattr(trainer.strategy, "restore_config", None)
    start = trainer.ckpt_path or getattr(base, "path", None)
    own = getattr(trainer.datamodule, "template", None)
    # An export of the new run wants the template of the conversations it was tuned on, also after more text.
    return own or (recorded_template(_start_folder(start)) if start else None)


def _schedule(module: Any, max_steps: int) -> dict[str, Any]:
    optim = getattr(module, "optim", None)
    scheduler = getattr(optim, "lr_scheduler", None)
    own = {name: value for name, value in _plain(scheduler).items() if name not in _NOT_OF_A_SCHEDULE}
    rates = {"lr": getattr(_optimizer(module), "lr", None), "embeddings_lr": getattr(optim, "embeddings_lr", None)}
    return {"max_steps": max_steps, **rates, "lr_scheduler": type(scheduler).__name__, **own}


def _optimizer(module: Any) -> Any:
    return getattr(getattr(module, "optim", None), "config", None)


def _grown_rows_first(callbacks: Iterable[Any]) -> int | None:
    # By its name: `grown_rows` imports this module.
    kinds = {getattr(each, "__fn_or_cls__", type(each)).__name__: each for each in callbacks}
    return getattr(kinds.get("GrownRowsFirst"), "steps", None)


def _adapters(module: Any) -> dict[str, Any]:
    transform = getattr(module, "model_transform", None)
    return {"peft": type(transform).__name__, **_plain(transform)} if transform is not None else {"peft": None}


def _layout(trainer: pl.Trainer) -> dict[str, Any]:
    names = [f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context", "expert_model")]
    return {
        "processes": trainer.world_size,
        **{name: getattr(trainer.strategy, name, None) for name in names},
        "micro_batch_size": getattr(trainer.datamodule, "micro_batch_size", None),
        "precision": str(trainer.precision),
        **{name: str(getattr(_optimizer(trainer.lightning_module), name, None)) for name in _MOMENTS},
    }


def _training_sets(data: Any) -> list[list[Any]] | None:
    sets = getattr(data, "training_sets", None)
    return sets and sets_of(sets)


def _validation_sets(data: Any) -> dict[str, str]:
    return getattr(data, "validation_sets", None) or {}


def _plain(settings: Any) -> dict[str, Any]:
    """The fields of an object that JSON holds as they are."""
    found = vars(settings) if settings is not None else {}
    return {name: value for name, value in sorted(found.items()) if _is_plain(value) and not name.startswith("_")}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
