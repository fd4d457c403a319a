"""What a recipe's options may be, such as `logger=` and `precision=`: found without torch or NeMo.

One reader for each, which the recipe's function calls, and the launcher too, before a GPU is taken.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cpt.arguments import as_wanted
from nemo_cpt.errors import CptError, nearest

LOGGER_FIELDS = {
    "tensorboard": (),
    "wandb": ("name", "group", "tags", "entity", "offline"),
    "mlflow": ("name", "group", "tags", "uri"),
}
PATIENCE = 3
FP8_SCALING = {"fp8": "tensorwise", "fp8_blockwise": "blockwise"}  # Megatron's words for it
STATE_PRECISIONS = ("fp32", "bf16")
PEFT_SCHEMES = ("lora", "dora")
EXTENSIONS = {
    "rewarm": "a new warmup and decay, over the steps that are left",
    "stretch": "the new schedule, as if it had been so from the start",
    "keep": "the old schedule; past its end the rate stays at its min_lr",
}


@dataclass(frozen=True, kw_only=True)
class LoggerOptions:
    """Where a run's numbers go, beside its own `metrics/` and TensorBoard.

    Attributes:
        kind: "wandb", "mlflow", or "tensorboard" for no other.
        project: W&B's project, MLflow's experiment.
        name: of the run there; the run's own name when None.
        group: runs that belong together.
        tags: words to find the run by.
        entity: W&B's team or user.
        offline: whether W&B writes to the disk alone, for `wandb sync`.
        uri: MLflow's server or folder; MLFLOW_TRACKING_URI, else a folder beside the run's, when None.
    """

    kind: str = "tensorboard"
    project: str = ""
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    entity: str | None = None
    offline: bool = False
    uri: str | None = None


def read_logger(given: str | Mapping[str, Any] | None) -> LoggerOptions:
    """Read a recipe's `logger=`.

    Args:
        given: "wandb:PROJECT", "mlflow:EXPERIMENT", "tensorboard", or a mapping with more to say:
            {"wandb": "PROJECT", "group": "ja", "tags": ["8b"], "offline": True}.

    Raises:
        CptError: there is no such logger or field, or no project.
    """
    if given is None:
        return LoggerOptions()
    # `wandb:PROJECT` is short for {wandb: PROJECT}.
    fields: dict[str, Any] = dict([given.partition(":")[::2]]) if isinstance(given, str) else dict(given)
    kinds = [kind for kind in LOGGER_FIELDS if kind in fields]
    if len(kinds) != 1:
        raise CptError(
            f"logger={given}: give wandb:PROJECT, mlflow:EXPERIMENT or tensorboard, or "
            "{wandb: PROJECT, group: NAME, tags: [NAME], offline: true}"
        )
    (kind,) = kinds
    project = fields.pop(kind)
    for field in list(fields):
        if field not in LOGGER_FIELDS[kind]:
            known = nearest(field, LOGGER_FIELDS[kind]) if LOGGER_FIELDS[kind] else "it has none"
            raise CptError(f"logger={given}: {kind} has no field {field}; {known}")
        wanted: Any = Sequence[str] | str | None if field == "tags" else LoggerOptions.__annotations__[field]
        fields[field] = as_wanted(f"logger[{field!r}]", fields[field], wanted)
    if not project and kind != "tensorboard":
        raise CptError(f"logger={given}: give the project's name, as in {kind}:my-project")
    tags = fields.get("tags") or ()
    return LoggerOptions(
        kind=kind, project=str(project), **fields | {"tags": (tags,) if isinstance(tags, str) else tuple(tags)}
    )


def read_early_stop(early_stop: str | None, patience: int | None, sets: Collection[str]) -> tuple[str, int] | None:
    """Read a recipe's `early_stop=` and `patience=`.

    Args:
        early_stop: name of a validation set; None for a run that goes to its end.
        patience: validations without a lower loss after which the run ends; 3 when None.
        sets: the names of the validation sets.

    Returns:
        The set and the patience; None for a run that goes to its end.

    Raises:
        CptError: there is no such set, or a patience without a set.
    """
    if early_stop is None:
        if patience is not None:
            raise CptError(
                f"patience={patience} is early_stop's: give early_stop= the name of a validation set as well"
            )
        return None
    if early_stop not in sets:
        known = ", ".join(sets) or "none: give data validation sets"
        raise CptError(f"early_stop={early_stop}: that is no validation set; there are: {known}")
    if patience is not None and not (isinstance(patience, int) and patience >= 1):
        raise CptError(f"patience={patience}: give a whole number of 1 or more")
    return early_stop, PATIENCE if patience is None else patience


def read_precision(precision: str, bf16_layers: int = 0) -> str | None:
    """Read a recipe's `precision=` and `bf16_layers=`.

    Returns:
        How fp8 is scaled, in Megatron's word; None for bf16.

    Raises:
        CptError: there is no such precision, or bf16_layers is negative, or given for bf16.
    """
    if precision != "bf16" and precision not in FP8_SCALING:
        raise CptError(f"precision={precision}: give bf16, {', '.join(FP8_SCALING)}")
    if bf16_layers < 0:
        raise CptError(f"bf16_layers={bf16_layers}: give bf16_layers=0 or more")
    if precision == "bf16" and bf16_layers:
        raise CptError(f"precision=bf16, bf16_layers={bf16_layers}: give bf16_layers with fp8 only")
    return FP8_SCALING.get(precision)


def check_state_precision(state_precision: str, adapters: bool = False) -> None:
    """Raise CptError where a recipe's `state_precision=` is none of `STATE_PRECISIONS`, or bf16 for adapters."""
    if state_precision not in STATE_PRECISIONS:
        raise CptError(f"state_precision={state_precision}: give {' or '.join(STATE_PRECISIONS)}")
    if adapters and state_precision == "bf16":
        raise CptError("state_precision=bf16 is for training every parameter: adapters' states are small, in fp32")


def check_extend(extend: str | None) -> None:
    """Raise CptError where a recipe's `extend=` is none of `EXTENSIONS`."""
    if extend is not None and extend not in EXTENSIONS:
        raise CptError(f"extend is {extend!r}: give one of {', '.join(EXTENSIONS)}, or none")


def check_peft_scheme(peft_scheme: str) -> None:
    """Raise CptError where a recipe's `peft_scheme=` is none of `PEFT_SCHEMES`."""
    if peft_scheme not in PEFT_SCHEMES:
        raise CptError(f"peft_scheme is {peft_scheme!r}: it can be {' or '.join(PEFT_SCHEMES)}")


def check_exports(every: int | None, keep: int | None, saved: int | None = None) -> None:
    """Check a recipe's `export_every=` and `export_keep=`.

    Args:
        every: steps between exports; None for a run that makes none.
        keep: how many are kept; None for all.
        saved: steps between checkpoints; None where they are not known.

    Raises:
        CptError: a number is below 1, `every` is not a multiple of `saved`, or `keep` is given alone.
    """
    if every is None:
        if keep is not None:
            raise CptError(f"export_keep is {keep} and export_every None: give both, or neither")
        return
    if every < 1 or (keep is not None and keep < 1):
        raise CptError(f"export_every is {every} and export_keep {keep}: give whole numbers of 1 or more")
    # An export is made of a checkpoint: between two of them there is nothing to export.
    if saved and every % saved:
        raise CptError(
            f"export_every {every} is not a multiple of the {saved} steps between checkpoints: give "
            f"{max(every // saved, 1) * saved}, or save_every={every}"
        )


def check_grown_rows_first(steps: int | None, tokenizer: Path | None, frozen: bool = False) -> None:
    """Check a recipe's `grown_rows_first=`.

    Args:
        steps: None for a run that trains everything from the start.
        tokenizer: folder of the run's; None where it is not on this machine.
        frozen: the embedding and the output layer are not trained.

    Raises:
        CptError: there are no steps, the tokenizer has not grown, or nothing of the rows is trained.
    """
    if steps is None:
        return
    if steps < 1:
        raise CptError(f"grown_rows_first is {steps}: give 1 or more")
    if tokenizer is not None:
        first_new_row(tokenizer, steps)
    if frozen:
        raise CptError(
            f"grown_rows_first is {steps}, and the embedding and the output layer are frozen: train them beside the "
            "adapters, embeddings_lr=2e-5, or leave grown_rows_first away"
        )


def first_new_row(tokenizer: Path, steps: int) -> int:
    """The row at which the new ones of a grown tokenizer begin; `steps` are those of `grown_rows_first=`.

    Raises:
        CptError: it has not grown.
    """
    from nemo_cpt.corpus.tokenization.tokenizer_files import read_object
    from nemo_cpt.vocabulary.byte_level import FIRST_ROW, RECORD

    record = read_object(tokenizer / RECORD)
    # The model's own record first: it may have been grown by a tokenizer that grew twice.
    first = record.get(FIRST_ROW) or record.get("from", {}).get("vocabulary_size", 0)
    if not first:
        raise CptError(
            f"grown_rows_first is {steps}, and the tokenizer in {tokenizer} has not grown (it has no {RECORD}): leave "
            "it away, or grow the model first with `nemo-cpt grow`"
        )
    return int(first)
