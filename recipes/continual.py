"""Continual pretraining, whatever the model: the recipes' shared function, their default data, and LoRA."""

from collections.abc import Sequence

import nemo_run as run
from nemo.collections import llm

from nemo_cpt.corpus import Blend
from nemo_cpt.recipes import parts
from nemo_cpt.training.adapters import adapters_class
from nemo_cpt.training.guards import check_batches, check_belonging

LINEAR_LAYERS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def default_data() -> Blend:
    """Japanese with a quarter of English replay, the share that Ibrahim et al. (arXiv 2403.08763) find best for a
    strong shift, and a validation set of each language."""
    return Blend.replay("ds/ja", "ds/en", share=0.25, validation={"ja": "ds/ja_validation", "en": "ds/en_validation"})


def continual_pretrain(
    model: run.Config | str,
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
    seq_length: int,
    global_batch_size: int,
    micro_batch_size: int = 1,
    max_steps: int,
    val_check_interval: int,
    lr: float,
    min_lr: float | None = None,
    warmup_steps: int | None = None,
    unlike_base: Sequence[str] = (),
    save_every: int | None = None,
    extend: str | None = None,
) -> run.Partial:
    """Continual pretraining of every parameter: what the recipes of all models share.

    Args:
        model: the model to train: "base" for the shape that the base's own config.json has, the name of a module of
            recipes for that one's (smollm2), or a run.Config.
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
        seq_length: tokens of a sequence.
        global_batch_size: sequences of a step, over all GPUs.
        micro_batch_size: sequences of one forward pass on one GPU.
        max_steps: steps, and the length of the learning-rate schedule.
        val_check_interval: steps between validations; the last step is validated as well.
        lr: peak learning rate.
        min_lr: learning rate at the end; a tenth of `lr` when None.
        warmup_steps: `parts.default_warmup(max_steps)` when None, 15 of 150.
        unlike_base: in what the model differs from its base on purpose, of rope_theta, rope_scaling, sliding_window,
            rms_norm_eps and eos_token_id; an export writes it into config.json. Anything else that differs is refused.
        save_every: steps between checkpoints; one follows each validation when None.
        extend: "rewarm", "stretch" or "keep": what becomes of the learning rate when the run is resumed with another
            max_steps, lr, min_lr or warmup_steps; see `ResumeOrStartFromBase`.

    Returns:
        A run.Partial of `llm.pretrain`; every field stays editable.

    Raises:
        CptError: `data` is no Blend, the global batch does not divide among the GPUs; or, where the base is on this
            machine, model, tokenizer or data do not belong to it.
    """
    model_parallel = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    # First: these sizes must go together whatever base and data are.
    check_batches(global_batch_size, micro_batch_size, num_nodes * gpus_per_node, model_parallel)
    recipe = run.Partial(
        llm.pretrain,
        model=parts.fused(parts.model_of(model, base, seq_length)),
        data=parts.data(
            data or default_data(),
            tokenizer=tokenizer or parts.tokenizer(base, directory, name),
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
            unlike_base=unlike_base,
        ),
        optim=parts.adam(lr=lr, min_lr=min_lr, warmup_steps=warmup_steps, max_steps=max_steps),
        log=parts.log(directory, name, save_every),
        resume=parts.resume(base, extend),
    )
    # On the finished recipe: what belongs together is compared as the job will have it.
    check_belonging(recipe)
    return recipe


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
        CptError: `embeddings_lr` is below the schedule's min_lr; there is no such `peft_scheme`.
    """
    rank, adapters = rank or 128, adapters_class(peft_scheme, embeddings_lr is not None)
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
