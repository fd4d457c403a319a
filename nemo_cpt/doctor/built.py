"""The job that a built recipe describes: Python knows it whole, where the command line reads the recipe's source."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nemo_cpt.arguments import parameters_of
from nemo_cpt.doctor.job import FOLDER_FIELDS, Job, Place, checkpoints_at_once, exports_kept
from nemo_cpt.training.changes import trained_on
from nemo_cpt.training.fields import check_fields
from nemo_cpt.training.run_folder import Checkpoint
from nemo_cpt.training.settings import settings_in

if TYPE_CHECKING:
    from nemo_cpt.conversations import Conversations
    from nemo_cpt.corpus import Blend


def job_of(recipe: Any, place: Place) -> Job | None:
    """What a recipe's config says of its job.

    Args:
        recipe: the `run.Partial` of a recipe function, edited or not.
        place: where it is to run.

    Returns:
        The job; None for a task that trains nothing.

    Raises:
        CptError: a field was set to what it cannot be; see `check_fields`.
    """
    import nemo_run as run

    from nemo_cpt import planning

    trainer, log, data = (getattr(recipe, name, None) for name in ("trainer", "log", "data"))
    # Any function may be a task; a training is told by these two.
    if not isinstance(trainer, run.Config) or not isinstance(log, run.Config):
        return None
    check_fields(recipe)
    name, base = str(getattr(log, "name", None) or "default"), getattr(getattr(recipe, "resume", None), "base", None)
    config = getattr(getattr(recipe, "model", None), "config", None)
    callbacks = getattr(trainer, "callbacks", None) or []
    tokenizer = getattr(getattr(data, "tokenizer", None), "pretrained_model_name", None)
    read, replay = _mixtures(data)
    resume = getattr(recipe, "resume", None)
    # Of other loggers than ours, which has one owner a job, Lightning may start the processes that are missing.
    if place.processes == 1 and _kind(log) != "RunLogger":
        place = replace(place, processes=None)
    wandb = getattr(log, "wandb", None)
    ckpt, max_steps = getattr(log, "ckpt", None), _number(trainer, "max_steps")
    interval = _number(ckpt, "save_every") or _number(trainer, "val_check_interval")
    return Job(
        recipe=name,
        place=place,
        settings=settings_in(recipe),
        planned=partial(planning.read, recipe),
        model=config or {},
        unlike_base=next((each.unlike_base or () for each in callbacks if hasattr(each, "unlike_base")), ()),
        base=None if base is None else str(base),
        data=read,
        replay=replay,
        # The recipes' own default, for which the base answers.
        tokenizer=None if base is not None and tokenizer == str(Path(base, "hf")) else tokenizer,
        directory=Path(str(getattr(log, "log_dir", None) or "nemo_experiments"), name),
        gpus_per_node=(_number(trainer, "devices") or 1) if trainer.accelerator == "gpu" else 0,
        num_nodes=_number(trainer, "num_nodes") or 1,
        tensor_model_parallel_size=_number(trainer.strategy, "tensor_model_parallel_size") or 1,
        lora_rank=_number(getattr(recipe, "peft", None), "dim") or None,
        trained_embeddings=getattr(getattr(recipe, "optim", None), "embeddings_lr", None) is not None,
        global_batch_size=_number(data, "global_batch_size"),
        seq_length=_number(data, "seq_length"),
        max_steps=max_steps,
        checkpoints=0
        if trainer.enable_checkpointing is False
        else checkpoints_at_once(max_steps, interval, getattr(ckpt, "save_top_k", 3)),
        exports=next(
            (exports_kept(max_steps, each.every, each.keep) for each in callbacks if hasattr(each, "keep")), 0
        ),
        attention_backend=str(getattr(config, "attention_backend", None) or "auto").rpartition(".")[2],
        logs_to_wandb=bool(wandb) and not getattr(wandb, "offline", False),
        logs_to_mlflow=any("MLFlow" in _kind(each) for each in log.__arguments__.get("extra_loggers") or ()),
        extend=getattr(resume, "extend", None),
        deciding=partial(_deciding, recipe, read, replay) if _compares(recipe) and not _moves_its_folder(log) else None,
    )


def _compares(recipe: Any) -> bool:
    """Whether its job compares what decides its weights with a checkpoint's, and that can be told from the config."""
    # Another resumption than ours compares nothing; another function than NeMo's may change what it is given.
    return hasattr(getattr(recipe, "resume", None), "extend") and recipe.__fn_or_cls__.__module__.startswith("nemo.")


def _deciding(
    recipe: Any, read: "Blend | Conversations | None", replay: "Blend | None", checkpoint: Checkpoint
) -> dict[str, dict[str, Any]]:
    """What decides a run's weights, as its job will write it down; the same whatever the checkpoint."""
    from nemo_cpt.training.record import deciding_settings

    try:
        optim, transform = _part(recipe, "optim"), _part(recipe, "peft", "model_transform")
    except Exception:  # Megatron asks for Transformer Engine, which a machine that only launches lacks
        return {}
    module = SimpleNamespace(optim=optim, model_transform=transform)
    given = {} if read is None else _given(recipe.data)
    callbacks = getattr(recipe.trainer, "callbacks", None) or ()
    found = deciding_settings(module, SimpleNamespace(**given), recipe.trainer.max_steps, callbacks)
    if not hasattr(optim, "config"):  # the model's class makes one of its own, or it is none of Megatron's
        del found["optimizer"]
        found["schedule"] = {"max_steps": recipe.trainer.max_steps}
    data = found.pop("data")
    if read is None:  # a data module of the user's own need not keep what it is given
        return found
    del data["train"]  # which our modules know once they are built
    return found | {"data": data | trained_on(read, replay)}


def _part(recipe: Any, *names: str) -> Any:
    """A part of a recipe as its job will have it; without one NeMo takes the model's."""
    import fiddle as fdl

    found = (getattr(owner, name, None) for owner in (recipe, recipe.model) for name in names)
    part = next((each for each in found if each is not None), None)
    # What is no config would be built with a warning.
    return fdl.build(part) if isinstance(part, fdl.Buildable) else part


def _given(config: Any) -> dict[str, Any]:
    """What a config's class will be given, its own defaults too."""
    defaults = {name: each.default for name, each in parameters_of(config.__fn_or_cls__).items()}
    return defaults | config.__arguments__


def _moves_its_folder(log: Any) -> bool:
    values = log.__arguments__ | {f"ckpt.{name}": value for name, value in _arguments(log, "ckpt").items()}
    return any(values.get(path.removeprefix("log.")) for path in FOLDER_FIELDS)


def _arguments(config: Any, name: str) -> dict[str, Any]:
    return getattr(getattr(config, name, None), "__arguments__", {})


def _kind(config: Any) -> str:
    return getattr(config, "__fn_or_cls__", type(config)).__name__


def _number(config: Any, name: str) -> int:
    """An integer field; 0 where it is none, such as devices="auto"."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def _mixtures(data: Any) -> "tuple[Blend | Conversations | None, Blend | None]":
    """What our data modules read, and the text that is replayed beside it; None for another one."""
    from nemo_cpt.training.conversations import ConversationDataModule, parts_of
    from nemo_cpt.training.data import BlendDataModule, blend_of

    kind = getattr(data, "__fn_or_cls__", None)
    if kind is BlendDataModule:
        return blend_of(data.paths, data.validation, data.weighting), None
    return parts_of(data)[:2] if kind is ConversationDataModule else (None, None)
