"""Checks that stop a run which cannot do what it was meant to: before the job where possible, at step 0 otherwise."""

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch

from nemo_cpt import compatibility
from nemo_cpt.corpus import full_prefix
from nemo_cpt.errors import CptError, exit_with_the_message
from nemo_cpt.training import conversations, patches
from nemo_cpt.training.data import blend_of
from nemo_cpt.training.preconditions import check_base, check_environment
from nemo_cpt.training.resume import check_start

MARGIN_TO_UNIFORM = 0.5


class Guards(pl.Callback):
    """Check inside the job what can only be seen there; every recipe carries it.

    At the start: base, data, what belongs together, schedule, environment. In each batch: that every id has a row. At
    step 0: that the loss is not that of random weights. It gives the model the base's rows, and puts the patches of
    `nemo_cpt.training.patches` into effect before the model is built.

    Args:
        unlike_base: constants in which the model differs from its base on purpose; see `compatibility.CHANGEABLE`.
    """

    def __init__(self, unlike_base: Optional[list[str]] = None):  # noqa: UP045  NeMo-Run cannot parse `| None`
        self.unlike_base = list(unlike_base or [])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check everything that is known before the model is built, and build it with the base's rows."""
        exit_with_the_message()
        patches.apply()
        check_data(type(trainer.datamodule).__name__)
        rows, built = _on_rank_zero(trainer, lambda: self._check_belonging(trainer, pl_module))
        pl_module.config.vocab_size = built
        pl_module.__io__.config.vocab_size = built  # what checkpoints record
        pl_module.config.data_step_fn = _refusing_ids_beyond(rows, pl_module.config.data_step_fn)
        optim = pl_module.optim
        if optim.lr_scheduler is not None:
            check_schedule(optim.config.lr, optim.lr_scheduler, trainer.max_steps)
        check_sequence(pl_module.config.seq_length, trainer.strategy.context_parallel_size)
        check_environment(getattr(pl_module.config, "attention_backend", None), os.environ)
        precision: Any = getattr(trainer.precision_plugin, "dtype_config", None)
        if getattr(precision, "fp8", None):
            check_fp8(torch.cuda.get_device_capability() if torch.cuda.is_available() else None, precision.fp8_recipe)

    def _check_belonging(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[int, int]:
        """Compare base or checkpoint, model, tokenizer and data.

        Returns:
            The rows that belong to ids, and those that the model is to be built with. NeMo would take the tokenizer's
            tokens, and Megatron then cut what the base has beyond them, or add what it lacks, without a word.
        """
        weights: Any = getattr(trainer.strategy.restore_config, "path", None)
        if trainer.ckpt_path:
            weights = str(trainer.ckpt_path).removesuffix("/weights")
            compatibility.check_resumed(weights, None, pl_module.config)
        else:
            check_base(weights)
        base = compatibility.read_base(weights)
        warnings = compatibility.check(
            base,
            pl_module.config,
            _tokenizer_folder(pl_module.tokenizer),
            _prefixes(trainer.datamodule),
            self.unlike_base,
        )
        if not trainer.ckpt_path and freezes_embeddings(getattr(pl_module, "model_transform", None)):
            warnings += compatibility.check_template(base, _prefixes(trainer.datamodule))
        for warning in warnings:
            print(f"nemo_cpt: warning: {warning}", file=sys.stderr, flush=True)
        tensor_parallel = trainer.strategy.tensor_model_parallel_size
        return base.rows, compatibility.rows_to_build(base, pl_module.config, tensor_parallel)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Check the first loss of a run that starts from its base."""
        if trainer.global_step == 1 and "reduced_train_loss" in trainer.callback_metrics:
            check_first_loss(float(trainer.callback_metrics["reduced_train_loss"]), pl_module.config.vocab_size)


def check(recipe: Any) -> None:
    """Check a recipe before it is launched, without building it.

    Args:
        recipe: the `run.Partial` of a recipe function, edited or not.

    Raises:
        CptError: the job would stop or train the wrong thing; the message says what to change.
    """
    check_start(recipe)
    _check_sets(recipe)
    check_belonging(recipe)
    check_schedule(recipe.optim.config.lr, recipe.optim.lr_scheduler, recipe.trainer.max_steps)
    strategy = recipe.trainer.strategy
    check_batches(
        recipe.data.global_batch_size,
        recipe.data.micro_batch_size,
        recipe.trainer.devices * recipe.trainer.num_nodes,
        strategy.tensor_model_parallel_size * strategy.pipeline_model_parallel_size * strategy.context_parallel_size,
    )
    check_sequence(recipe.data.seq_length, strategy.context_parallel_size)
    check_environment(getattr(recipe.model.config, "attention_backend", None), os.environ)


def _check_sets(recipe: Any) -> None:
    """Check what a recipe's data module reads, and whether its layout can take it."""
    data, kind, strategy = recipe.data, _kind(recipe.data), recipe.trainer.strategy
    check_data(kind)
    if kind == "BlendDataModule":
        blend_of(data.paths, data.validation, data.weighting).check()
    if kind == "ConversationDataModule":
        conversations.check(*conversations.parts_of(data))
        conversations.check_layout(
            strategy.context_parallel_size,
            strategy.pipeline_model_parallel_size,
            1 if data.create_attention_mask else data.micro_batch_size,
        )


def _kind(data: Any) -> str:
    """The class's name of a data module, or of its config."""
    return str(getattr(data, "__fn_or_cls__", type(data)).__name__)


def check_belonging(recipe: Any) -> None:
    """Compare a recipe's model, tokenizer and data with its base, as far as base and data are on this machine.

    Raises:
        CptError: something belongs to another base.
    """
    base = getattr(recipe.resume, "base", None)
    if base is None or not Path(base).exists():
        return
    guards = [each for each in recipe.trainer.callbacks if getattr(each, "__fn_or_cls__", None) is Guards]
    prefixes = [prefix for prefix in _prefixes(recipe.data) if Path(full_prefix(prefix) + ".idx").exists()]
    tokenizer = getattr(getattr(recipe.data, "tokenizer", None), "pretrained_model_name", None)
    unlike_base = (guards[0].unlike_base if guards else None) or ()
    read = compatibility.read_base(base)
    compatibility.check(read, recipe.model.config, tokenizer, prefixes, unlike_base)
    if freezes_embeddings(getattr(recipe, "peft", None)):
        compatibility.check_template(read, prefixes)


def freezes_embeddings(peft: Any) -> bool:
    """Whether a PEFT, or its config, leaves the embedding and the output layer as they are."""
    return peft is not None and not _kind(peft).endswith("WithEmbeddings")


def _on_rank_zero(trainer: pl.Trainer, action: Callable[[], Any]) -> Any:
    """What the action returns on rank 0, or the CptError that it raises there, on every rank."""
    outcome: Any = None
    if trainer.global_rank == 0:
        try:
            outcome = action()
        except CptError as error:
            outcome = error
    outcome = trainer.strategy.broadcast(outcome, src=0)
    if isinstance(outcome, CptError):
        raise outcome
    return outcome


def _tokenizer_folder(tokenizer: Any) -> str | None:
    """Where NeMo's tokenizer was loaded from; None where it does not say."""
    return getattr(getattr(tokenizer, "tokenizer", None), "name_or_path", None)


def _prefixes(data: Any) -> list[str]:
    """The prefixes that a data module reads, built or not: our own, or NeMo's with its list or mapping of lists."""
    if isinstance(own := getattr(data, "prefixes", None), list):
        return own
    if _kind(data) == "ConversationDataModule":
        chats, replay, _ = conversations.parts_of(data)
        return chats.prefixes() + (replay.prefixes() if replay else [])
    if (built := getattr(data, "build_kwargs", None)) is not None:
        blends = built.get("blend_per_split") or [built.get("blend")]
        return list(dict.fromkeys(prefix for each in blends if each for prefix in each[0]))
    paths = getattr(data, "paths", None) or []
    lists = list(paths.values()) if isinstance(paths, dict) else [[paths] if isinstance(paths, str) else paths]
    named = [*itertools.chain(*lists), *(getattr(data, "validation", None) or {}).values()]
    return list(dict.fromkeys(str(item) for item in named if not _is_weight(item)))


def _is_weight(item: Any) -> bool:
    try:
        float(item)
    except (TypeError, ValueError):
        return False
    return True


def _refusing_ids_beyond(rows: int, data_step: Callable[..., Any]) -> Callable[..., Any]:
    """The same data step, which refuses a batch with an id that has no row, before it is trained on."""

    def step(batches: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        return data_step(map(look, batches), *args, **kwargs)

    def look(batch: Any) -> Any:
        fields = batch[0] if isinstance(batch, tuple) else batch
        compatibility.check_largest_id(max(int(fields[each].max()) for each in ("tokens", "labels")), rows, "a batch")
        return batch

    return step


def check_data(data_module: str) -> None:
    """Refuse NeMo's mock data, which a recipe without data would train on without a word."""
    if "Mock" in data_module:
        raise CptError(
            f"the run's data is {data_module}, made-up tokens: give the recipe data=Blend(train={{prefix: weight}}), "
            "with prefixes that `nemo-cpt prepare` wrote"
        )


def check_schedule(lr: float, scheduler: Any, max_steps: int) -> None:
    """Refuse a schedule whose peak is never reached, or that NeMo would reject in the middle of the run."""
    min_lr, warmup = getattr(scheduler, "min_lr", 0.0), getattr(scheduler, "warmup_steps", 0)
    if min_lr >= lr:
        raise CptError(f"min_lr {min_lr:g} is not below lr {lr:g}: set min_lr to a tenth of lr, {lr / 10:g}")
    if warmup >= max_steps:
        raise CptError(
            f"warmup_steps {warmup} is not below max_steps {max_steps}: the learning rate would never reach {lr:g}. "
            f"Set warmup_steps to a tenth of the steps, {max(max_steps // 10, 0)}"
        )


def check_batches(global_batch_size: int, micro_batch_size: int, processes: int, model_parallel: int) -> None:
    """Refuse a global batch that cannot be cut into whole micro batches for every data-parallel rank."""
    if processes % model_parallel:
        raise CptError(
            f"{processes} processes cannot be cut into groups of tensor x pipeline x context parallel = "
            f"{model_parallel}: change the parallel sizes or the number of GPUs"
        )
    data_parallel = processes // model_parallel
    if global_batch_size % (micro_batch_size * data_parallel):
        step = micro_batch_size * data_parallel
        raise CptError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x data "
            f"parallel {data_parallel}: {max(global_batch_size // step, 1) * step} would be"
        )


def check_sequence(seq_length: int, context_parallel_size: int) -> None:
    """Refuse a sequence that context parallelism cannot cut: each GPU takes two pieces, from both ends."""
    pieces = 2 * context_parallel_size
    if context_parallel_size > 1 and seq_length % pieces:
        raise CptError(
            f"seq_length {seq_length} cannot be cut into 2 x context_parallel_size = {pieces} equal pieces: "
            f"{max(seq_length // pieces, 1) * pieces} could be"
        )


def check_fp8(compute_capability: tuple[int, int] | None, scaling: str = "tensorwise") -> None:
    """Refuse fp8 where there are no matrix products of it.

    Args:
        compute_capability: of the GPU; None where there is none.
        scaling: Megatron's `fp8_recipe`; of blocks it takes Hopper.
    """
    if compute_capability is None:
        raise CptError("fp8 needs a GPU, and there is none here. Train with precision=bf16")
    least = (9, 0) if scaling == "blockwise" else (8, 9)
    if compute_capability < least:
        major, minor = compute_capability
        kinds = "9.0 (Hopper) or later, scaled in blocks" if least == (9, 0) else "8.9 (Ada), 9.0 (Hopper) or later"
        raise CptError(
            f"fp8 needs a GPU of compute capability {kinds}; this one has {major}.{minor}. "
            "Train in bf16: precision=bf16, or trainer.plugins.fp8=None"
        )


def check_first_loss(loss: float, vocab_size: int) -> None:
    """Refuse a first loss near ln(vocabulary), that of a model which knows nothing: no weights were restored."""
    uniform = math.log(vocab_size)
    if not math.isfinite(loss) or abs(loss - uniform) < MARGIN_TO_UNIFORM:
        raise CptError(
            f"the first training loss is {loss:.2f}, and random weights give ln({vocab_size}) = {uniform:.2f}: the "
            "base's weights were not restored, or the data was made with another tokenizer. Check the recipe's base "
            "and compare with `nemo-cpt verify`"
        )
