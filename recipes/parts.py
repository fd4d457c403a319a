"""The parts that the recipes share: trainer, optimizer, data, log. Each returns an ordinary, editable run.Config."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import nemo_run as run
import torch
from lightning.pytorch.loggers import WandbLogger
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.llm.recipes.log.default import tensorboard_logger
from nemo.lightning.pytorch.callbacks import GarbageCollectionCallback
from nemo.utils.exp_manager import TimingCallback

from nemo_cpt.checkpoint.base import carried_tokenizer
from nemo_cpt.checkpoint.context import Name, nemo_model
from nemo_cpt.compatibility import check_unlike_base, positions, read_base
from nemo_cpt.conversations import Conversations
from nemo_cpt.conversations.mixture import SEED, check_replay
from nemo_cpt.corpus import Blend
from nemo_cpt.errors import CptError
from nemo_cpt.executors.examination import examine_before_launch
from nemo_cpt.executors.nemo_run_patches import surround_experiments
from nemo_cpt.monitoring.alarm import ForgettingAlarm
from nemo_cpt.monitoring.description import DescribeRun
from nemo_cpt.monitoring.forgetting import limits
from nemo_cpt.planning.recipe_writer import keep_gradients
from nemo_cpt.recipe_models import LIKE_BASE, module_named
from nemo_cpt.training.adapters import EmbeddingRateOptimizer
from nemo_cpt.training.callbacks import MetricsFile, Seed, ValidationLossBySet
from nemo_cpt.training.checkpoints import RunCheckpoint
from nemo_cpt.training.conversations import ConversationDataModule
from nemo_cpt.training.data import BlendDataModule
from nemo_cpt.training.early_stop import StopEarly
from nemo_cpt.training.exports import ExportCheckpoints
from nemo_cpt.training.gradients import EveryTrainableParameterHasGradient
from nemo_cpt.training.grown_rows import GrownRowsFirst
from nemo_cpt.training.guards import Guards
from nemo_cpt.training.logger import RunLogger
from nemo_cpt.training.loggers import ContinuedMLFlowLogger
from nemo_cpt.training.oom_advice import OutOfMemoryAdvice
from nemo_cpt.training.options import (
    LoggerOptions,
    check_exports,
    check_extend,
    check_grown_rows_first,
    check_state_precision,
    read_early_stop,
    read_logger,
    read_precision,
)
from nemo_cpt.training.preconditions import check_base
from nemo_cpt.training.preemption import SaveWhenStopped
from nemo_cpt.training.resume import KEPT_TOKENIZER, ResumeOrStartFromBase
from nemo_cpt.training.settings import Settings, check, check_name, default_min_lr

# Of every recipe, whatever executor it is given, NeMo-Run's own too.
examine_before_launch()
surround_experiments()


def trainer(
    *,
    max_steps: int,
    val_check_interval: int,
    num_nodes: int,
    gpus_per_node: int,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    sequence_parallel: bool = False,
    precision: str = "bf16",
    bf16_layers: int = 0,
    unlike_base: Sequence[str] = (),
    untrained_base: bool = False,
) -> run.Config[nl.Trainer]:
    """A trainer with Megatron's distributed optimizer; validates before the first step and then at an interval.

    Args:
        max_steps: where the run ends.
        val_check_interval: steps from one validation to the next.
        num_nodes: nodes.
        gpus_per_node: GPUs of each, a process for each.
        tensor_model_parallel_size: GPUs that share each layer.
        pipeline_model_parallel_size: GPUs, or groups of them, that the layers are dealt to.
        context_parallel_size: GPUs that share each sequence.
        sequence_parallel: whether those that share a layer share its activations too.
        precision: see `mixed_precision`.
        bf16_layers: see `mixed_precision`.
        unlike_base: see `callbacks`.
        untrained_base: see `callbacks`.

    Raises:
        CptError: see `read_precision` and `check_unlike_base`.
    """
    strategy = run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        pipeline_dtype=torch.bfloat16,
        context_parallel_size=context_parallel_size,
        sequence_parallel=sequence_parallel,
        gradient_as_bucket_view=True,
        # Training goes on while the copy is written; see docs/performance.md for what it takes of the host.
        ckpt_async_save=True,
        # Each rank reads its share from the disk, and has the others' over the network.
        ckpt_parallel_load=True,
        ddp=run.Config(
            DistributedDataParallelConfig,
            # A NaN ends the run at its step, and not in a checkpoint some steps later.
            check_for_nan_in_grad=True,
            # Sums over many ranks and micro batches lose small gradients in bf16.
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            average_in_collective=True,
        ),
    )
    return run.Config(
        nl.Trainer,
        accelerator="gpu",
        devices=gpus_per_node,
        num_nodes=num_nodes,
        strategy=strategy,
        plugins=mixed_precision(precision, bf16_layers),
        max_steps=max_steps,
        val_check_interval=val_check_interval,
        # Of each validation set: a set has a global batch, whatever the number of sets.
        limit_val_batches=1,
        # Not 0: the first line of the metrics is then the base's own loss.
        num_sanity_val_steps=1,
        log_every_n_steps=1,
        # Megatron's sampler shares the data out; Lightning's would do it a second time.
        use_distributed_sampler=False,
        callbacks=callbacks(unlike_base, untrained_base),
    )


def model_like(base: str, seq_length: int) -> run.Config:
    """The model that a base's own files describe, of the kin of Llama, Mistral, Qwen or GPT-2, for a recipe's `model=`.

    Args:
        base: folder of an imported base, or of a training's checkpoint.
        seq_length: tokens of a sequence.

    Raises:
        CptError: the base's files are not here, or describe a model that is not supported; sequences are longer than
            its learnt positions.
    """
    # Its files are read here: the shape of a base on another machine cannot be known.
    if not Path(base).exists():
        check_base(base)
    read = read_base(base)
    architecture = read.architecture
    if architecture is None:
        raise CptError(f"{base} carries no config.json of Llama, Mistral, Qwen or GPT-2: write its model= by hand")
    model = nemo_model(architecture, has_generation_config=False)
    config = model.arguments["config"]
    # What the import says for its own reading: precision and padding are the trainer's to say.
    of_the_import = ("fp16", "bf16", "params_dtype", "apply_rope_fusion", "vocab_size", "make_vocab_size_divisible_by")
    arguments = {name: value for name, value in config.arguments.items() if name not in of_the_import}
    classes = [_named(each.target) for each in (model, config)]
    arguments = {name: _named(value) if isinstance(value, Name) else value for name, value in arguments.items()}
    arguments["seq_length"] = positions(read, seq_length)
    return run.Config(classes[0], config=run.Config(classes[1], **arguments))


def _named(name: Name) -> Any:
    """What a description of `nemo_model` names: it holds no other names."""
    return getattr(import_module(name.module), name.name)


def model_of(model: run.Config | str | Callable[[int], run.Config], base: str, seq_length: int) -> run.Config:
    """The model that a recipe's `model=` stands for; see `continual.continual_pretrain`.

    Raises:
        CptError: there is no module of that name, or the base does not say its shape.
    """
    # Before its shape is asked for: `check_base` says how to give one.
    if base is None:
        check_base(base)
    if isinstance(model, run.Config):
        if getattr(model, "config", None) is None:
            raise CptError(
                f"model is a run.Config of {model.__fn_or_cls__.__name__} without a config: give one of a model, such "
                "as run.Config(llm.LlamaModel, config=run.Config(llm.Llama31Config8B))"
            )
        return model
    if model == LIKE_BASE:
        return model_like(base, seq_length)
    make = import_module(f"nemo_cpt.recipes.{module_named(model).stem}").model if isinstance(model, str) else model
    made: run.Config = make(seq_length)
    # Rows that a recipe's model states are for the planner: a base that is here may have been grown, and says its own.
    if Path(base).exists() and "vocab_size" in made.config.__arguments__:
        del made.config.vocab_size
    return made


def fused(model: run.Config) -> run.Config:
    """A model whose loss works in place on bf16 logits, and whose gradients are added up within the matrix products.

    Measured on one H200 (docs/performance.md): 8 bytes a logit less (8.4 GiB at 8192 tokens of Llama-3.1's vocabulary),
    and 10 % more tokens a second.
    """
    model.config.cross_entropy_loss_fusion, model.config.cross_entropy_fusion_impl = True, "te"
    model.config.gradient_accumulation_fusion = True
    return model


def bf16() -> run.Config[nl.MegatronMixedPrecision]:
    """Parameters and arithmetic in bf16, master weights and the reduction of gradients in fp32."""
    return run.Config(
        nl.MegatronMixedPrecision,
        precision="bf16-mixed",
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        autocast_enabled=False,  # the parameters are bf16 already
        grad_reduce_in_fp32=True,
    )


def mixed_precision(precision: str, bf16_layers: int = 0) -> run.Config[nl.MegatronMixedPrecision]:
    """bf16, or that with the linear layers' products in fp8.

    Args:
        precision: "bf16"; "fp8", each tensor scaled as a whole by its current largest value; "fp8_blockwise", in blocks
            of 128, which takes a Hopper card. Weights stay in bf16: keeping them in fp8 alone was measured slower
            (docs/performance.md).
        bf16_layers: of fp8, layers at either end that multiply in bf16, as NeMo's recipes have one.

    Raises:
        CptError: see `read_precision`.
    """
    plugin, scaling = bf16(), read_precision(precision, bf16_layers)
    if scaling is None:
        return plugin
    # E4M3 forward, where values need digits; E5M2 for gradients, which need range.
    plugin.fp8, plugin.fp8_recipe, plugin.fp8_param_gather = "hybrid", scaling, False
    if bf16_layers:
        plugin.first_last_layers_bf16 = True
        plugin.num_layers_at_start_in_bf16 = plugin.num_layers_at_end_in_bf16 = bf16_layers
    return plugin


def callbacks(unlike_base: Sequence[str] = (), untrained_base: bool = False) -> list[run.Config]:
    """What every run carries: guards, losses by validation set, metrics, alarm, timing, saving when stopped.

    Args:
        unlike_base: fields in which the model is meant to differ from its base.
        untrained_base: the base is meant to know nothing of the data, as one of random weights.

    Raises:
        CptError: see `check_unlike_base`.
    """
    check_unlike_base(unlike_base)
    return [
        run.Config(Guards, unlike_base=list(unlike_base), untrained_base=untrained_base),
        run.Config(EveryTrainableParameterHasGradient),
        run.Config(OutOfMemoryAdvice),
        run.Config(DescribeRun),
        run.Config(ValidationLossBySet),
        run.Config(MetricsFile),
        run.Config(ForgettingAlarm),
        run.Config(TimingCallback),
        # All ranks at the same steps: Python collects when it likes, and one rank's pause is everybody's.
        run.Config(GarbageCollectionCallback, gc_interval_train=100, gc_interval_val=100),
        run.Config(SaveWhenStopped),
    ]


def adam(
    *, lr: float, min_lr: float | None, warmup_steps: int | None, max_steps: int, weight_decay: float = 0.1
) -> run.Config[nl.MegatronOptimizerModule]:
    """Adam (betas 0.9 and 0.95, clip 1.0) with linear warmup and a cosine to `min_lr` at the last step.

    Args:
        lr: the peak.
        min_lr: the end; `default_min_lr(lr)` when None.
        warmup_steps: `default_warmup(max_steps)` when None.
        max_steps: the schedule's length.
        weight_decay: decoupled, on matrices only.
    """
    config = run.Config(
        OptimizerConfig,
        optimizer="adam",
        lr=lr,
        weight_decay=weight_decay,
        bf16=True,
        adam_beta1=0.9,
        adam_beta2=0.95,
        # NeMo's own recipes' value, a thousand times PyTorch's: tiny second moments then blow up no step.
        adam_eps=1e-5,
        use_distributed_optimizer=True,  # each data-parallel rank holds its share of the 12 bytes a parameter
        clip_grad=1.0,
    )
    schedule = run.Config(
        nl.lr_scheduler.CosineAnnealingScheduler,
        max_steps=max_steps,
        warmup_steps=default_warmup(max_steps) if warmup_steps is None else warmup_steps,
        constant_steps=0,  # NeMo's class has 80,000, at min_lr behind the cosine
        min_lr=default_min_lr(lr) if min_lr is None else min_lr,
    )
    return run.Config(nl.MegatronOptimizerModule, config=config, lr_scheduler=schedule)


def in_bf16(state_precision: str) -> bool:
    """Whether a recipe's `state_precision=` is bf16.

    Raises:
        CptError: it is neither fp32 nor bf16.
    """
    check_state_precision(state_precision)
    return state_precision == "bf16"


def keep_states_in_bf16(recipe: run.Partial) -> None:
    """Keep Megatron's gradient buffer and Adam's moments in bf16, and of fp32 master weights what bf16 ones lack.

    2 bytes a parameter less of gradients, and 6 of states, which the ranks share: four GPUs of 80 GB then hold whole
    layers of Llama-3.1-8B, 14 % faster than layers cut in two (docs/performance.md). Of a small model the curves stay
    within rounding and chance (`benchmarks/state_precision.py`).
    """
    keep_gradients(recipe, fp32=False)
    optimizer = recipe.optim.config
    optimizer.use_precision_aware_optimizer = True
    optimizer.exp_avg_dtype = optimizer.exp_avg_sq_dtype = torch.bfloat16


def with_embeddings_rate(optim: run.Config, embeddings_lr: float) -> run.Config[EmbeddingRateOptimizer]:
    """The same optimizer and schedule, with a peak of its own for the embedding and the output layer.

    Raises:
        CptError: it is below the schedule's `min_lr`, which both rates end at.
    """
    check(Settings(embeddings_lr=embeddings_lr, min_lr=optim.lr_scheduler.min_lr))
    return run.Config(
        EmbeddingRateOptimizer, config=optim.config, lr_scheduler=optim.lr_scheduler, embeddings_lr=embeddings_lr
    )


def default_warmup(max_steps: int) -> int:
    """A tenth of a run of less than 1000 steps; 1000 steps in a longer one, yet no more than 4 % of it.

    The recorded 150-step run warms up for 15 steps, Swallow's 25,000-step runs for 1000. Ibrahim et al.
    (arXiv 2403.08763) find the length uncritical.
    """
    return max_steps // 10 if max_steps < 1000 else min(1000, max(100, max_steps // 25))


def data(
    blend: Blend, *, tokenizer: str, seq_length: int, global_batch_size: int, micro_batch_size: int
) -> run.Config[BlendDataModule]:
    """The blend's data module, with the tokenizer of a folder or a hub name.

    Raises:
        CptError: it is no blend, of no usable form, or has test sets, which a training does not read.
    """
    if not isinstance(blend, Blend):
        raise CptError(f"data is {blend!r}: give a Blend, such as Blend(train={{'ds/ja': 0.75, 'ds/en': 0.25}})")
    blend.check_form()  # the form alone: the files may be on another machine
    # Refused, not passed over: who names a test set expects a result of it.
    if blend.test:
        raise CptError("a training reads no test sets: leave data.test away, and evaluate the exported model on them")
    return run.Config(
        BlendDataModule,
        paths=_in_turn(blend.train),
        validation=_as_text(blend.validation),
        weighting=blend.weighting,
        **_reading(tokenizer, seq_length, global_batch_size, micro_batch_size),
    )


def conversations(
    data: Conversations,
    replay: Blend | None,
    replay_share: float,
    *,
    tokenizer: str,
    seq_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    epochs: float | None = None,
) -> run.Config[ConversationDataModule]:
    """The data module of conversations, and of the text that is replayed beside them.

    Raises:
        CptError: the data are of another kind, or the replay's share does not fit them.
    """
    if not isinstance(data, Conversations):
        raise CptError(f"data is {data!r}: give Conversations, such as Conversations(train={{'sft/ja': 1.0}})")
    if replay is not None and not isinstance(replay, Blend):
        raise CptError(f"replay is {replay!r}: give a Blend, such as Blend(train={{'ds/en': 1.0}})")
    data.check_form()
    if replay is not None:
        replay.check_form()
    check_replay(replay, replay_share, data)
    replayed = {
        "replay_paths": _in_turn(replay.train),
        "replay_validation": _as_text(replay.validation),
        "replay_weighting": replay.weighting,
        "replay_share": replay_share,
    } if replay else {}  # fmt: skip
    return run.Config(
        ConversationDataModule,
        paths=_in_turn(data.train),
        validation=_as_text(data.validation),
        too_long=data.too_long,
        **_reading(tokenizer, seq_length, global_batch_size, micro_batch_size),
        **replayed | ({"epochs": epochs} if epochs else {}),
    )


def _reading(tokenizer: str, seq_length: int, global_batch_size: int, micro_batch_size: int) -> dict[str, Any]:
    """The fields that every data module takes.

    Raises:
        CptError: the tokenizer has no name.
    """
    if not tokenizer:
        raise CptError("tokenizer is empty: give a folder or a name on the hub, or None for the base's own")
    return {
        "tokenizer": run.Config(AutoTokenizer, pretrained_model_name=tokenizer),
        "seq_length": seq_length,
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        # Few: sequences are cut from a memory map, without tokenizing.
        "num_workers": 2,
        # Validation sets would start new workers, which import torch, at each validation.
        "persistent_workers": True,
    }


def _in_turn(weights: Mapping[str, float]) -> list[float | str]:
    """Megatron's flat list of weights and prefixes."""
    return [item for prefix, weight in weights.items() for item in (float(weight), prefix)]


def _as_text(sets: Mapping[str, Any]) -> dict[str, str]:
    """Prefixes by name, also those that are Paths, which a config of it as YAML could not hold."""
    return {name: str(prefix) for name, prefix in sets.items()}


def tokenizer(base: str, directory: str, name: str) -> str:
    """Folder of the base's own tokenizer; where the base is gone, of the copy that the run keeps of it.

    An import has it in `hf`, a training's checkpoint in its context.
    """
    kept = Path(directory, name, KEPT_TOKENIZER)
    # The base before the run's copy: a base that was imported anew is the newer one.
    return str(carried_tokenizer(Path(base)) or (kept if kept.is_dir() else Path(base, "hf")))


def set_seed(recipe: run.Partial, seed: int) -> None:
    """Have a recipe's data read in another order, and its adapters begin with other values.

    Raises:
        CptError: it is no seed.
    """
    check(Settings(seed=seed))
    recipe.data.seed = seed
    # The default seed is Megatron's own: a recipe that leaves it needs no callback.
    if seed != SEED:
        recipe.trainer.callbacks.append(run.Config(Seed, seed=seed))


def stop_early(recipe: run.Partial, early_stop: str | None, patience: int | None) -> None:
    """Have a recipe end when a validation set's loss falls no more; see `continual.continual_pretrain`.

    Raises:
        CptError: there is no such set, or a patience without one.
    """
    if (wanted := read_early_stop(early_stop, patience, _validation_sets(recipe))) is not None:
        recipe.trainer.callbacks.append(run.Config(StopEarly, validation_set=wanted[0], patience=wanted[1]))


def stop_when_worse(recipe: run.Partial, stop_when: Mapping[str, str] | None) -> None:
    """Have a recipe stop when a validation set has got worse than before; see `continual.continual_pretrain`.

    Raises:
        CptError: there is no such set, or a limit is no percentage.
    """
    if limits(stop_when, _validation_sets(recipe)):
        # Every recipe carries one, which warns; limits make it stop as well.
        (alarm,) = (each for each in recipe.trainer.callbacks if each.__fn_or_cls__ is ForgettingAlarm)
        alarm.stop_when = dict(stop_when or {})


def train_grown_rows_first(recipe: run.Partial, steps: int | None) -> None:
    """Have a recipe train a grown base's new rows alone at first; see `continual.continual_pretrain`.

    Raises:
        CptError: there are no steps, or the base, where it is on this machine, has not grown.
    """
    # What a base grew by is noted beside its tokenizer.
    folder = Path(recipe.data.tokenizer.pretrained_model_name)
    check_grown_rows_first(steps, folder if folder.is_dir() else None)
    if steps is not None:
        recipe.trainer.callbacks.append(run.Config(GrownRowsFirst, steps=steps))


def _validation_sets(recipe: run.Partial) -> list[str]:
    return [*recipe.data.validation, *(getattr(recipe.data, "replay_validation", None) or {})]


def log(
    directory: str, name: str, save_every: int | None = None, logger: str | Mapping[str, Any] | None = None
) -> run.Config[RunLogger]:
    """Log to `directory/name`; keep the three best checkpoints and the last.

    Args:
        directory: where runs are kept.
        name: the run's.
        save_every: steps between checkpoints; with None one follows each validation.
        logger: another logger beside TensorBoard; see `continual.continual_pretrain`.

    Raises:
        CptError: there is no such logger, or the name is no folder's.
    """
    check_name(name, directory)
    checkpoints = run.Config(
        RunCheckpoint,
        save_every=save_every,
        # The mean over the validation sets, as `ValidationLossBySet` logs it.
        monitor="val_loss",
        save_top_k=3,
        # A link: `-last` costs no second copy of 100 GB.
        save_last="link",
        # Else a finished run could not be extended.
        save_optim_on_train_end=True,
        filename="{steps:.0f}-{val_loss:.4f}",
    )
    return run.Config(
        RunLogger,
        log_dir=directory,
        name=name,
        # One folder a name, or a run would not find its own checkpoints when it is started again.
        use_datetime_version=False,
        ckpt=checkpoints,
        tensorboard=tensorboard_logger(name=name),
        **_other_logger(read_logger(logger), directory, name),
    )


def _other_logger(logger: LoggerOptions, directory: str, name: str) -> dict[str, Any]:
    """The field of NeMo's logger that holds W&B's or MLflow's."""
    if logger.kind == "wandb":
        # NeMo puts the folder below `directory`. `id` is filled in, and the run continued, by executors.tracking.
        fields = {"entity": logger.entity, "group": logger.group, "tags": list(logger.tags) or None}
        given = {field: value for field, value in fields.items() if value is not None}
        return {
            "wandb": run.Config(
                WandbLogger,
                project=logger.project,
                name=logger.name or name,
                save_dir=name,
                offline=logger.offline,
                **given,
            )
        }
    if logger.kind == "mlflow":
        tags = {tag: "true" for tag in logger.tags} | ({"group": logger.group} if logger.group else {})
        return {
            "extra_loggers": [
                run.Config(
                    ContinuedMLFlowLogger,
                    note=str(Path(directory, name, "mlflow", "run_id")),
                    experiment_name=logger.project,
                    run_name=logger.name or name,
                    tags=tags or None,
                    save_dir=str(Path(directory, "mlruns")),
                    **({"tracking_uri": logger.uri} if logger.uri else {}),
                )
            ]
        }
    return {}


def export_along(recipe: run.Partial, every: int | None, keep: int | None = None) -> None:
    """Have a recipe's run export its checkpoints while it trains; see `ExportCheckpoints`.

    Args:
        recipe: it gets a callback more.
        every: steps between exports; no callback when None.
        keep: how many exports are kept; all when None.

    Raises:
        CptError: see `check_exports`.
    """
    check_exports(every, keep, recipe.log.ckpt.save_every or recipe.trainer.val_check_interval)
    if every is not None:
        recipe.trainer.callbacks.append(run.Config(ExportCheckpoints, every=every, keep=keep))


def resume(base: str, extend: str | None = None) -> run.Config[ResumeOrStartFromBase]:
    """Resume the run's newest whole checkpoint, else start from the base's weights with a fresh schedule.

    Args:
        base: folder of the NeMo checkpoint to start from.
        extend: what becomes of the learning rate when the schedule changed; see `ResumeOrStartFromBase`.

    Raises:
        CptError: there is no such `extend`.
    """
    check_extend(extend)
    return run.Config(ResumeOrStartFromBase, base=base, extend=extend)
