"""What a run needs before it starts, checked without importing torch or NeMo: the guards and the doctor share it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_cpt.checkpoint.folders import refuse_adapter
from nemo_cpt.errors import CptError
from nemo_cpt.hub import is_name
from nemo_cpt.training.run_folder import newest_whole

NVTE_OF_BACKEND = {  # what Megatron Core sets for each attention_backend, and refuses to find otherwise
    "flash": {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"},
    "fused": {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1", "NVTE_UNFUSED_ATTN": "0"},
    "unfused": {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "1"},
    "local": {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"},
    "auto": {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "1", "NVTE_UNFUSED_ATTN": "1"},
}


def check_base(base: str | Path | None) -> None:
    """Raise CptError unless `base` is a NeMo checkpoint to continue from."""
    if base is None:
        raise CptError(
            "no base to continue from: the run has no restore path and would train from random weights. "
            "Give the recipe base=, the folder that `nemo-cpt import` made of a Hugging Face model"
        )
    base = Path(base)
    if not base.exists():
        # `org/name`, and no folder `org` here: a hub name is meant, not a path mistyped, nor a recipe's own default.
        if is_name(str(base)) and base.parts[0] != "checkpoints":
            raise CptError(
                f"the base {base} is not there: for a model of the Hugging Face hub, run "
                f"`nemo-cpt download {base} models/{base.name}`, "
                f"`nemo-cpt import models/{base.name} checkpoints/{base.name}`, and this again with "
                f"base=checkpoints/{base.name}"
            )
        raise CptError(
            f"the base {base} is not there: import it first with `nemo-cpt import HF_MODEL {base}`; "
            f"for a training from scratch, make it with `nemo-cpt init {base} --tokenizer TOKENIZER`"
        )
    refuse_adapter(base)
    if (base / "config.json").is_file():
        raise CptError(
            f"the base {base} is a Hugging Face model: `nemo-cpt import {shlex.quote(str(base))} "
            f"{shlex.quote(f'checkpoints/{base.resolve().name}')}` makes the NeMo checkpoint that base= takes"
        )
    if (base / "checkpoints").is_dir():
        newest = newest_whole(base / "checkpoints")
        such_as = f"such as the newest, base={shlex.quote(str(newest.path))}" if newest else "of which none is whole"
        raise CptError(f"the base {base} is a run's folder: give one of its checkpoints, {such_as}")
    # Megatron writes it last: where it is, the checkpoint was finished.
    if not (base / "weights" / "metadata.json").exists():
        found = ", ".join(sorted(path.name for path in base.glob("*"))[:6]) or "nothing"
        raise CptError(
            f"the base {base} is not a NeMo 2.0 checkpoint (no weights/metadata.json; it holds {found}): "
            f"import the Hugging Face model with `nemo-cpt import HF_MODEL DEST`"
        )
    if (base / "weights" / "adapter_metadata.json").exists():
        raise CptError(
            f"the base {base} holds a run's adapters (LoRA or DoRA), not a model: merge them with "
            f"`nemo-cpt merge {base} DEST`, and give DEST as the base"
        )


def check_environment(attention_backend: Any, environ: Mapping[str, str]) -> None:
    """Refuse NVTE_* variables that contradict the recipe's attention_backend.

    Args:
        attention_backend: Megatron's AttnBackend, or its name; None checks nothing.
        environ: the job's environment.

    Raises:
        CptError: a variable is set to what Megatron Core refuses to find.
    """
    backend = getattr(attention_backend, "name", attention_backend)
    for name, wanted in NVTE_OF_BACKEND.get(str(backend), {}).items():
        if environ.get(name, wanted) != wanted:
            raise CptError(
                f"{name}={environ[name]} contradicts attention_backend={backend}, which wants {wanted}: unset "
                "NVTE_FLASH_ATTN, NVTE_FUSED_ATTN and NVTE_UNFUSED_ATTN, and choose with model.config.attention_backend"
            )
