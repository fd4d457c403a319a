"""Continual pretraining, whatever the model: the recipes' shared function, their default data, and LoRA."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nemo_run as run
import torch
from nemo.collections import llm

from nemo_cpt.arguments import checked
from nemo_cpt.corpus import Blend
from nemo_cpt.errors import CptError
from nemo_cpt.planning import ALLOWED, fit
from nemo_cpt.planning.recipe_reader import check_layout
from nemo_cpt.recipes import parts
from nemo_cpt.training.adapters import adapters_class
from nemo_cpt.training.grown_rows import GrownRowsFirst
from nemo_cpt.training.guards import check_belonging
from nemo_cpt.training.options import check_grown_rows_first, check_state_precision
from nemo_cpt.training.settings import Settings, check, settings_in

# By Megatron's names: query, key and value are one layer there, gate and up another.
LINEAR_LAYERS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def default_data() -> Blend:
    """Japanese with a quarter of English replay, the share that Ibrahim et al. (arXiv 2403.08763) find best for a
    strong shift, and a validation set of each language."""
    return Blend.replay("ds/ja", "ds/en", share=0.25, validation={"ja": "ds/ja_validation", "en": "ds/en_validation"})


@checked
def continual_pretrain(
    model: run.Config | str | Callable[[int], run.Config],
    base: str,
    data: Blend | None = None,
    *,
    name: str,
    tokenizer: str | None = None,
    directory: str = "results",
    num_nodes: int = 1,
    gpus_per_node: int = 1,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    gpu_memory_gib: float | None = None,
    seq_length: int = 8192,
    global_batch_size: int = 1024,
    micro_batch_size: int = 1,
    max_steps: int = 150,
    val_check_interval: int = 15,
    lr: float = 2.5e-5,
    min_lr: float | None = None,
    warmup_steps: int | None = None,
    precision: str = "bf16",
    bf16_layers: int = 0,
    state_precision: str = "fp32",
    unlike_base: Sequence[str] = (),
    save_every: int | None = None,
    export_every: int | None = None,
    export_keep: int | None = None,
    extend: str | None = None,
    seed: int = 1234,
    logger: str | Mapping[str, Any] | None = None,
    early_stop: str | None = None,
    patience: int | None = None,
    untrained_base: bool = False,
    stop_when: Mapping[str, Any] | None = None,
    grown_rows_first: int | None = None,
) -> run.Partial:
    """Continual pretraining of every parameter: what the recipes of all models share.

    Lengths and learning rate are those of the recorded run that taught Llama-3.1-8B Japanese (NVIDIA's Japanese blog on
    continual pretraining with NeMo): 150 steps of 1024 x 8192 tokens = 1.26 B tokens.

    Args:
        model: the model to train: "base" for the shape that the base's own config.json has, the name of a module of
            recipes for that one's (smollm2), a run.Config, or a function that makes one for a sequence's length.
        base: folder of the NeMo checkpoint to continue from, made by `nemo-cpt import`.
        data: what to train and validate on; `default_data()` when None.
        name: the run's name; its checkpoints and logs go to `directory/name`.
        tokenizer: folder or hub name of a Hugging Face tokenizer; the base's own when None.
        directory: where runs are kept.
        num_nodes: machines.
        gpus_per_node: GPUs of each.
        tensor_model_parallel_size: GPUs that share each layer.
        pipeline_model_parallel_size: groups of layers on different GPUs.
        context_parallel_size: GPUs that share each sequence.
        gpu_memory_gib: the card's memory as sold. Given, tensor and pipeline parallel size, micro batch and
            recomputation are what `planning.fit` finds fastest for it with 5 % to spare, in the place of the recipe's.
        seq_length: tokens of a sequence.
        global_batch_size: sequences of a step, over all GPUs.
        micro_batch_size: sequences of one forward pass on one GPU.
        max_steps: steps, and the length of the learning-rate schedule.
        val_check_interval: steps between validations; the last step is validated as well.
        lr: peak learning rate.
        min_lr: learning rate at the end; a tenth of `lr` when None.
        warmup_steps: `parts.default_warmup(max_steps)` when None, 15 of 150.
        precision: "bf16", "fp8" or "fp8_blockwise"; see `parts.mixed_precision`.
        bf16_layers: of fp8, layers at either end that multiply in bf16.
        state_precision: of gradients and Adam's moments, "fp32" or "bf16"; master weights are fp32 in either. See
            `parts.keep_states_in_bf16`.
        unlike_base: in what the model differs from its base on purpose, of rope_theta, rope_scaling, sliding_window,
            rms_norm_eps and eos_token_id; an export writes it into config.json. Anything else that differs is refused.
        save_every: steps between checkpoints; one follows each validation when None.
        export_every: steps between exports to Hugging Face folders in `exports` of the run's folder, made beside the
            training; none when None. See `ExportCheckpoints`.
        export_keep: how many of these are kept, the newest; all when None.
        extend: "rewarm", "stretch" or "keep": what becomes of the learning rate when the run is resumed with another
            max_steps, lr, min_lr or warmup_steps; see `ResumeOrStartFromBase`.
        seed: of the order in which the data are read, and of the adapters' first values.
        logger: where the numbers go beside TensorBoard and `metrics/`: "wandb:PROJECT", "mlflow:EXPERIMENT", or a
            mapping: {wandb: PROJECT, name: NAME, group: NAME, tags: [NAME], entity: TEAM, offline: true}; MLflow's
            takes uri, and neither entity nor offline. A resumed run goes on in the same one.
        early_stop: name of a validation set: the run ends when its loss has not fallen for `patience` validations.
        patience: 3 when None.
        untrained_base: whether the base knows next to nothing, so that a first loss like that of random weights is
            no fault; else such a run is stopped.
        stop_when: of validation sets, by how many percent their loss may rise over that before the training, such as
            {"en": "+3%"}: then the run saves and stops, with exit code 75.
        grown_rows_first: steps at the beginning in which only the rows are trained that `nemo-cpt grow` gave the base.

    Returns:
        A run.Partial of `llm.pretrain`; every field stays editable.

    Raises:
        CptError: `data` is no Blend; sizes or rates with which no job could run (`settings.check`); nothing fits
            `gpu_memory_gib`; the model cannot be cut so, or its products be made in fp8; or, where the base is on this
            machine, model, tokenizer or data do not belong to it.
    """
    if gpu_memory_gib is not None:  # where the planner's search begins
        tensor_model_parallel_size = pipeline_model_parallel_size = micro_batch_size = 1
    # llm.pretrain, not a function of ours: `nemo llm` and NeMo's own YAML take it as one of theirs.
    recipe = run.Partial(
        llm.pretrain,
        model=parts.fused(parts.model_of(model, base, seq_length)),
        data=parts.data(
            data or default_data(),
            tokenizer=parts.tokenizer(base, directory, name) if tokenizer is None else tokenizer,
            seq_length=seq_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
        ),
        trainer=parts.trainer(
            max_steps=max_steps,
            val_check_interval=val_check_interval,
            num_nodes=num_nodes,
            gpus_per_node=gpus_per_node,
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            context_parallel_size=context_parallel_size,
            # Beside tensor parallelism it sends no more, and cuts the activations between its layers as well.
            sequence_parallel=tensor_model_parallel_size > 1,
            precision=precision,
            bf16_layers=bf16_layers,
            unlike_base=unlike_base,
            untrained_base=untrained_base,
        ),
        # The schedule is as long as the run: one of another length would end on its way down, or train on at min_lr.
        optim=parts.adam(lr=lr, min_lr=min_lr, warmup_steps=warmup_steps, max_steps=max_steps),
        log=parts.log(directory, name, save_every, logger),
        resume=parts.resume(base, extend),
    )
    if parts.in_bf16(state_precision):
        parts.keep_states_in_bf16(recipe)
    # Each reads what the recipe has by now: its data, its validation sets, where and how often it saves.
    parts.set_seed(recipe, seed)
    parts.stop_early(recipe, early_stop, patience)
    parts.stop_when_worse(recipe, stop_when)
    parts.export_along(recipe, export_every, export_keep)
    parts.train_grown_rows_first(recipe, grown_rows_first)
    # On the finished recipe: what belongs together is looked at as the job will have it.
    check(settings_in(recipe))
    check_belonging(recipe)
    check_layout(recipe)
    return recipe if gpu_memory_gib is None else fit(recipe, gpu_memory_gib).recipe


@checked
def continual_pretrain_lora(
    model: run.Config | str | Callable[[int], run.Config],
    base: str,
    data: Blend | None = None,
    *,
    gpu_memory_gib: float,
    rank: int | None = None,
    seq_length: int | None = None,
    global_batch_size: int = 32,
    lr: float = 1e-4,
    embeddings_lr: float | None = None,
    peft_scheme: str = "lora",
    **kwargs,
) -> run.Partial:
    """Continual pretraining of LoRA on every linear layer: what the recipes of all models share.

    The base is frozen; adapters of rank 128 and alpha of twice the rank are trained on all linear layers, after "LoRA
    Learns Less and Forgets Less" (arXiv 2405.09673: alpha 2 x rank, all linear layers, learning rates of 1e-5 to 5e-4).
    Layout, micro batch and recomputation are what `planning.fit` finds fastest for the cards with 5 % to spare; where
    rank 128 does not fit, the rank is halved until it does, then the sequence.

    Args:
        model: see `continual_pretrain`.
        base: see `continual_pretrain`.
        data: see `continual_pretrain`.
        gpu_memory_gib: the card's memory as sold.
        rank: rank of the adapters; 128, or the largest half of it that fits, when None.
        seq_length: see `continual_pretrain`; 8192, or the largest half of it that fits, when None.
        global_batch_size: see `continual_pretrain`.
        lr: peak learning rate of the adapters.
        embeddings_lr: peak learning rate of the embedding and the output layer, trained whole beside the adapters;
            frozen when None. See `with_lora`.
        peft_scheme: "lora" or "dora". See `with_lora`.
        **kwargs: see `continual_pretrain`.

    Returns:
        A run.Partial of `llm.finetune`; every field stays editable.

    Raises:
        CptError: nothing fits the card; `data` is no Blend; there is no such `peft_scheme`.
    """
    # Where it is left open, the search begins with the longest, and halves it.
    sizes = {"seq_length": 8192 if seq_length is None else seq_length, "global_batch_size": global_batch_size}
    recipe = continual_pretrain(model, base, data, lr=lr, **sizes | kwargs)
    # What the user gave is not the planner's to change; what was left open is.
    given_up = [knob for knob, value in (("rank", rank), ("seq_length", seq_length)) if value is None]
    adapted = with_lora(recipe, rank, embeddings_lr, peft_scheme)
    return fit(adapted, gpu_memory_gib, allow=[*ALLOWED, *given_up]).recipe


@checked
def with_lora(
    recipe: run.Partial, rank: int | None = 128, embeddings_lr: float | None = None, peft_scheme: str = "lora"
) -> run.Partial:
    """The same run with the base frozen and LoRA trained, through `llm.finetune`: llm.pretrain takes no adapters.

    Args:
        recipe: a full-parameter recipe; its parts are reused.
        rank: of the adapters; alpha is twice that.
        embeddings_lr: peak learning rate of the embedding and the output layer, which are then trained whole; both
            stay frozen when None. Lower than the adapters' rate: a fifth to a tenth of it is usual (Unsloth,
            "Continued LLM Pretraining", 2024).
        peft_scheme: "lora", or "dora", which trains the norms of the weights' rows beside low-rank changes of their
            directions (arXiv 2402.09353); `nemo-cpt plan` tells what it costs.

    Raises:
        CptError: `rank` is not positive, `embeddings_lr` neither or below the schedule's min_lr; there is no such
            `peft_scheme`; the recipe trains a grown base's new rows first, and they are frozen.
    """
    check(Settings(rank=rank, embeddings_lr=embeddings_lr))
    # It may stand in the full-parameter recipe that this one is made of.
    grown = next((each for each in recipe.trainer.callbacks if each.__fn_or_cls__ is GrownRowsFirst), None)
    check_grown_rows_first(grown and grown.steps, None, frozen=embeddings_lr is None)
    if getattr(recipe.model.config, "position_embedding_type", None) == "learned_absolute":
        raise CptError("adapters on GPT-2's layers cannot be exported: train every parameter, without peft")
    if getattr(recipe.optim.config, "exp_avg_dtype", None) == torch.bfloat16:
        check_state_precision("bf16", adapters=True)
    rank, adapters = 128 if rank is None else rank, adapters_class(peft_scheme, embeddings_lr is not None)
    recipe.model.config.gradient_accumulation_fusion = False  # the adapters' gradients are small
    return run.Partial(
        llm.finetune,
        model=recipe.model,
        data=recipe.data,
        trainer=recipe.trainer,
        optim=recipe.optim if embeddings_lr is None else parts.with_embeddings_rate(recipe.optim, embeddings_lr),
        log=recipe.log,
        resume=recipe.resume,
        # alpha / rank = 2, which stays so where the planner halves the rank.
        peft=run.Config(adapters, dim=rank, alpha=2 * rank, target_modules=LINEAR_LAYERS),
        # The model gets the data's tokenizer, so that the two cannot differ.
        tokenizer="data",
    )
