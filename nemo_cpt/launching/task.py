"""What `nemo-cpt run` submits: the recipe's name and arguments, so that the launcher itself need not import NeMo."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_cpt import catalog
from nemo_cpt.catalog.build import build_recipe
from nemo_cpt.executors.tracking import EXPERIMENT
from nemo_cpt.launching.description import describe, moves_its_folder


def run_recipe(recipe: str, arguments: dict[str, Any], overrides: list[str]) -> None:
    """Build a recipe in the job and run it: it saves on SIGTERM, and under Slurm its trainer takes the job's nodes.

    A run that is finished, or that another job trains, is left alone before NeMo is imported.
    """
    # Before NeMo: of a chain of jobs the last ones often find the run finished.
    if said := nothing_to_train(recipe, arguments, overrides):
        return print(f"nemo_cpt: {said}", flush=True)
    import fiddle as fdl

    from nemo_cpt.executors.stopping import save_on_sigterm
    from nemo_cpt.executors.tracking import continue_wandb_run
    from nemo_cpt.monitoring.description import launched
    from nemo_cpt.training import guards

    # For `metrics/run.json`: the built recipe no longer says what it was made of.
    launched.update(recipe=recipe, arguments=arguments, fields=overrides)
    partial = build_recipe(recipe, arguments, overrides)
    if hasattr(partial, "trainer") and (nodes := nodes_of_its_job()):
        # Slurm decided how many nodes the job has; the recipe could only guess.
        partial.trainer.num_nodes = nodes
    # In the job once more: base and data may be on the cluster alone.
    guards.check(partial)
    continue_wandb_run(partial)
    save_on_sigterm(partial)
    fdl.build(partial)()


def nodes_of_its_job() -> int | None:
    """The nodes of the Slurm job that this process is a task of.

    None elsewhere, also for a local job that was started in somebody's allocation of several nodes.
    """
    nodes = os.environ.get("SLURM_NNODES")
    return int(nodes) if nodes and EXPERIMENT in os.environ else None


def nothing_to_train(recipe: str, arguments: Mapping[str, Any], overrides: Sequence[str], here: bool = True) -> str:
    """What to say of a run that is finished, by its folder; empty where there are steps to train, or no telling.

    Args:
        recipe: as for `build_recipe`.
        arguments: as for `build_recipe`.
        overrides: as for `build_recipe`.
        here: the run is to start on this machine, now.

    Raises:
        CptError: a field is wrong; the run is finished, and was trained otherwise or from another base, or is not, and
            cannot go on like this; another job holds the run's folder, and it is to start now.
    """
    from nemo_cpt.compatibility import check_resumed
    from nemo_cpt.training.changes import check_started_again
    from nemo_cpt.training.run_folder import EXPORTS, finished, newest_whole
    from nemo_cpt.training.run_lock import check_free

    # Where the folder is set by hand, it is not known without building the recipe.
    if moves_its_folder(overrides):
        return ""
    job = describe(catalog.recipe(recipe), arguments, overrides, "local", ())
    said = finished(job.directory / "checkpoints", job.max_steps, exporting=bool(job.exports))
    if newest := newest_whole(job.directory / "checkpoints"):
        if said:
            check_resumed(newest.path, job.base, job.model or None)
        # In the job it would be refused as well, behind a queue perhaps.
        check_started_again(newest, job.deciding_settings(newest), job.extend, finished=bool(said))
    if said and arguments.get("export_every") and not (job.directory / EXPORTS).is_dir():
        said += "; it exported nothing while it trained: `nemo-cpt export` makes its checkpoints' exports now"
    if said and overrides:  # misspelt ones are an error also where nothing is left to do
        build_recipe(recipe, arguments, overrides)
    if here and not said:
        check_free(job.directory)
    return said or ""
