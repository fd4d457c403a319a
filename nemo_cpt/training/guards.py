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
from nemo_cpt.training import conversations, patches, settings
from nemo_cpt.training.callbacks import end_with
from nemo_cpt.training.data import blend_of
from nemo_cpt.training.fields import check_fields
from nemo_cpt.training.preconditions import check_base, check_environment
from nemo_cpt.training.record import reads_masks
from nemo_cpt.training.resume import check_start
from nemo_cpt.training.run_folder import newest_whole
from nemo_cpt.training.settings import Settings, settings_in

MARGIN_TO_UNIFORM = 0.5  # nats per token: a base that knows its data is some nats below


class Guards(pl.Callback):
    """Check inside the job what can only be seen there; every recipe carries it.

    At the start: base, data, what belongs together, schedule, environment. In each batch: that every id has a row. At
    step 0: that the loss is not that of random weights. It gives the model the base's rows, and puts the patches of
    `nemo_cpt.training.patches` into effect before the model is built.

    Args:
        unlike_base: constants in which the model differs from its base on purpose; see `compatibility.CHANGEABLE`.
        untrained_base: whether a first loss like that of random weights is to be expected.
    """

    def __init__(
        self,
        unlike_base: Optional[list[str]] = None,  # noqa: UP045  NeMo-Run cannot parse `| None`
        untrained_base: bool = False,
    ):
        self.unlike_base = list(unlike_base or [])
        self.untrained_base = untrained_base

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check everything that is known before the model is built, and build it with the base's rows."""
        # First of all: whatever the checks below say must end the process with its line and its code.
        exit_with_the_message()
        # Before the model is built: several of them act in constructors.
        patches.apply()
        check_data(type(trainer.datamodule).__name__)
        if not trainer.ckpt_path:  # a run that was begun with them can only go on with them
            check_resets(trainer.datamodule, pl_module.config)
        # On one rank: a thousand that read manifests and configurations at once would stall a shared file system.
        rows, built = _on_rank_zero(trainer, lambda: self._check_belonging(trainer, pl_module))
        pl_module.config.vocab_size = built
        pl_module.__io__.config.vocab_size = built  # what checkpoints record
        # A GPU says of an id without a row only that some kernel failed, some kernels later.
        pl_module.config.data_step_fn = _refusing_ids_beyond(rows, pl_module.config.data_step_fn)
        optim = pl_module.optim
        if optim.lr_scheduler is not None:
            check_schedule(optim.config.lr, optim.lr_scheduler, trainer.max_steps)
        settings.check(
            Settings(
                seq_length=pl_module.config.seq_length,
                context_parallel_size=trainer.strategy.context_parallel_size,
                gpus_per_node=trainer.world_size,
            )
        )
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
        # A resumed run is compared with its checkpoint: that its base is still there is not needed.
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
        # Once, at the start: a resumed run has trained with that template already.
        if not trainer.ckpt_path and freezes_embeddings(getattr(pl_module, "model_transform", None)):
            warnings += compatibility.check_template(base, _prefixes(trainer.datamodule))
        for warning in warnings:
            print(f"nemo_cpt: warning: {warning}", file=sys.stderr, flush=True)
        tensor_parallel = trainer.strategy.tensor_model_parallel_size
        return base.rows, compatibility.rows_to_build(base, pl_module.config, tensor_parallel)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Check the first loss of a run that starts from its base."""
        # global_step counts the step that just ended; a resumed run begins above 1.
        if trainer.global_step == 1 and "reduced_train_loss" in trainer.callback_metrics:
            loss = float(trainer.callback_metrics["reduced_train_loss"])
            check_first_loss(loss, pl_module.config.vocab_size, self.untrained_base)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say of a gradient that is no number what it means: started again as it was, the run would end there again."""
        if isinstance(exception, RuntimeError) and "in local grad norm" in str(exception):  # Megatron's check_grads
            newest = newest_whole(Path(str(getattr(trainer.checkpoint_callback, "dirpath", None))))
            rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
            named = newest.path.name if newest else None
            error = CptError(diverged(trainer.global_step + 1, max(rates, default=0.0), named))
            end_with(trainer, pl_module, self, error, exception)


def diverged(step: int, lr: float, checkpoint: str | None) -> str:
    """What to do about a gradient that is no number.

    Args:
        step: that had it.
        lr: the step's learning rate.
        checkpoint: the newest whole one; None where there is none yet.
    """
    said = f"step {step} has a gradient that is NaN or infinite, at a learning rate of {lr:g}"
    if step == 1:
        return f"{said}: the base's weights are damaged, or of another model. Compare them with `nemo-cpt verify`"
    kept = f"Go on from {checkpoint}, which is whole," if checkpoint else "Begin again"
    return f"{said}: the training has diverged. {kept} with a smaller lr= or a longer warmup (warmup_steps=)"


def check(recipe: Any) -> None:
    """Check a recipe before it is launched, without building it.

    Args:
        recipe: the `run.Partial` of a recipe function, edited or not.

    Raises:
        CptError: the job would stop or train the wrong thing; the message says what to change.
    """
    if not hasattr(recipe, "trainer"):
        raise CptError(f"{recipe!r} is no recipe: give what a recipe's function returns")
    check_fields(recipe)
    numbers = settings_in(recipe)  # what a field cannot hold, ahead of what it ought to
    check_start(recipe)
    _check_sets(recipe)
    check_belonging(recipe)
    settings.check(numbers)
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
    # A recipe may be checked on a laptop for a cluster: what is not here is checked in the job.
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
    # The error travels as a value: a rank that raised alone would leave the others in this broadcast for ever.
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
    # NeMo's PreTrainingDataModule keeps no `paths`: what it was given is in here, already paired with weights.
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
        # Lazily: nothing is drawn from the loader that the step does not ask for.
        return data_step(map(look, batches), *args, **kwargs)

    def look(batch: Any) -> Any:
        fields = batch[0] if isinstance(batch, tuple) else batch
        compatibility.check_largest_id(max(int(fields[each].max()) for each in ("tokens", "labels")), rows, "a batch")
        return batch

    return step


def check_data(data_module: str) -> None:
    """Refuse NeMo's mock data, which a recipe without data would train on without a word."""
    # By name: a user's own subclass of it is just as made up.
    if "Mock" in data_module:
        raise CptError(
            f"the run's data is {data_module}, made-up tokens: give the recipe data=Blend(train={{prefix: weight}}), "
            "with prefixes that `nemo-cpt prepare` wrote"
        )


def check_resets(data: Any, model_config: Any) -> None:
    """Refuse resets at a document's end that Megatron and NeMo take, and that would change nothing.

    Args:
        data: the data module.
        model_config: the model's.

    Raises:
        CptError: one of them is set.
    """
    why = {}
    if model_config.position_embedding_type == "rope":
        why["reset_position_ids"] = "rotary embeddings count from a sequence's beginning, whatever the positions are"
    if not reads_masks(data, model_config):
        why["reset_attention_mask"] = "Transformer Engine's causal attention reads no mask"
    for name, reason in why.items():
        if getattr(data, name, False):
            raise CptError(f"{name}=True would change nothing: {reason}. Leave it away")


def check_schedule(lr: float, scheduler: Any, max_steps: int) -> None:
    """Refuse a schedule whose peak is never reached, or that NeMo would reject in the middle of the run."""
    min_lr, warmup = getattr(scheduler, "min_lr", 0.0), getattr(scheduler, "warmup_steps", 0)
    settings.check(Settings(lr=lr, min_lr=min_lr, warmup_steps=warmup, max_steps=max_steps))


def check_fp8(compute_capability: tuple[int, int] | None, scaling: str = "tensorwise") -> None:
    """Refuse fp8 where there are no matrix products of it.

    Args:
        compute_capability: of the GPU; None where there is none.
        scaling: Megatron's `fp8_recipe`; of blocks it takes Hopper.
    """
    if compute_capability is None:
        raise CptError("fp8 needs a GPU, and there is none here. Train with precision=bf16")
    # Transformer Engine's own bounds: fp8 products begin with Ada, those scaled in blocks with Hopper.
    least = (9, 0) if scaling == "blockwise" else (8, 9)
    if compute_capability < least:
        major, minor = compute_capability
        kinds = "9.0 (Hopper) or later, scaled in blocks" if least == (9, 0) else "8.9 (Ada), 9.0 (Hopper) or later"
        raise CptError(
            f"fp8 needs a GPU of compute capability {kinds}; this one has {major}.{minor}. "
            "Train in bf16: precision=bf16, or trainer.plugins.fp8=None"
        )


def check_first_loss(loss: float, vocab_size: int, untrained_base: bool = False) -> None:
    """Refuse a first loss near ln(vocabulary), that of a model which knows nothing: no weights were restored.

    Args:
        loss: in nats per token.
        vocab_size: of the model.
        untrained_base: its base knows nothing, so that only a loss that is no number is refused.
    """
    # The cross entropy of equal probabilities: what random weights give, whatever the text.
    uniform = math.log(vocab_size)
    if not math.isfinite(loss) or (not untrained_base and abs(loss - uniform) < MARGIN_TO_UNIFORM):
        raise CptError(
            f"the first training loss is {loss:.2f}, and random weights give ln({vocab_size}) = {uniform:.2f}: the "
            "base's weights were not restored, or the data was made with another tokenizer. Check the recipe's base "
            "and compare with `nemo-cpt verify`. If the base has barely been trained, give untrained_base=true"
        )
