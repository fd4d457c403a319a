"""Instruction tuning, whatever the model: the recipes' shared function and their default data.

The loss counts every trained token of a step once (`calculate_per_token_loss`), so that the result does not depend on
the micro batch, on which conversations share a sequence, or on how many GPUs share the batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nemo_run as run
from nemo.collections import llm

from nemo_cpt.arguments import checked
from nemo_cpt.conversations import Conversations, mixture
from nemo_cpt.conversations.dataset import conversations_prefix
from nemo_cpt.corpus import Blend
from nemo_cpt.planning import ALLOWED, fit
from nemo_cpt.planning.recipe_reader import check_layout
from nemo_cpt.recipes import parts
from nemo_cpt.recipes.continual import with_lora
from nemo_cpt.training.guards import check_belonging
from nemo_cpt.training.settings import Settings, check, settings_in

SEQ_LENGTH, RANK = 4096, 32  # of LoRA, where the user leaves them open and they fit
UNCOUNTED_STEPS = 300  # in a recipe that is made where its conversations are not


def default_data() -> Conversations:
    """Japanese conversations, with a validation set."""
    return Conversations(train={"sft/ja": 1.0}, validation={"ja": "sft/ja_validation"})


@checked
def instruction_tune(
    model: run.Config | str | Callable[[int], run.Config],
    base: str,
    data: Conversations | None = None,
    *,
    replay: Blend | None = None,
    replay_share: float | None = None,
    tokenizer: str | None = None,
    name: str = "sft",
    directory: str = "results",
    num_nodes: int = 1,
    gpus_per_node: int = 8,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    seq_length: int = 4096,
    global_batch_size: int = 32,
    micro_batch_size: int = 1,
    epochs: float | None = None,
    max_steps: int | None = None,
    val_check_interval: int | None = None,
    limit_val_batches: int = 8,
    lr: float = 5e-6,
    min_lr: float = 0.0,
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
) -> run.Partial:
    """Teach a model to answer, on prepared conversations. The models' own `instruction_tune` have its defaults.

    Learning rate, epochs, sequence length and warmup are those of Tülu 3's 8B (arXiv 2411.15124), whose batch of 128
    conversations fills about 32 packed sequences of 4096. There is no weight decay, as in its open-instruct.

    Args:
        model: see `continual.continual_pretrain`.
        base: folder of a NeMo checkpoint: an imported model, or a checkpoint of a training run.
        data: what to train and validate on, as `nemo-cpt prepare --template` wrote it; `default_data()` when None.
        replay: pretraining text to mix in, against forgetting, with validation sets of its own; none when None.
        replay_share: share of the sequences that are such text, every token of which is trained on; 0.05 when None.
        tokenizer: folder or hub name of a Hugging Face tokenizer; the base's own when None.
        name: the run's name; its checkpoints and logs go to `directory/name`.
        directory: where runs are kept.
        num_nodes: machines.
        gpus_per_node: GPUs of each.
        tensor_model_parallel_size: GPUs that share each layer.
        pipeline_model_parallel_size: groups of layers on different GPUs.
        seq_length: positions of a sequence, which holds as many whole conversations as fit.
        global_batch_size: sequences of a step, over all GPUs.
        micro_batch_size: sequences of one forward pass on one GPU.
        epochs: how often to go through the conversations, as the unit of length; 2 when neither it nor max_steps is
            given. Where the conversations are not on this machine, give max_steps, or launch with `nemo-cpt run`.
        max_steps: steps, in the place of epochs.
        val_check_interval: steps between validations; a tenth of the steps when None.
        limit_val_batches: the most global batches to validate on from each set; of replay's sets, just as many.
        lr: peak learning rate.
        min_lr: learning rate at the end.
        warmup_steps: 3 % of the steps when None.
        precision: see `continual.continual_pretrain`.
        bf16_layers: see `continual.continual_pretrain`.
        state_precision: see `continual.continual_pretrain`.
        unlike_base: see `continual.continual_pretrain`.
        save_every: see `continual.continual_pretrain`.
        export_every: see `continual.continual_pretrain`.
        export_keep: see `continual.continual_pretrain`.
        extend: see `continual.continual_pretrain`.
        seed: see `continual.continual_pretrain`.
        logger: see `continual.continual_pretrain`.
        early_stop: see `continual.continual_pretrain`.
        patience: see `continual.continual_pretrain`.
        untrained_base: see `continual.continual_pretrain`.
        stop_when: see `continual.continual_pretrain`.

    Returns:
        A run.Partial of `llm.finetune`; every field stays editable.

    Raises:
        CptError: data or replay is of another kind, epochs and max_steps are both given; sizes or rates with which no
            job could run (`settings.check`); the model cannot be cut so, or its products be made in fp8; or, where base
            and data are on this machine, they do not belong together.
    """
    # What the steps are counted by, and what would be taken for "not given".
    check(Settings(epochs=epochs, max_steps=max_steps, seq_length=seq_length, global_batch_size=global_batch_size))
    check(Settings(seed=seed, val_check_interval=val_check_interval, limit_val_batches=limit_val_batches))
    data = data or default_data()
    # Settled before the steps are counted, which it lengthens.
    share = mixture.replay_share(replay, replay_share)
    steps, uncounted = _steps(data, epochs, max_steps, global_batch_size, seq_length, share, seed)
    recipe = run.Partial(
        llm.finetune,
        model=per_token_loss(parts.fused(parts.model_of(model, base, seq_length))),
        data=parts.conversations(
            data,
            replay,
            share,
            tokenizer=parts.tokenizer(base, directory, name) if tokenizer is None else tokenizer,
            seq_length=seq_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            epochs=uncounted,
        ),
        trainer=parts.trainer(
            max_steps=steps,
            val_check_interval=val_check_interval or max(steps // 10, 1),
            num_nodes=num_nodes,
            gpus_per_node=gpus_per_node,
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            sequence_parallel=tensor_model_parallel_size > 1,
            precision=precision,
            bf16_layers=bf16_layers,
            unlike_base=unlike_base,
            untrained_base=untrained_base,
        ),
        optim=parts.adam(
            lr=lr,
            min_lr=min_lr,
            warmup_steps=default_warmup(steps) if warmup_steps is None else warmup_steps,
            max_steps=steps,  # which the conversations decide, unless max_steps is given
            weight_decay=0.0,
        ),
        log=parts.log(directory, name, save_every, logger),
        resume=parts.resume(base, extend),
        tokenizer="data",
    )
    if parts.in_bf16(state_precision):
        parts.keep_states_in_bf16(recipe)
    recipe.trainer.limit_val_batches = limit_val_batches
    recipe.trainer.strategy.ddp.average_in_collective = False  # Megatron divides by the tokens of all ranks instead
    parts.set_seed(recipe, seed)
    parts.stop_early(recipe, early_stop, patience)
    parts.stop_when_worse(recipe, stop_when)
    parts.export_along(recipe, export_every, export_keep)
    check(settings_in(recipe))
    check_belonging(recipe)
    check_layout(recipe)
    return recipe


@checked
def instruction_tune_lora(
    model: run.Config | str | Callable[[int], run.Config],
    base: str,
    data: Conversations | None = None,
    *,
    gpu_memory_gib: float,
    rank: int | None = None,
    seq_length: int | None = None,
    lr: float = 1e-4,
    embeddings_lr: float | None = None,
    peft_scheme: str = "lora",
    **kwargs,
) -> run.Partial:
    """Instruction tuning with LoRA on every linear layer: what the recipes of all models share.

    Adapters of rank 32 and alpha of twice the rank: instructions take less of them than a language does (arXiv
    2405.09673 tries 16 to 256). Layout, micro batch and recomputation are what `planning.fit` finds fastest for the
    cards with 5 % to spare; where that rank does not fit, it is halved until it does, then the sequence.

    Args:
        model: see `instruction_tune`.
        base: see `instruction_tune`.
        data: see `instruction_tune`. The special tokens of its template must have been trained in the base, or
            embeddings_lr be given.
        gpu_memory_gib: the card's memory as sold.
        rank: rank of the adapters; 32, or the largest half of it that fits, when None.
        seq_length: see `instruction_tune`; 4096, or the largest half of it that fits, when None.
        lr: peak learning rate of the adapters, that of NeMo's own finetune_recipe of all these models for LoRA.
        embeddings_lr: see `continual.continual_pretrain_lora`.
        peft_scheme: see `continual.continual_pretrain_lora`.
        **kwargs: see `instruction_tune`.

    Returns:
        A run.Partial of `llm.finetune`; every field stays editable.

    Raises:
        CptError: nothing fits the card; or as `instruction_tune`.
    """
    wanted = SEQ_LENGTH if seq_length is None else seq_length
    recipe = instruction_tune(model, base, data, seq_length=wanted, lr=lr, **kwargs)
    # What the user gave is not the planner's to change; what was left open is.
    given_up = [knob for knob, value in (("rank", rank), ("seq_length", seq_length)) if value is None]
    recipe = with_lora(recipe, RANK if rank is None else rank, embeddings_lr, peft_scheme)
    # Again, with the adapters: frozen embeddings cannot learn a template's special tokens.
    check_belonging(recipe)
    fitted = fit(recipe, gpu_memory_gib, allow=[*ALLOWED, *given_up]).recipe
    # Where the planner cut the sequence, conversations are packed anew, and an epoch has other steps.
    if fitted.data.seq_length == wanted:
        return fitted
    shorter = {"seq_length": fitted.data.seq_length}
    same = {"rank": rank, "lr": lr, "embeddings_lr": embeddings_lr, "peft_scheme": peft_scheme}
    return instruction_tune_lora(model, base, data, gpu_memory_gib=gpu_memory_gib, **same | shorter | kwargs)


def per_token_loss(model: run.Config) -> run.Config:
    """A model whose gradient is that of the mean over all trained tokens of a step, not of the micro batches' means."""
    model.config.calculate_per_token_loss = True
    return model


def default_warmup(max_steps: int) -> int:
    """3 % of the steps, at least one where there are several."""
    # Below the number of steps, or the peak would never be reached.
    return min(math.ceil(0.03 * max_steps), max_steps - 1)


def _steps(
    data: Conversations,
    epochs: float | None,
    max_steps: int | None,
    global_batch_size: int,
    seq_length: int,
    replay_share: float,
    seed: int,
) -> tuple[int, float | None]:
    """A run's steps, and its epochs where their steps cannot be counted here."""
    if max_steps is not None:
        return max_steps, None
    epochs = mixture.EPOCHS if epochs is None else epochs
    if not isinstance(data, Conversations) or not all(
        Path(conversations_prefix(prefix) + ".idx").exists() for prefix in data.train
    ):
        # The job counts them, and refuses to begin with another number; see `ConversationDataModule.epochs`.
        return UNCOUNTED_STEPS, epochs
    return data.steps(epochs, global_batch_size, seq_length, replay_share, seed), None
