"""What users change in a recipe's config once it is made: what a field may be, before the job that would stumble on it.

A run.Config takes any value for a field, and any field where its class passes **kwargs on.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_cpt.arguments import parameters_of, plain_scalar
from nemo_cpt.errors import CptError, nearest

CHECKED = (  # the parts of a recipe that are ours or NeMo's; a callback of the user's may take what it likes
    "", "model", "model.config", "data", "trainer", "trainer.strategy", "trainer.plugins", "optim", "optim.config",
    "optim.lr_scheduler", "log", "log.ckpt", "resume", "peft",
)  # fmt: skip

KNOWN = ("nemo_cpt", "nemo", "megatron", "lightning", "torch")  # whose **kwargs go to the classes that they extend

NOT_LIGHTNINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    # Fields of Lightning's trainer that mislead: the values that are harmless, beside None, and what does it.
    "accumulate_grad_batches": (
        (1,),
        "would be passed over: micro batches are added up until they are data.global_batch_size sequences",
    ),
    "check_val_every_n_epoch": (
        (1,),
        "would leave the run without validations: it is one epoch, of max_steps steps. Those between validations are "
        "trainer.val_check_interval",
    ),
    "gradient_clip_val": ((), "would be passed over: Megatron's optimizer clips, at optim.config.clip_grad"),
    "limit_train_batches": (
        (1.0,),
        "would train on the first batches over and over, with a share of them on none, and a resumption would go on "
        "elsewhere: a shorter run is max_steps=, fewer data are a smaller dataset",
    ),
    "max_epochs": (
        (-1,),
        "would be passed over: a run has max_steps steps, over as many passes as they take; "
        "Blend(...).report(global_batch_size, seq_length) has those of a pass",
    ),
    "max_time": (
        (),
        "would end the run with exit code 0, as if it were finished: Slurm's limit is executor.time, and elsewhere "
        "`timeout --preserve-status 4h` before the command has it save, and end with 75",
    ),
    "min_epochs": ((0, 1), "would be passed over: a run has max_steps steps, over as many passes as they take"),
    "num_sanity_val_steps": (
        (-1, 0, 1),
        "would be passed over: the validation ahead of the first step is a whole one, as those that follow. Give 1, or "
        "0 for none",
    ),
    "overfit_batches": (
        (0,),
        "would train on the first batches over and over, validate on others, and go on elsewhere when it is resumed: "
        "prepare a small dataset, and train and validate on that",
    ),
    "reload_dataloaders_every_n_epochs": ((0,), "would be passed over: a run is one epoch, of max_steps steps"),
    "use_distributed_sampler": (
        (False,),
        "would have Lightning share the data out, which Megatron's sampler does: set it to False",
    ),
}

NOT_OURS: dict[str, tuple[tuple[Any, ...], str]] = {
    # Fields of NeMo's data module that ours passes over, or that make losses or the order of the data others; as above.
    "rampup_batch_size": (
        (),
        "would end the run where the batch grows, as if it were finished, and cut its validations short: a run has one "
        "batch size; for a larger one begin another, with base= this one's checkpoint",
    ),
    "dataloader_type": (
        ("single",),
        "would mix the validation sets, whose losses are told by their order: the texts are shuffled by data.seed",
    ),
    "init_consumed_samples": ((0,), "would go through the rest twice: a run goes on by itself where it stopped"),
    "init_global_step": ((0,), "would be passed over: a run goes on by itself where it stopped"),
    "split": (
        ("900,50,50",),
        "would be passed over: all of data.paths is trained on, and data.validation names what is held out, which "
        "`nemo-cpt split` makes",
    ),
    "num_val_samples": (
        (),
        "would be passed over: of each validation set trainer.limit_val_batches global batches are validated on",
    ),
    "num_test_samples": ((), "would be passed over: a training reads no test set; `nemo-cpt evaluate` does"),
    "dataset_cls": ((), "would be passed over: texts are read by Megatron's GPTDataset"),
    "mmap_bin_files": ((True,), "would be passed over: datasets are mapped into memory"),
    "object_storage_cache_path": ((), "would be passed over: datasets lie on a file system"),
}
OF_CONVERSATIONS = {"num_train_samples": ((), "would be passed over: give the recipe epochs= or max_steps=")}


def check_fields(recipe: Any) -> None:
    """Refuse a recipe of ours whose config was changed into what no job could run, or not as it was meant.

    Args:
        recipe: a run.Partial; one of others, such as NeMo's own, is let pass.

    Raises:
        CptError: a field does not exist, with the nearest ones; its data are no data module; the recipe's own callbacks
            were replaced; a field of Lightning's or NeMo's was set that would be passed over, or mislead.
    """
    if _is_ours(recipe) and (complaint := next(_complaints(recipe), None)):
        raise CptError(complaint)


def _is_ours(recipe: Any) -> bool:
    return str(getattr(_class(getattr(recipe, "resume", None)), "__module__", "")).startswith("nemo_cpt.")


def _class(config: Any) -> Any:
    return getattr(config, "__fn_or_cls__", None)


def _complaints(recipe: Any) -> Iterator[str]:
    if not _class(recipe.data) and not hasattr(recipe.data, "train_dataloader"):
        kind = type(recipe.data).__name__
        yield f"data is a {kind}, and no data module: give it to the recipe's function, data=..., which makes one of it"
    if not any(_is_guards(each) for each in recipe.trainer.callbacks or ()):
        yield (
            "trainer.callbacks has no Guards: the recipe's own callbacks were replaced, which carry its checks, "
            "metrics and patches. Add to them instead: recipe.trainer.callbacks.append(run.Config(...))"
        )
    trainer = recipe.trainer
    # As they were set, which a trainer that is built already keeps too: Lightning's own defaults are nobody's wish.
    arguments = getattr(getattr(trainer, "__io__", trainer), "__arguments__", {})
    yield from _misleading("trainer", arguments, NOT_LIGHTNINGS)
    # Of a data module of the user's, or of NeMo's own, they are what their class makes of them.
    if str(getattr(_class(recipe.data), "__module__", "")).startswith("nemo_cpt."):
        counts_itself = _class(recipe.data).__name__ == "ConversationDataModule"
        yield from _misleading(
            "data", recipe.data.__arguments__, NOT_OURS | (OF_CONVERSATIONS if counts_itself else {})
        )
    steps, least, interval = (getattr(trainer, name, None) for name in ("max_steps", "min_steps", "val_check_interval"))
    if isinstance(steps, int) and isinstance(least, int) and least > steps:
        yield f"trainer.min_steps={least} would be passed over: the run ends at max_steps {steps}"
    if isinstance(interval, float):
        yield (
            f"trainer.val_check_interval={interval} would be a share of the micro batches, and not of the steps: give "
            "a number of steps"
        )
    if getattr(trainer, "enable_checkpointing", None) is False and getattr(recipe.log, "ckpt", None) is not None:
        yield (
            "trainer.enable_checkpointing=False would be passed over: log.ckpt writes checkpoints. For a run that "
            "keeps nothing set log.ckpt to None as well"
        )
    # A trainer of the user's own need not have these fields.
    if (precision := getattr(trainer, "precision", None)) is not None and getattr(trainer, "plugins", None):
        yield f"trainer.precision={precision}: trainer.plugins has it, which the recipe's precision= sets"
    for path, config in parts_of(recipe):
        if _takes_any(_class(config)):
            continue
        known = fields_of(path, config)
        for name in config.__arguments__:
            if name not in known:
                yield f"{path}.{name}: {_class(config).__name__} has no field {name}; {nearest(name, known)}"


def _misleading(
    path: str, given: Mapping[str, Any], fields: Mapping[str, tuple[tuple[Any, ...], str]]
) -> Iterator[str]:
    for name, (harmless, instead) in fields.items():
        if (value := given.get(name)) is not None and not _is_one_of(value, harmless):
            yield f"{path}.{name}={value} {instead}"


def _is_one_of(value: Any, harmless: tuple[Any, ...]) -> bool:
    # 1 is one batch, and 1.0 all of them; 0 and 0.0 are the same.
    return any(value == each and (not each or isinstance(value, float) == isinstance(each, float)) for each in harmless)


def _is_guards(callback: Any) -> bool:
    # By its name, also a subclass of the user's: `guards` imports this module.
    kinds = getattr(_class(callback) or type(callback), "__mro__", ())
    return any(each.__name__ == "Guards" for each in kinds)


def _takes_any(kind: Any) -> bool:
    """Whether a class or function of the user's has **kwargs, of which it alone knows the names."""
    kinds = {each.kind for each in inspect.signature(kind).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds and kind.__module__.partition(".")[0] not in KNOWN


def parts_of(recipe: Any) -> Iterator[tuple[str, Any]]:
    """Those of `CHECKED` that are configs, by their paths."""
    for path in CHECKED:
        config = recipe
        for name in path.split(".") if path else ():
            config = getattr(config, name, None)
        if _class(config):
            yield path, config


def fields_of(path: str, config: Any) -> dict[str, Any]:
    """The parameters that a part of a recipe takes, by their names."""
    known: dict[str, Any] = parameters_of(_class(config))
    if path == "trainer.strategy":
        from torch.nn.parallel import DistributedDataParallel  # which Lightning's strategy hands its **kwargs on to

        known |= parameters_of(DistributedDataParallel)
    return known


def make_plain(recipe: Any) -> None:
    """Turn numpy's numbers and Paths in a recipe of ours into plain ones: NeMo-Run can send no others to a job."""
    for _, config in parts_of(recipe) if _is_ours(recipe) else ():
        for name, value in list(config.__arguments__.items()):
            if (plain := plain_scalar(value)) is not value:
                setattr(config, name, plain)
