"""A recipe's `logger=` and `early_stop=`: what may be given, found without torch or NeMo."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_cpt.errors import CptError

LOGGER_FIELDS = {
    "tensorboard": (),
    "wandb": ("name", "group", "tags", "entity", "offline"),
    "mlflow": ("name", "group", "tags", "uri"),
}
PATIENCE = 3


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
    fields: dict[str, Any] = dict([given.partition(":")[::2]]) if isinstance(given, str) else dict(given)
    kinds = [kind for kind in LOGGER_FIELDS if kind in fields]
    if len(kinds) != 1:
        raise CptError(
            f"logger={given}: give wandb:PROJECT, mlflow:EXPERIMENT or tensorboard, or "
            "{wandb: PROJECT, group: NAME, tags: [NAME], offline: true}"
        )
    (kind,) = kinds
    project = fields.pop(kind)
    for field in fields:
        if field not in LOGGER_FIELDS[kind]:
            near = difflib.get_close_matches(field, LOGGER_FIELDS[kind], n=1)
            meant = f"near: {near[0]}" if near else f"it has: {', '.join(LOGGER_FIELDS[kind]) or 'none'}"
            raise CptError(f"logger={given}: {kind} has no field {field}; {meant}")
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
    if patience is not None and patience < 1:
        raise CptError(f"patience={patience}: give patience=1 or more")
    return early_stop, PATIENCE if patience is None else patience
