"""The numbers that a job is started with, and what of them no job could run with: found without torch or NeMo."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, get_args

from nemo_cpt.arguments import as_wanted
from nemo_cpt.errors import CptError

COUNTS = (  # of which there is at least one
    "max_steps", "val_check_interval", "save_every", "epochs", "seq_length", "global_batch_size", "micro_batch_size",
    "num_nodes", "gpus_per_node", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "context_parallel_size", "rank",
)  # fmt: skip
PARTS = ("epochs", "val_check_interval")  # of which a part is enough
WIDTHS = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")  # which tensor parallelism cuts
OF_A_BUILT_RECIPE = {
    "lr": "optim.config.lr",
    "min_lr": "optim.lr_scheduler.min_lr",
    "warmup_steps": "optim.lr_scheduler.warmup_steps",
    "embeddings_lr": "optim.embeddings_lr",
    "max_steps": "trainer.max_steps",
    "val_check_interval": "trainer.val_check_interval",
    "save_every": "log.ckpt.save_every",
    "seq_length": "data.seq_length",
    "global_batch_size": "data.global_batch_size",
    "micro_batch_size": "data.micro_batch_size",
    "num_nodes": "trainer.num_nodes",
    "gpus_per_node": "trainer.devices",
    "tensor_model_parallel_size": "trainer.strategy.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "trainer.strategy.pipeline_model_parallel_size",
    "context_parallel_size": "trainer.strategy.context_parallel_size",
    "sequence_parallel": "trainer.strategy.sequence_parallel",
    "rank": "peft.dim",
    "seed": "data.seed",
    "num_layers": "model.config.num_layers",
    "num_attention_heads": "model.config.num_attention_heads",
    "num_query_groups": "model.config.num_query_groups",
    "ffn_hidden_size": "model.config.ffn_hidden_size",
}
"""Where a recipe's config has each setting."""

UNEVEN_STAGES = (
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A job's numbers, by the names of the recipes' arguments; None for what is not known, or left to a default.

    Attributes:
        num_layers: of the model, as are the following.
    """

    lr: float | None = None
    min_lr: float | None = None
    warmup_steps: int | None = None
    embeddings_lr: float | None = None
    max_steps: int | None = None
    val_check_interval: float | None = None
    save_every: int | None = None
    epochs: float | None = None
    seq_length: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    num_nodes: int | None = None
    gpus_per_node: int | None = None
    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    context_parallel_size: int | None = None
    sequence_parallel: bool | None = None
    rank: int | None = None
    limit_val_batches: int | None = None
    seed: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    ffn_hidden_size: int | None = None

    @property
    def processes(self) -> int | None:
        """Processes of the job, one a GPU; None where that is not known, as with devices="auto"."""
        return None if self.gpus_per_node is None else self.gpus_per_node * (self.num_nodes or 1)

    @property
    def model_parallel(self) -> int:
        """Processes that hold one copy of the model together."""
        sizes = (self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.context_parallel_size)
        return math.prod(size or 1 for size in sizes)


def settings_in(recipe: Any) -> Settings:
    """Read the settings of a recipe.

    Args:
        recipe: the `run.Partial` of a recipe function, edited or not. devices="auto", or a list, is not known.

    Raises:
        CptError: a field is of another type.
    """
    found = {name: _number(recipe, name, path) for name, path in OF_A_BUILT_RECIPE.items()}
    if any(_get(recipe, f"model.config.{name}") for name in UNEVEN_STAGES):
        found["num_layers"] = None  # their own rules, which Megatron checks
    return Settings(**found)


def _number(recipe: Any, name: str, path: str) -> Any:
    value = _get(recipe, path)
    if value is None or (name == "gpus_per_node" and _names_devices(value)):
        return None
    wanted, _ = get_args(Settings.__annotations__[name])  # each is a type, or None
    return as_wanted(path, value, wanted)


def _names_devices(value: Any) -> bool:
    """Whether a trainer is told which devices to take, in one of Lightning's ways, and not how many."""
    return isinstance(value, list | tuple) or (isinstance(value, str) and (value == "auto" or "," in value))


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def default_min_lr(lr: float) -> float:
    """Where a learning rate ends that nothing else is said of: at a tenth, as in the recorded Japanese run, Swallow."""
    return lr / 10


def check_name(name: str, directory: str) -> None:
    """Refuse a run's name that is not a folder's in `directory`, where everything looks for runs.

    Raises:
        CptError: it is so, or the directory has no name.
    """
    if not directory:
        raise CptError("directory= has no name: say where runs are kept, or leave it away for `results`")
    if name in ("", ".", "..") or "/" in name:
        raise CptError(f"name={name}: give the run a name that is one folder's; directory= says where runs are kept")


def check(settings: Settings) -> None:
    """Refuse numbers with which no job could run, or only in vain.

    Raises:
        CptError: the message has the values, and what to give instead, as the command line writes it.
    """
    if complaint := next(_complaints(settings), None):
        raise CptError(complaint)


def _complaints(each: Settings) -> Iterator[str]:
    """What is wrong, the causes ahead of what follows from them."""
    for name in COUNTS:
        value = getattr(each, name)
        # Not `value < 1`, which NaN is not either.
        if value is not None and not (value >= 1 or (name in PARTS and value > 0)):
            meant = " (processes= of a recipe for the CPU)" if name == "gpus_per_node" else ""
            yield f"{name}={value:g}: give {name}=1 or more{meant}"
    for name in (*COUNTS, "seed", "limit_val_batches"):
        value = getattr(each, name)
        if value is not None and name not in PARTS and not isinstance(value, Integral):
            yield f"{name}={value}: give a whole number"
    for name in ("seed", "limit_val_batches"):  # of which there may be none: limit_val_batches=0 validates on nothing
        if (value := getattr(each, name)) is not None and value < 0:
            yield f"{name}={value}: give {name}=0 or more"
    if each.epochs is not None and each.max_steps is not None:  # neither may win silently
        yield f"epochs is {each.epochs:g} and max_steps {each.max_steps}: give one of them"
    yield from _schedule(each)
    yield from _cuts_of_the_model(each)
    yield from _batches(each)


def _schedule(each: Settings) -> Iterator[str]:
    for name in ("lr", "embeddings_lr"):
        rate = getattr(each, name)
        if rate is not None and not 0 < rate < math.inf:
            yield f"{name}={rate:g}: a peak learning rate is above 0, such as {name}=2.5e-5"
    # Not `min_lr < 0`, which NaN passes.
    if each.min_lr is not None and not each.min_lr >= 0:
        yield f"min_lr={each.min_lr:g}: a learning rate is not negative: give min_lr=0 or more, below lr"
    if each.lr is not None and each.min_lr is not None and each.min_lr >= each.lr:
        yield (
            f"min_lr {each.min_lr:g} is not below lr {each.lr:g}: give min_lr={each.lr / 10:g}, a tenth of lr, "
            "or a larger lr="
        )
    if each.embeddings_lr is not None and each.min_lr is not None and each.embeddings_lr < each.min_lr:
        yield (
            f"embeddings_lr {each.embeddings_lr:g} is below the schedule's min_lr {each.min_lr:g}, at which both rates "
            "end: give a larger one, or a smaller min_lr"
        )
    if each.warmup_steps is not None and each.warmup_steps < 0:
        yield f"warmup_steps={each.warmup_steps}: give warmup_steps=0 or more"
    if each.warmup_steps and each.max_steps and each.warmup_steps >= each.max_steps:
        peak = "its peak" if each.lr is None else f"{each.lr:g}"
        yield (
            f"warmup_steps {each.warmup_steps} is not below max_steps {each.max_steps}: the learning rate would never "
            f"reach {peak}. Give warmup_steps={each.max_steps // 10}, a tenth of the steps"
        )


def _cuts_of_the_model(each: Settings) -> Iterator[str]:
    if each.processes is not None and each.processes % each.model_parallel:
        yield (
            f"{each.processes} processes cannot be cut into groups of tensor x pipeline x context parallel = "
            f"{each.model_parallel}: change tensor_model_parallel_size, pipeline_model_parallel_size or "
            "context_parallel_size, or the number of GPUs"
        )
    tensor, stages = each.tensor_model_parallel_size or 1, each.pipeline_model_parallel_size or 1
    widths = {name: getattr(each, name) for name in WIDTHS if getattr(each, name)}
    for name, width in widths.items():
        if width % tensor:
            yield (
                f"the model's {name} {width} cannot be cut over tensor_model_parallel_size {tensor}: "
                f"give tensor_model_parallel_size={_divisors(math.gcd(*widths.values()), tensor)}"
            )
    if each.num_layers and each.num_layers % stages:
        yield (
            f"the model's {each.num_layers} layers cannot be cut into pipeline_model_parallel_size {stages} equal "
            f"stages: give pipeline_model_parallel_size={_divisors(each.num_layers, stages)}"
        )
    length, context = each.seq_length or 0, each.context_parallel_size or 1
    pieces = 2 * context  # each process takes two, from both ends, so that causal attention costs all the same
    if context > 1 and length % pieces:
        yield (
            f"seq_length {length} cannot be cut into 2 x context_parallel_size = {pieces} equal pieces: "
            f"{max(length // pieces, 1) * pieces} could be"
        )
    if each.sequence_parallel and length % (tensor * context):
        # What is proposed has to pass the check above, too.
        multiple = tensor * pieces
        yield (
            f"seq_length {length} cannot be cut over tensor_model_parallel_size {tensor}, which share it "
            f"(sequence parallel): {max(length // multiple, 1) * multiple} could be"
        )


def _batches(each: Settings) -> Iterator[str]:
    if not each.global_batch_size or not each.micro_batch_size or each.processes is None:
        return
    # Without a remainder, and above 0: `_cuts_of_the_model` complains first, and the first complaint is the one raised.
    data_parallel = each.processes // each.model_parallel
    step = each.micro_batch_size * data_parallel
    if each.global_batch_size % step:
        yield (
            f"global_batch_size {each.global_batch_size} is not a multiple of micro_batch_size "
            f"{each.micro_batch_size} x data parallel {data_parallel}: {max(each.global_batch_size // step, 1) * step} "
            "would be"
        )


def _divisors(number: int, wanted: int) -> str:
    """The divisors of a number nearest to the one that is wanted, for a message."""
    every = [each for each in range(1, number + 1) if number % each == 0]
    near = [max((each for each in every if each < wanted), default=1), *[each for each in every if each > wanted][:1]]
    return " or ".join(map(str, near))
