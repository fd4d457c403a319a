"""What a run is, written beside its metrics: for the live view and the report, which import neither torch nor NeMo."""

import contextlib
import copy
import inspect
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import torch
from nemo.utils import AppState

from nemo_cpt.constants import MARKER
from nemo_cpt.conversations.dataset import is_conversations
from nemo_cpt.corpus.atomic_files import write_whole
from nemo_cpt.corpus.dataset.index import read_index
from nemo_cpt.errors import CptError, StoppedEarlyError
from nemo_cpt.installed import installed_versions
from nemo_cpt.training.datasets import FirstSamples
from nemo_cpt.training.metrics import END_FILE, RUN_FILE
from nemo_cpt.urls import hide_credentials

PACKAGES = ("torch", "nemo_toolkit", "megatron-core", "lightning", "nemo_run", "transformers", "transformer_engine")
MOST_TOKENS = 2**21  # of a validation set, whose bytes are counted: seconds at a run's start
launched: dict[str, Any] = {}  # the recipe's name, arguments and fields, where a command line gave them


class DescribeRun(pl.Callback):
    """Writes `metrics/run.json` as a start begins, and `metrics/end.json` as it ends.

    `run.json` holds the length, the batch, the data with their shares and epochs, bytes a token of each validation set,
    the machine, versions, the configuration and the planner's figures. `end.json` holds `state` (finished, ended early,
    stopped or failed), `step`, `time` and `message`. A job that is killed leaves none.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Describe this start, before its first validation."""
        if trainer.is_global_zero:
            folder = Path(AppState().log_dir)
            # A resumed run has not ended, however its last start did.
            (folder / END_FILE).unlink(missing_ok=True)
            (folder / RUN_FILE).parent.mkdir(parents=True, exist_ok=True)
            # Whole or not at all: the live view may read it at this moment.
            write_whole(folder / RUN_FILE, json.dumps(describe(trainer, pl_module), indent=1).encode())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say that the run has ended in good order, now that its last checkpoint is written."""
        # Lightning's max_steps is -1 where there is no limit.
        finished = trainer.global_step >= trainer.max_steps > 0
        self._write_end(trainer, "finished" if finished else "ended early", "")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say what ended the run."""
        state = "stopped" if isinstance(exception, StoppedEarlyError) else "failed"
        message = exception.message if isinstance(exception, CptError) else f"{type(exception).__name__}: {exception}"
        self._write_end(trainer, state, message)

    def _write_end(self, trainer: pl.Trainer, state: str, message: str) -> None:
        if not trainer.is_global_zero:
            return
        end = {"state": state, "step": trainer.global_step, "message": hide_credentials(message)}
        with contextlib.suppress(CptError):  # of a disk that is full: the run has ended all the same, and says how
            write_whole(Path(AppState().log_dir, END_FILE), json.dumps(end | {"time": time.time()}).encode())


def describe(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """What `metrics/run.json` holds, of a trainer whose data are there and whose model is not."""
    data, recipe = trainer.datamodule, _recipe(trainer, pl_module)
    seq_length, batch = getattr(data, "seq_length", 0), getattr(data, "global_batch_size", 0)
    return {
        "started": datetime.now().astimezone().isoformat(" ", timespec="seconds"),
        "resumed": trainer.ckpt_path is not None,
        "max_steps": trainer.max_steps,
        "seq_length": seq_length,
        "global_batch_size": batch,
        "tokens_per_step": seq_length * batch,
        "training": _training(data, trainer.max_steps * seq_length * batch),
        "validation": _validation(data),
        "machine": _machine(trainer),
        "plan": _plan(recipe),
        "versions": installed_versions(PACKAGES),
        "launched": plain(launched),
        # Where its log is: the launcher's folder of the task, which a container's host has under another name.
        "logs": str(Path(os.environ[MARKER]).parent) if MARKER in os.environ else None,
        "configuration": _configuration(recipe),
    }


def _recipe(trainer: pl.Trainer, pl_module: pl.LightningModule) -> SimpleNamespace:
    """The recipe's parts as they were configured, which NeMo keeps with what it builds of them."""
    parts = {
        "model": pl_module,
        "data": trainer.datamodule,
        "trainer": trainer,
        "optim": getattr(pl_module, "optim", None),
        "peft": getattr(pl_module, "model_transform", None),
    }
    return SimpleNamespace(**{name: _as_made(part) for name, part in parts.items()})


def _as_made(part: Any) -> Any:
    """The configuration that NeMo keeps with what it builds; what has none is returned as it is.

    NeMo keeps what a constructor takes as `**kwargs` under that name, where neither the planner nor a reader looks for
    a data module's batch sizes.
    """
    config = getattr(part, "__io__", part)
    if isinstance(config, fdl.Buildable) and isinstance(rest := config.__arguments__.get("kwargs"), Mapping):
        config = copy.copy(config)
        del config.kwargs
        for name, value in rest.items():
            setattr(config, name, getattr(value, "__io__", value))
    return config


def _configuration(recipe: SimpleNamespace) -> dict[str, Any]:
    found = {name: plain(part) for name, part in vars(recipe).items()}
    if isinstance(found["model"], dict):
        found["model"].pop("optim", None)  # which stands beside it
    return found


def _training(data: Any, tokens: int) -> list[dict[str, Any]]:
    """Each training set: of text its share of the tokens and how often it is read, of conversations the weight."""
    found: list[dict[str, Any]] = []
    for prefix, weight in getattr(data, "training_sets", {}).items():
        # Of conversations the weight is how often an epoch goes through them, which is no share of the tokens.
        if is_conversations(prefix):
            found.append({"prefix": prefix, "weight": weight})
        else:
            size = read_index(prefix).tokens
            found.append({"prefix": prefix, "share": weight, "tokens": size, "epochs": tokens * weight / size})
    return found


def _validation(data: Any) -> dict[str, dict[str, Any]]:
    """Each validation set: where it is, and the bytes of text that a predicted token stands for."""
    counted = _bytes_per_token(data)
    return {
        name: {"prefix": prefix, "bytes_per_token": counted.get(name)}
        for name, prefix in getattr(data, "validation_sets", {}).items()
    }


def _bytes_per_token(data: Any) -> dict[str, float]:
    """Of each set of plain text, over the sequences that are validated; none where a tokenizer hides its bytes."""
    from nemo_cpt.evaluation.bits_per_byte import ByteCounter

    validated = getattr(data, "_validation_ds", None)
    validated = getattr(validated, "samples", validated)  # that a data module of conversations has around them
    if not isinstance(validated, FirstSamples):
        return {}
    try:
        count = ByteCounter(data.tokenizer.tokenizer)
    # A tokenizer that hides its bytes: the set is then shown in nats per token.
    except (CptError, AttributeError):
        return {}
    most = max(MOST_TOKENS // data.seq_length, 1)
    found = {}
    sets = data.validation_sets.items()
    for (name, prefix), (start, end) in zip(sets, pairwise(validated.starts), strict=True):
        if not is_conversations(prefix):
            samples = [validated[index] for index in range(start, min(end, start + most))]
            tokens, labels, mask = (
                torch.stack([each[key] for each in samples]) for key in ("tokens", "labels", "loss_mask")
            )
            found[name] = sum(count(tokens, labels, mask.bool())) / float(mask.sum())
    return found


def _machine(trainer: pl.Trainer) -> dict[str, Any]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "host": socket.gethostname(),
        "processes": trainer.world_size,
        "gpu": torch.cuda.get_device_name() if gpus else None,
        "gpu_memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if gpus else None,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _plan(recipe: Any) -> dict[str, Any]:
    """The planner's figures on GPUs of this kind; why there are none, where there are none."""
    from nemo_cpt import planning
    from nemo_cpt.planning.hardware import of_device

    if not torch.cuda.is_available():
        return {"unknown": "the planner is for GPUs"}
    name = torch.cuda.get_device_name()
    kind = of_device(name)
    if kind is None:
        return {"unknown": f"the planner knows no {name}"}
    try:
        return planning.plan(recipe, gpu=kind.name).as_dict()
    except CptError as error:
        return {"unknown": error.message}


def plain(value: Any) -> Any:
    """A configuration as JSON holds it; objects by their class and what is plain of their fields."""
    if not isinstance(value, fdl.Buildable | type):
        value = _as_made(value)
    if isinstance(value, fdl.Buildable):
        target = fdl.get_callable(value)
        arguments = {name: plain(each) for name, each in value.__arguments__.items()}
        return {"_target_": f"{target.__module__}.{target.__qualname__}", **arguments}
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    # An argument may be an address with a password, and this file goes into reports.
    text = hide_credentials(str(value))
    # Python's own words for an object say nothing, and are others in each process.
    if " object at 0x" not in text:
        return text
    fields = {name: plain(each) for name, each in getattr(value, "__dict__", {}).items()
              if not name.startswith("_") and (each is None or isinstance(each, bool | int | float | str))}  # fmt: skip
    return {"_target_": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
