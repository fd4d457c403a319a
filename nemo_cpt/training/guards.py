"""Checks that stop a run which cannot do what it was meant to: before the job where possible, at step 0 otherwise."""

import math
import os
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_cpt import corpus
from nemo_cpt.errors import CptError, exit_with_the_message
from nemo_cpt.training import upstream
from nemo_cpt.training.data import blend_of
from nemo_cpt.training.preconditions import check_base, check_environment
from nemo_cpt.training.resume import check_start

MARGIN_TO_UNIFORM = 0.5


class Guards(pl.Callback):
    """Check inside the job what can only be seen there; every recipe carries it.

    At the start: base, data, vocabulary, schedule, environment. At step 0: that the loss is not that of random
    weights. It also puts the cures of `nemo_cpt.training.upstream` into effect before the model is built.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check everything that is known before the model is built."""
        exit_with_the_message()
        upstream.apply()
        if not trainer.ckpt_path:
            check_base(getattr(trainer.strategy.restore_config, "path", None))
        check_data(type(trainer.datamodule).__name__)
        if (blend := getattr(trainer.datamodule, "blend", None)) is not None:
            check_vocabulary(blend, pl_module.tokenizer.vocab_size)
        optim = pl_module.optim
        if optim.lr_scheduler is not None:
            check_schedule(optim.config.lr, optim.lr_scheduler, trainer.max_steps)
        check_sequence(pl_module.config.seq_length, trainer.strategy.context_parallel_size)
        check_environment(getattr(pl_module.config, "attention_backend", None), os.environ)
        precision = getattr(trainer.precision_plugin, "dtype_config", None)
        if getattr(precision, "fp8", None) and torch.cuda.is_available():
            check_fp8(torch.cuda.get_device_capability())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Check the first loss of a run that starts from its base."""
        if trainer.global_step == 1 and "reduced_train_loss" in trainer.callback_metrics:
            check_first_loss(float(trainer.callback_metrics["reduced_train_loss"]), pl_module.tokenizer.vocab_size)


def check(recipe: Any) -> None:
    """Check a recipe before it is launched, without building it.

    Args:
        recipe: the `run.Partial` of a recipe function, edited or not.

    Raises:
        CptError: the job would stop or train the wrong thing; the message says what to change.
    """
    check_start(recipe)
    check_data(recipe.data.__fn_or_cls__.__name__)
    if recipe.data.__fn_or_cls__.__name__ == "BlendDataModule":
        blend_of(recipe.data.paths, recipe.data.validation, recipe.data.weighting).check()
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


def check_data(data_module: str) -> None:
    """Refuse NeMo's mock data, which a recipe without data would train on without a word."""
    if "Mock" in data_module:
        raise CptError(
            f"the run's data is {data_module}, made-up tokens: give the recipe data=Blend(train={{prefix: weight}}), "
            "with prefixes that `nemo-cpt prepare` wrote"
        )


def check_vocabulary(blend: "corpus.Blend", vocab_size: int) -> None:
    """Refuse a dataset made with another vocabulary than the model's.

    What `prepare` wrote says so itself; of any other dataset the largest token id is looked for, in its whole `.bin`.
    """
    for prefix in [*blend.train, *blend.validation.values()]:
        made_for = _prepared_vocabulary(prefix)
        largest = corpus.max_token_id(prefix) if made_for is None else made_for - 1
        if largest >= vocab_size or (made_for or vocab_size) != vocab_size:
            found = f"holds the token id {largest}" if made_for is None else f"was made for {made_for} tokens"
            raise CptError(
                f"{prefix} {found}, but the model's vocabulary has {vocab_size} tokens: it was made with another "
                "tokenizer. Prepare it again with the base's own"
            )


def _prepared_vocabulary(prefix: str) -> int | None:
    try:
        return corpus.read_manifest(prefix)["tokenizer"]["vocabulary_size"]
    except CptError:
        return None


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


def check_fp8(compute_capability: tuple[int, int]) -> None:
    """Refuse fp8 on a GPU older than Ada (8.9) and Hopper (9.0), which have no fp8 matrix products."""
    if compute_capability < (8, 9):
        major, minor = compute_capability
        raise CptError(
            f"fp8 needs a GPU of compute capability 8.9 (Ada), 9.0 (Hopper) or later; this one has {major}.{minor}. "
            "Train in bf16: trainer.plugins.fp8=None"
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
