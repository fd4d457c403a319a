"""How a run was started, written down with each checkpoint; and what is different when it is started again."""

import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nemo_cpt.checkpoint.chat_template import RECORD, recorded_template
from nemo_cpt.checkpoint.provenance import BEFORE, trainings_of
from nemo_cpt.conversations.dataset import is_conversations
from nemo_cpt.corpus.dataset.index import full_prefix

_OPTIMIZER = ("optimizer", "adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "clip_grad", "sgd_momentum")
_DATA = ("global_batch_size", "seq_length", "seed", "too_long", "replay_share")
_NOT_OF_A_SCHEDULE = ("interval", "frequency", "monitor", "max_steps")  # max_steps: NeMo takes the trainer's
_SAMPLE_BYTES = 2**16

# Weak: a trainer that is done with must not be kept alive, with its model, for a few settings.
_known: weakref.WeakKeyDictionary[pl.Trainer, dict[str, Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was when the checkpoint was written.

    Attributes:
        group: `schedule`, `optimizer`, `data`, `adapters`, `layout` or `validation`.
        name: of the setting, as in the recipe.
        was: its value in the checkpoint's run.
        now: its value.
    """

    group: str
    name: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} {_shown(self.was)} -> {_shown(self.now)}"


def record_of(trainer: pl.Trainer) -> dict[str, Any]:
    """What a checkpoint's `run.json` holds: the step, how the run was started, its validation."""
    return {"step": trainer.global_step, **_start(trainer), "validated_on": _validated_on(trainer)}


def _validated_on(trainer: pl.Trainer) -> dict[str, Any]:
    """Where the validation texts are, and the sequences of each: not compared when a run is resumed elsewhere."""
    data = trainer.datamodule
    texts = {name: prefix for name, prefix in _validation_sets(data).items() if not is_conversations(prefix)}
    batches = next((len(getattr(data, "validation_weights", {}).get(name, [])) for name in texts), None)
    return {
        "sets": {name: str(Path(full_prefix(prefix)).absolute()) for name, prefix in texts.items()},
        "samples": batches and batches * data.global_batch_size,
        "seq_length": getattr(data, "seq_length", None),
    }


def settings_of(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """A run's settings by group, as they were at its start: what decides its losses, step by step.

    The model's own shape and constants are compared elsewhere, with the base's.
    """
    return _start(trainer)["settings"]


def _start(trainer: pl.Trainer) -> dict[str, Any]:
    """A run's settings and chat template as they were when this was first called."""
    # Once, at the start: what changes while the run goes on is not how it was started.
    if trainer not in _known:
        data = trainer.datamodule
        settings = {
            "schedule": _schedule(trainer),
            "optimizer": {name: getattr(_optimizer(trainer), name, None) for name in _OPTIMIZER},
            "data": {name: getattr(data, name, None) for name in _DATA} | {"train": _training_sets(data)},
            "adapters": _adapters(trainer),
            "layout": _layout(trainer),
            "validation": {"sets": {name: _content(prefix) for name, prefix in _validation_sets(data).items()}},
        }
        _known[trainer] = {"settings": settings, RECORD: _template(trainer), BEFORE: _before(trainer)}
    return _known[trainer]


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


def changes(was: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[Change]:
    """What differs between two runs' settings; what either does not know is not compared."""
    return [
        Change(group, name, was[group][name], value)
        for group, settings in now.items()
        for name, value in settings.items()
        # What an older version did not write down is not taken for a change.
        if name in was.get(group, {}) and was[group][name] != value
    ]


def _schedule(trainer: pl.Trainer) -> dict[str, Any]:
    optim = getattr(trainer.lightning_module, "optim", None)
    scheduler = getattr(optim, "lr_scheduler", None)
    own = {name: value for name, value in _plain(scheduler).items() if name not in _NOT_OF_A_SCHEDULE}
    rates = {"lr": getattr(_optimizer(trainer), "lr", None), "embeddings_lr": getattr(optim, "embeddings_lr", None)}
    return {"max_steps": trainer.max_steps, **rates, "lr_scheduler": type(scheduler).__name__, **own}


def _optimizer(trainer: pl.Trainer) -> Any:
    return getattr(getattr(trainer.lightning_module, "optim", None), "config", None)


def _adapters(trainer: pl.Trainer) -> dict[str, Any]:
    transform = getattr(trainer.lightning_module, "model_transform", None)
    return {"peft": type(transform).__name__, **_plain(transform)} if transform is not None else {"peft": None}


def _layout(trainer: pl.Trainer) -> dict[str, Any]:
    names = [f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context", "expert_model")]
    return {
        "processes": trainer.world_size,
        **{name: getattr(trainer.strategy, name, None) for name in names},
        "micro_batch_size": getattr(trainer.datamodule, "micro_batch_size", None),
        "precision": str(trainer.precision),
    }


def _training_sets(data: Any) -> list[list[Any]] | None:
    sets = getattr(data, "training_sets", None)
    return sets and [[weight, _content(prefix)] for prefix, weight in sets.items()]


def _validation_sets(data: Any) -> dict[str, str]:
    return getattr(data, "validation_sets", None) or {}


def _content(prefix: str) -> str:
    """A dataset's name, and a hash of its files' sizes, beginnings and ends: the same wherever it was copied to."""
    digest = hashlib.blake2b(digest_size=8)
    full = full_prefix(prefix)
    for suffix in (".idx", ".bin", *([".mask"] if Path(full + ".mask").exists() else [])):  # conversations have one
        with open(full + suffix, "rb") as file:
            size = file.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            for start in (0, max(size - _SAMPLE_BYTES, 0)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"{Path(prefix).name.removesuffix('_text_document')}:{digest.hexdigest()}"


def _plain(settings: Any) -> dict[str, Any]:
    """The fields of an object that JSON holds as they are."""
    found = vars(settings) if settings is not None else {}
    return {name: value for name, value in sorted(found.items()) if _is_plain(value) and not name.startswith("_")}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
