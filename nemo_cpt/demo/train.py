"""One training job of the demo, as the executor starts it: compose the recipe, run it, export what came out."""

import json
from pathlib import Path

from nemo_cpt.training.run_folder import newest_whole


def continually_pretrain(
    name: str,
    folder: str,
    train: dict[str, float],
    validation: dict[str, str],
    max_steps: int,
    stop_at: int | None = None,
    export: bool = True,
) -> None:
    """Continue the base's pretraining with the recipe of `nemo_cpt.recipes.tiny`, in `folder`.

    Args:
        name: the run's name.
        folder: where `base_nemo`, `base_hf` and `runs` are.
        train: weight of each prepared prefix.
        validation: prefix of each named validation set.
        max_steps: steps of the whole run, and of its schedule.
        stop_at: stop in good order after this step, as a time limit would.
        export: write `NAME_hf` and the comparison with it, `NAME_verified.json`, at the end.
    """
    import nemo_run as run

    from nemo_cpt.checkpoint import verify
    from nemo_cpt.corpus import Blend
    from nemo_cpt.recipes import tiny
    from nemo_cpt.training import guards
    from nemo_cpt.training.callbacks import StopAtStep

    recipe = tiny.continual_pretrain(
        base=f"{folder}/base_nemo",
        data=Blend(train=train, validation=validation),
        name=name,
        directory=f"{folder}/runs",
        max_steps=max_steps,
        val_check_interval=max_steps // 6,
    )
    if stop_at:
        recipe.trainer.callbacks.append(run.Config(StopAtStep, step=stop_at))
    guards.check(recipe)
    run.run(recipe, direct=True)
    if export:
        # Here, in the job's process, which has NeMo: its logits are compared with the export's.
        report = verify(_export(Path(folder), name), Path(folder, f"{name}_hf"), logits=True)
        verified = {"max_logit_difference": report.logits_difference}
        Path(folder, f"{name}_verified.json").write_text(json.dumps(verified))


def instruction_tune(
    name: str,
    folder: str,
    base: str,
    train: dict[str, float],
    validation: dict[str, str],
    epochs: float,
    seq_length: int,
    global_batch_size: int,
) -> None:
    """Teach a checkpoint to answer with the recipe of `nemo_cpt.recipes.tiny`, in `folder`, and export the result.

    Args:
        name: the run's name.
        folder: where `runs` is; `NAME_hf` is written there.
        base: the checkpoint.
        train: weight of each prepared set.
        validation: prefix of each named validation set.
        epochs: how often to go through the conversations.
        seq_length: positions of a sequence.
        global_batch_size: sequences of a step.
    """
    import nemo_run as run

    from nemo_cpt.conversations import Conversations
    from nemo_cpt.recipes import tiny
    from nemo_cpt.training import guards

    recipe = tiny.instruction_tune(
        base,
        Conversations(train, validation),
        name=name,
        directory=f"{folder}/runs",
        epochs=epochs,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
    )
    guards.check(recipe)
    run.run(recipe, direct=True)
    _export(Path(folder), name)


def _export(folder: Path, name: str) -> Path:
    """Write `NAME_hf` of the run's newest checkpoint, and return the checkpoint."""
    from nemo_cpt.checkpoint import export_hf

    checkpoint = newest_whole(folder / "runs" / name / "checkpoints")
    assert checkpoint is not None, "a run that ended well has a checkpoint"
    export_hf(checkpoint.path, folder / f"{name}_hf", base=folder / "base_hf")
    return checkpoint.path
