"""What the doctor knows of a job: from a recipe's arguments and an executor's options, with nothing imported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_cpt.errors import CptError
from nemo_cpt.training.settings import Settings

if TYPE_CHECKING:
    from nemo_cpt.conversations import Conversations
    from nemo_cpt.corpus import Blend
    from nemo_cpt.planning import Workload
    from nemo_cpt.training.run_folder import Checkpoint


FOLDER_FIELDS = ("log.explicit_log_dir", "log.version", "log.use_datetime_version", "log.ckpt.dirpath")
"""Fields of a recipe's config that put a run elsewhere than into its recipe's `directory/name`."""

BESIDE_THE_BEST = 2  # checkpoints: the last one, and the one that is written before that is removed


@dataclass(frozen=True)
class Place:
    """Where a job runs.

    Attributes:
        executor: `local`, `slurm`, ... or `FILE.py:FUNCTION`.
        here: the job's processes are this machine's: its GPUs, memory and environment count.
        same_packages: the job uses this Python environment.
        same_files: paths mean the same to the job as here.
        image: of the container that this machine's Docker is to start; None for a job without one.
        volumes: its mounts, "source:target[:ro]"; None for a job without one.
        slurm: jobs are submitted by this machine's sbatch.
        partition: Slurm's; None for the default one.
        nodes: machines; None for what the recipe says.
        processes: that are started on each; None likewise.
        tells_nodes: its job tells the trainer how many machines it has, whatever the recipe says.
        limit_seconds: Slurm's time limit; None where it was not given.
        preempt_seconds: how long before it the job is told to stop; None for what its plan needs.
        asks_for_cores: Slurm is told how many cores the job's tasks take.
        cores_of_task: how many, where that was a number.
        asks_for_memory: Slurm is told how much of a node's memory the job takes.
        environ: variables the executor adds.
    """

    executor: str = "local"
    here: bool = True
    same_packages: bool = True
    same_files: bool = True
    image: str | None = None
    volumes: tuple[str, ...] | None = None
    slurm: bool = False
    partition: str | None = None
    nodes: int | None = None
    processes: int | None = None
    tells_nodes: bool = False
    limit_seconds: int | None = None
    preempt_seconds: int | None = None
    asks_for_cores: bool = False
    cores_of_task: int | None = None
    asks_for_memory: bool = False
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A recipe with its arguments, and where it is to run.

    Attributes:
        recipe: `module.function`.
        place: where it runs.
        settings: its numbers, as far as they are known.
        planned: reads its workload for the planner; None where nothing does.
        params: of a training from scratch, the size that its schedule is for; else None.
        model: its model config, or that's fields (`recipe_models.model_config`); empty where the source does not say.
        unlike_base: in what that differs from the base's on purpose.
        base: folder of the NeMo checkpoint to start from; None where the recipe names none.
        data: what it trains on; None where that cannot be known without building the recipe.
        replay: pretraining text that is mixed into conversations.
        tokenizer: folder or hub name; None for the base's own.
        directory: folder that the run writes to.
        gpus_per_node: GPUs of each machine; 0 for a recipe of CPU processes.
        num_nodes: machines.
        tensor_model_parallel_size: GPUs that share each layer.
        lora_rank: rank of the adapters; None where every parameter is trained.
        trained_embeddings: whether the embedding and the output layer are trained beside the adapters.
        gpu_memory_gib: memory of the card that the recipe is made for, as sold; None where it does not say.
        global_batch_size: sequences of a step; 0 where the recipe's source does not say.
        seq_length: tokens of a sequence; likewise.
        max_steps: steps; likewise.
        checkpoints: how many checkpoints lie on the disk at once, at most; 0 where the trainer writes none.
        exports: how many of them are exported beside the training and kept.
        attention_backend: Megatron's.
        extend: what becomes of the learning rate of a run that goes on with another schedule.
        deciding: reads what decides its weights, by the groups of `training.changes`, as far as it is known, for the
            comparison with a checkpoint; None where nothing does.
        logs_to_wandb: whether it has a logger for W&B that is not offline.
        logs_to_mlflow: whether it has one for MLflow.
    """

    recipe: str
    place: Place = field(default_factory=Place)
    settings: Settings = field(default_factory=Settings)
    planned: "Callable[[], Workload] | None" = None
    params: str | None = None
    model: Any = field(default_factory=dict)
    unlike_base: Sequence[str] = ()
    base: str | None = None
    data: "Blend | Conversations | None" = None
    replay: "Blend | None" = None
    tokenizer: str | None = None
    directory: Path = Path("results")
    gpus_per_node: int = 0
    num_nodes: int = 1
    tensor_model_parallel_size: int = 1
    lora_rank: int | None = None
    trained_embeddings: bool = False
    gpu_memory_gib: float | None = None
    global_batch_size: int = 0
    seq_length: int = 0
    max_steps: int = 0
    checkpoints: int = 5
    exports: int = 0
    attention_backend: str = "auto"
    extend: str | None = None
    deciding: "Callable[[Checkpoint], Mapping[str, Mapping[str, Any]]] | None" = None
    logs_to_wandb: bool = False
    logs_to_mlflow: bool = False

    def workload(self) -> "Workload":
        """What the planner reads of it.

        Raises:
            CptError: it cannot be planned.
        """
        if self.planned is None:
            raise CptError(f"{self.recipe} says nothing that the planner could read")
        return self.planned()

    def deciding_settings(self, checkpoint: "Checkpoint") -> "Mapping[str, Mapping[str, Any]]":
        """What decides its weights, to compare with a checkpoint of its run; see `deciding`."""
        return self.deciding(checkpoint) if self.deciding else {}

    @property
    def gpus_here(self) -> int:
        """GPUs that the job takes of this machine."""
        return self.gpus_per_node if self.place.here else 0

    @property
    def nodes(self) -> int:
        """Machines of the job: the executor's word before the recipe's."""
        return self.place.nodes or self.num_nodes


def checkpoints_at_once(max_steps: int, interval: int, kept: int) -> int:
    """Checkpoints on the disk at once: the best ones, the last, which may be none of them, and the one being written.

    Args:
        max_steps: of the run; 0 where it is not known.
        interval: steps between checkpoints.
        kept: the recipe's `save_top_k`; negative for all.
    """
    written = max(-(-max_steps // max(interval, 1)), 1)
    # Without the number of steps, as many as can ever lie there together.
    most = kept + BESIDE_THE_BEST
    return written if kept < 0 else min(written if max_steps else most, most)


def exports_kept(max_steps: int, every: int | None, keep: int | None) -> int:
    """Exports on the disk at a run's end, or while one more than are kept is written.

    Args:
        max_steps: of the run; 0 where it is not known.
        every: the recipe's `export_every`.
        keep: its `export_keep`.
    """
    if not every:
        return 0
    # Rounded up: the end of a run is exported, too.
    written = max(-(-max_steps // every), 1)
    return min(written, keep + 1) if keep else written
