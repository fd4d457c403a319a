"""What a command line says of a job, for the doctor: read from the recipe's source, without importing NeMo.

The doctor needs a few of a recipe's values, at once: they are taken from the arguments given, else from the parameters'
defaults as the source shows them. What cannot be known that way (a default that is computed, a field set to an
expression) is None, and the check that wants it is skipped; nothing is guessed. The planner, which needs them all,
builds the recipe in a process of its own (`planned`).
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_cpt import catalog
from nemo_cpt.catalog import Function
from nemo_cpt.catalog.workloads import workload
from nemo_cpt.checkpoint.base import carried_tokenizer
from nemo_cpt.checkpoint.context import plain_config
from nemo_cpt.compatibility import check_unlike_base, positions, read_base
from nemo_cpt.conversations import Conversations, mixture
from nemo_cpt.corpus import Blend
from nemo_cpt.doctor import Job, Place
from nemo_cpt.doctor.job import FOLDER_FIELDS, checkpoints_at_once, exports_kept
from nemo_cpt.doctor.mounts import with_files
from nemo_cpt.errors import CptError
from nemo_cpt.launching.executor import make_executor, own_executor
from nemo_cpt.monitoring import forgetting
from nemo_cpt.planning import from_scratch
from nemo_cpt.recipe_models import LIKE_BASE, like_base, model_config, module_named
from nemo_cpt.training import options as training_options
from nemo_cpt.training.changes import GROWN_ROWS_FIRST, trained_on
from nemo_cpt.training.run_folder import Checkpoint
from nemo_cpt.training.settings import OF_A_BUILT_RECIPE, UNEVEN_STAGES, Settings, check, check_name, default_min_lr

MODEL = "model.config."
# Fields of a recipe's config that say the same as one of its arguments, and that argument's type.
FIELDS = {
    "resume.base": ("base", "str | None"),
    "data.tokenizer.pretrained_model_name": ("tokenizer", "str | None"),
    "log.log_dir": ("directory", "str | None"),
    "log.name": ("name", "str | None"),
    "log.ckpt.save_top_k": ("save_top_k", "int"),
    "trainer.enable_checkpointing": ("enable_checkpointing", "bool"),
    "trainer.devices": ("gpus_per_node", "int"),
    "trainer.num_nodes": ("num_nodes", "int"),
    "trainer.max_steps": ("max_steps", "int"),
    "trainer.val_check_interval": ("val_check_interval", "int | float | None"),
    "trainer.strategy.tensor_model_parallel_size": ("tensor_model_parallel_size", "int"),
    "trainer.strategy.pipeline_model_parallel_size": ("pipeline_model_parallel_size", "int"),
    "trainer.strategy.context_parallel_size": ("context_parallel_size", "int"),
    "trainer.strategy.sequence_parallel": ("sequence_parallel", "bool"),
    "log.ckpt.save_every": ("save_every", "int | None"),
    "data.seq_length": ("seq_length", "int"),
    "data.global_batch_size": ("global_batch_size", "int"),
    "data.micro_batch_size": ("micro_batch_size", "int"),
    "data.seed": ("seed", "int"),
    "optim.config.lr": ("lr", "float"),
    "optim.lr_scheduler.min_lr": ("min_lr", "float"),
    "optim.lr_scheduler.warmup_steps": ("warmup_steps", "int"),
    "peft.dim": ("rank", "int"),
    "resume.extend": ("extend", "str | None"),
    "model.config.attention_backend": ("attention_backend", "str | None"),
}


def describe(
    function: Function,
    arguments: Mapping[str, Any],
    fields: Sequence[str],
    executor: str,
    options: Sequence[str],
    own: Any = None,
) -> Job:
    """What a recipe's source and its arguments say of the job, without importing NeMo.

    Args:
        function: the recipe, as the catalog reads it.
        arguments: those given.
        fields: `path.to.field=value` on its config.
        executor: its name, or FILE.py:FUNCTION.
        options: `key=value` of the executor.
        own: what FILE.py:FUNCTION made, where that was asked already.

    Raises:
        CptError: there is no such executor, an option of it or of the recipe is wrong, or a field has the wrong type.
    """
    given = {name: _default(function, name) for name in function.parameters} | dict(arguments)
    pairs = (field.partition("=") for field in fields)  # set after the recipe is built: they win over arguments
    given |= {FIELDS[path][0]: _field(path, text) for path, _, text in pairs if path in FIELDS}
    on_cpu = "processes" in function.parameters  # of recipes for GPUs it is called gpus_per_node
    data = catalog.default_data(function) if given.get("data") is None else given["data"]
    if given.get("name") is not None:
        check_name(str(given["name"]), str(given.get("directory", "results")))
    if "params" in given:
        given |= _of_its_size(given)
    where = place(executor, options, own)
    _check_options(given, data, where)
    given["max_steps"], asked = _max_steps(given, data), given.get("max_steps")
    model, logger = _model(function, given, fields), training_options.read_logger(given.get("logger"))
    job = Job(
        recipe=function.name,
        place=where,
        settings=_settings(given | {"max_steps": asked}, model, on_cpu),
        planned=partial(workload, function.name, arguments, fields),
        params=given.get("params"),
        model=model,
        unlike_base=tuple(given.get("unlike_base") or ()),
        base=None if given.get("base") is None else str(given["base"]),
        data=data,
        replay=given.get("replay"),
        tokenizer=given.get("tokenizer"),
        directory=Path(str(given.get("directory") or "results"), str(given.get("name") or "")),
        gpus_per_node=0 if on_cpu else int(given.get("gpus_per_node") or 1),
        num_nodes=int(given.get("num_nodes") or 1),
        tensor_model_parallel_size=int(given.get("tensor_model_parallel_size") or 1),
        lora_rank=_lora_rank(function, given),
        trained_embeddings=given.get("embeddings_lr") is not None,
        gpu_memory_gib=given.get("gpu_memory_gib"),
        global_batch_size=int(given.get("global_batch_size") or 0),
        seq_length=int(given.get("seq_length") or 0),
        max_steps=given["max_steps"],
        checkpoints=_checkpoints(given),
        exports=exports_kept(given["max_steps"], given.get("export_every"), given.get("export_keep")),
        attention_backend=str(given.get("attention_backend") or "auto").rpartition(".")[2],
        logs_to_wandb=logger.kind == "wandb" and not logger.offline,
        logs_to_mlflow=logger.kind == "mlflow",
        extend=given.get("extend"),
    )
    if moves_its_folder(fields):  # where its checkpoints are is not known here
        return with_files(job)
    return replace(with_files(job), deciding=partial(_deciding, job, arguments, fields))


def _deciding(
    job: Job, arguments: Mapping[str, Any], fields: Sequence[str], checkpoint: Checkpoint
) -> dict[str, dict[str, Any]]:
    """What decides a run's weights, as far as that shows without NeMo, to compare with a checkpoint of it."""
    launched = checkpoint.record.get("launched") or {}
    paths = {field.partition("=")[0] for field in (*fields, *launched.get("fields", ()))}
    # What neither start was given has the recipe's own value, which its source need not show.
    named = {*arguments, *launched.get("arguments", ()), *(FIELDS[path][0] for path in paths & FIELDS.keys())}

    def given(*names: str) -> dict[str, Any]:
        values = {name: getattr(job.settings, name) for name in names if name in named}
        return {name: value for name, value in values.items() if value is not None}

    steps = {"max_steps": job.max_steps} if job.max_steps else {}  # 0 where epochs cannot be counted here
    grown = {GROWN_ROWS_FIRST: arguments.get(GROWN_ROWS_FIRST)} if GROWN_ROWS_FIRST in named else {}
    return {
        "optimizer": grown,
        "schedule": steps | given("lr", "min_lr", "warmup_steps", "embeddings_lr"),
        "data": given("global_batch_size", "seq_length", "seed") | trained_on(job.data, job.replay),
    }


def moves_its_folder(overrides: Sequence[str]) -> bool:
    """Whether fields of the config put a run elsewhere than into its recipe's `directory/name`."""
    return any(override.partition("=")[0] in FOLDER_FIELDS for override in overrides)


def _checkpoints(given: Mapping[str, Any]) -> int:
    """How many checkpoints lie on the disk at once."""
    if given.get("enable_checkpointing") is False:
        return 0
    # As `instruction_tune` has it where nothing is given.
    every = given.get("save_every") or given.get("val_check_interval") or max(given["max_steps"] // 10, 1)
    return checkpoints_at_once(given["max_steps"], int(every), int(given.get("save_top_k", 3)))


def _of_its_size(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipes from scratch fill in for their size; nothing where a sequence is refused anyway."""
    length = given.get("seq_length")
    return from_scratch.schedule_of(given["params"]).settings(length, given) if length and length > 0 else {}


def _check_options(given: Mapping[str, Any], data: Any, where: Place) -> None:
    """Read what is not a number as the recipe's function will: what it would refuse in the job is refused here.

    Raises:
        CptError: as the readers.
    """
    training_options.read_precision(given.get("precision") or "bf16", given.get("bf16_layers") or 0)
    adapters = given.get("peft_scheme") is not None
    training_options.check_state_precision(given.get("state_precision") or "fp32", adapters)
    training_options.check_extend(given.get("extend"))
    check_unlike_base(given.get("unlike_base") or ())
    check(Settings(limit_val_batches=given.get("limit_val_batches")))
    saved = given.get("save_every") or given.get("val_check_interval")
    steps_between = saved if isinstance(saved, int) else None  # of a share of an epoch they are not known here
    training_options.check_exports(given.get("export_every"), given.get("export_keep"), steps_between)
    if adapters:
        training_options.check_peft_scheme(given["peft_scheme"])
    if isinstance(data, Blend | Conversations):
        replayed = given["replay"].validation if given.get("replay") else ()
        sets = [*data.validation, *replayed]
        training_options.read_early_stop(given.get("early_stop"), given.get("patience"), sets)
        forgetting.limits(given.get("stop_when"), sets)
    if "replay_share" in given:
        share = mixture.replay_share(given.get("replay"), given["replay_share"])
        mixture.check_replay(given.get("replay"), share, data if isinstance(data, Conversations) else None)
    frozen = "rank" in given and given.get("embeddings_lr") is None
    tokenizer = _tokenizer_folder(given) if where.same_files else None
    training_options.check_grown_rows_first(given.get("grown_rows_first"), tokenizer, frozen)


def _tokenizer_folder(given: Mapping[str, Any]) -> Path | None:
    """The run's tokenizer: what is given, else the base's; None where that is not a folder here."""
    if given.get("tokenizer") is not None:
        # Else it is the hub's name of one, which is not asked for here.
        return folder if (folder := Path(str(given["tokenizer"]))).is_dir() else None
    return carried_tokenizer(Path(str(given["base"]))) if given.get("base") else None


def _settings(given: Mapping[str, Any], model: Mapping[str, Any], on_cpu: bool) -> Settings:
    """The job's numbers: arguments, and of the model what its config says."""
    known = {name: given.get(name, model.get(name)) for name in OF_A_BUILT_RECIPE} | {"epochs": given.get("epochs")}
    if known["min_lr"] is None and known["lr"] is not None:
        known["min_lr"] = default_min_lr(known["lr"])
    if on_cpu:
        known["gpus_per_node"] = given["processes"]
    elif known["sequence_parallel"] is None:  # the recipes share sequences wherever they cut layers
        known["sequence_parallel"] = (given.get("tensor_model_parallel_size") or 1) > 1
    # Stages of unequal size have rules of their own, which Megatron checks.
    if any(model.get(name) for name in UNEVEN_STAGES):
        known["num_layers"] = None
    return Settings(**known)


def _model(function: Function, given: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The model config that the recipe's module declares, or `model=` stands for, with the fields of it that are given.

    Raises:
        CptError: there is no such model, or the base has learnt fewer positions.
    """
    model = given.get("model")
    if model == LIKE_BASE or (model is None and like_base(function.path)):
        config = _of_base(given.get("base"), int(given.get("seq_length") or 0))
    else:
        config = model_config(module_named(model) if model else function.path)
    config.pop("vocab_size", None)  # the weights' rows decide
    # Where the model is not known, a field of it alone would be compared with the whole of the base.
    for path, _, text in (field.partition("=") for field in fields if config):
        if path.startswith(MODEL):
            config[path.removeprefix(MODEL)] = _literal(text)
    return config


def _of_base(base: str | None, seq_length: int) -> dict[str, Any]:
    """What a base's config.json makes of NeMo's model config; empty for a base that the doctor will find wanting.

    Raises:
        CptError: the base has learnt fewer positions.
    """
    try:
        found = read_base(base) if base else None
    except CptError:
        return {}
    if found is None or found.architecture is None:
        return {}
    return plain_config(found.architecture) | {"seq_length": positions(found, seq_length)}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def place(executor: str, options: Sequence[str], own: Any = None) -> Place:
    """Where an executor runs a job, from its name and options alone, or by what a function of the user's makes, `own`.

    Raises:
        CptError: there is no such executor, or an option is wrong.
    """
    from nemo_cpt.executors.counts import asks_for_cores, asks_for_memory, cores_of_task
    from nemo_cpt.executors.docker import volumes_of
    from nemo_cpt.executors.environment import job_env
    from nemo_cpt.executors.examination import place_of
    from nemo_cpt.executors.local import visible_gpus
    from nemo_cpt.executors.window import seconds_of

    if (own := own or own_executor(executor, options)) is not None:  # which alone knows what it is
        return replace(place_of(own), executor=executor)
    described = catalog.executor(executor)
    given = catalog.parse(described, options, prefix="executor.")
    if set(given) - set(described.parameters):
        make_executor(executor, options, 1)  # it alone knows sbatch's directives, and takes seconds to say so
    container, tunnelled = given.get("container_image"), given.get("tunnel", "local") != "local"
    submits = executor == "slurm" and not tunnelled
    return Place(
        executor,
        here=executor in ("local", "docker"),
        same_packages=executor == "local" or (submits and not container and not given.get("venv")),
        same_files=executor == "local" or (submits and not container),
        image=str(given.get("image") or _default(described, "image")) if executor == "docker" else None,
        volumes=tuple(volumes_of(given.get("mounts"))) if executor == "docker" else None,
        slurm=submits,
        partition=given.get("partition"),
        # Of those that have no such option, this machine.
        nodes=given.get("nodes", 1 if executor in ("local", "docker") else None),
        processes=_processes(executor, given),
        tells_nodes=executor == "slurm",
        limit_seconds=seconds_of(str(given.get("time"))),
        preempt_seconds=given.get("preempt_seconds"),
        asks_for_cores=asks_for_cores(given),
        cores_of_task=cores_of_task(given),
        asks_for_memory=asks_for_memory(given),
        environ=visible_gpus(given.get("gpus") if executor == "local" else None) | job_env(given.get("env")),
    )


def _processes(executor: str, given: Mapping[str, Any]) -> int | None:
    """What an executor starts on a machine by its options; None where it takes the recipe's number."""
    counts = (given.get(name) for name in ("processes", "tasks_per_node", "gpus_per_node"))
    if count := next(filter(None, counts), None):
        return int(count)
    if executor in ("local", "docker") and given.get("gpus") is not None:
        return max(int(given["gpus"]), 1)
    return 1 if executor == "skypilot" else None  # its own default


def _field(path: str, text: str) -> Any:
    """The value of one of `FIELDS`, of its type; quotes around it are taken off, as NeMo-Run does."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return catalog.parse_value(path, text[1:-1] if quoted else text, FIELDS[path][1])


def _default(function: Function, name: str) -> Any:
    """A parameter's default where its source is a literal, or a constant of the recipe's module; else None."""
    source = function.parameters[name].default
    if source is None:
        return None
    # Recipes name their defaults: DEFAULT_BASE stands for a path.
    value = catalog.assigned(function.path, source) if source.isidentifier() else None
    source = ast.unparse(value) if value else source
    try:
        return ast.literal_eval(source)
    except (ValueError, SyntaxError):
        # An enumeration's member or a model's name, which only looks like an expression, stands for itself.
        is_a_word = source.replace("/", "").replace("-", "").replace(".", "").replace("_", "").isalnum()
        return source if is_a_word else None


def _max_steps(given: Mapping[str, Any], data: Any) -> int:
    """A run's steps; of epochs where the data are here; 0 where they cannot be known."""
    if given.get("max_steps") is not None or not isinstance(data, Conversations):
        return int(given.get("max_steps") or 0)
    batch, length = (int(given.get(name) or 0) for name in ("global_batch_size", "seq_length"))
    # Epochs are steps only where the conversations can be counted.
    if not batch or not length or not all(Path(prefix + ".idx").exists() for prefix in data.prefixes()):
        return 0
    share, seed = mixture.replay_share(given.get("replay"), given.get("replay_share")), given.get("seed")
    try:
        check(Settings(seed=seed))
        # The seed decides which part of a set a weight such as 0.25 takes, and so how many sequences that is.
        return data.steps(
            given.get("epochs") or mixture.EPOCHS, batch, length, share, mixture.SEED if seed is None else seed
        )
    except (CptError, ImportError):  # which the check of the data reports
        return 0


def _lora_rank(function: Function, given: Mapping[str, Any]) -> int | None:
    """The adapters' rank: as given, or the recipes' own; None for a recipe that has none."""
    # None asks the recipe for its own: 32 for instructions, 128 for a language.
    return int(given["rank"] or (32 if "epochs" in given else 128)) if "rank" in given else None
