"""What a checkpoint stands for: the model that was trained, adapters merged, and the files that it leaves with."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nemo_cpt.checkpoint.architecture import Architecture
from nemo_cpt.checkpoint.base import base_files, base_weights, carried_places
from nemo_cpt.checkpoint.chat_template import InstructionTemplate, choose_template, write_template
from nemo_cpt.checkpoint.exported_config import ExportedConfig, exported_config
from nemo_cpt.checkpoint.folders import copy_small_files
from nemo_cpt.checkpoint.provenance import hand_on
from nemo_cpt.checkpoint.tokenizer_ids import count_token_ids
from nemo_cpt.errors import CptError


@dataclass(frozen=True)
class Description:
    """What goes beside the weights: the base's files, with what the training changed of the model's description.

    Attributes:
        nemo: the checkpoint.
        files: the folder of the base's.
        config: the config.json.
        template: the chat template that they shall carry, if any.
    """

    nemo: Path
    files: Path
    config: ExportedConfig
    template: InstructionTemplate | None

    def write(self, folder: Path, dtype: str, *, in_checkpoint: bool = False) -> list[str]:
        """Write the files for weights of a dtype into a folder, which is made where it is not there.

        With them goes, hidden, where the model comes from.

        Args:
            folder: where they go.
            dtype: of the weights.
            in_checkpoint: see `copy_small_files`.

        Returns:
            Their names.

        Raises:
            CptError: the tokenizer is not the one that the template was used with.
        """
        # Copied first, so that what did not change stays the base's byte for byte.
        names = copy_small_files(self.files, folder, in_checkpoint=in_checkpoint)
        config = self.config.with_dtype(dtype)
        hand_on(self.files, folder, self.nemo)
        if config.changes:
            (folder / "config.json").write_text(json.dumps(config.fields, indent=2) + "\n", encoding="utf-8")
        return write_template(folder, self.template) if self.template else names


def describe(
    nemo: Path, base: str | Path | None, chat_template: str | None = None, ignore_fields: Collection[str] = ()
) -> Description:
    """Describe the model of a checkpoint.

    Args:
        nemo: the checkpoint.
        base: where its base's files are; None for those that it carries.
        chat_template: see `export_hf`.
        ignore_fields: config fields to accept although they are unknown here.

    Raises:
        CptError: the base's files are missing, or another model's; there is no such template.
    """
    files = base_files(nemo, base)
    config = exported_config(nemo, files, ignore_fields)
    template = choose_template(nemo, files, chat_template)
    return Description(nemo, files, config.with_end_at(template.stop[1]) if template else config, template)


@dataclass(frozen=True)
class Trained:
    """The tensors of a trained model by their Hugging Face names.

    Attributes:
        where: the checkpoint.
        read: gives a tensor whole.
        blocks: gives it in blocks of rows; a block is overwritten by the next one.
        dtype: of the embedding.
        dtypes: of all of them as they are stored; those that adapters were merged into are in fp32 here.
        rows: of the embedding, Megatron's padding included.
        warnings: what could not be looked at.
    """

    where: Path
    read: Callable[[str], np.ndarray]
    blocks: Callable[[str], Iterable[np.ndarray]]
    dtype: str
    dtypes: Sequence[str]
    rows: int
    warnings: tuple[str, ...] = ()


def open_trained(nemo: Path, described: Description, base: str | Path | None) -> Trained:
    """Open the weights of a checkpoint, adapters merged into their base.

    Raises:
        CptError: they are damaged or another model's; the base is gone or is not the one that was adapted; rows of
            tokens would be cut off.
    """
    from nemo_cpt.checkpoint.lora import holds_adapters

    arch = described.config.arch
    trained = open_adapted(nemo, arch, base) if holds_adapters(nemo) else _open_whole(nemo, arch)
    _refuse_to_cut_tokens(trained, arch, (described.files, *carried_places(nemo)))
    return trained


def _open_whole(nemo: Path, arch: Architecture) -> Trained:
    from nemo_cpt.checkpoint.nemo_weights import NemoWeights

    weights = NemoWeights(nemo, arch)
    return Trained(nemo, weights.read, weights.blocks, weights.dtype, weights.all_dtypes, weights.vocab_rows)


def open_adapted(nemo: Path, arch: Architecture, base: str | Path | None) -> Trained:
    """Open the weights of a LoRA or DoRA run, merged into their base.

    Raises:
        CptError: they are another model's or method's; the base is gone or is not the one that was adapted.
    """
    from nemo_cpt.checkpoint.lora import Adapters, base_of

    weights, adapters = base_weights(base_of(nemo, base), arch), Adapters(nemo, arch)
    warnings = adapters.check_base(weights)
    read, blocks = partial(adapters.read_merged, base=weights), partial(adapters.merged, base=weights)
    # An embedding that was trained whole is in the run's checkpoint, padded as its layout asked.
    rows = adapters.trained_rows or weights.vocab_rows
    return Trained(nemo, read, blocks, weights.dtype, weights.all_dtypes, rows, warnings)


def _refuse_to_cut_tokens(model: Trained, arch: Architecture, tokenizers: Iterable[Path]) -> None:
    """Refuse to cut off a row as padding that belongs to a token and so may have been trained."""
    for folder in tokenizers:
        tokens = count_token_ids(folder) or 0
        # Of every tokenizer that may have made the data: the base's and the run's own.
        if arch.vocab_size < min(tokens, model.rows):
            raise CptError(
                f"{model.where} has {model.rows} rows in its embedding and the tokenizer in {folder} {tokens} tokens, "
                f"but config.json has room for {arch.vocab_size} rows: those above belong to tokens, may have been "
                "trained, and would be lost. Give the base a row for every token (transformers: "
                f"model.resize_token_embeddings({tokens})), import it, and train from that."
            )
