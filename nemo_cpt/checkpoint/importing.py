"""Hugging Face → NeMo, tensor by tensor."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from nemo_cpt.arguments import checked
from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import Architecture, read_architecture
from nemo_cpt.checkpoint.arrays import DTYPES, bits, cast
from nemo_cpt.checkpoint.base import model_files
from nemo_cpt.checkpoint.context import HF_FOLDER
from nemo_cpt.checkpoint.folders import copy_small_files, require_tokenizer
from nemo_cpt.checkpoint.nemo_writer import Tensors, write_nemo
from nemo_cpt.checkpoint.provenance import hand_on
from nemo_cpt.checkpoint.safetensors_files import HFWeights
from nemo_cpt.checkpoint.tokenizer_ids import count_token_ids
from nemo_cpt.corpus.atomic_folders import new_folder
from nemo_cpt.errors import CptError
from nemo_cpt.made import Making, stamps
from nemo_cpt.records import AsDict, restored


@dataclass(frozen=True)
class ImportReport(AsDict):
    """What an import did.

    Attributes:
        source: the Hugging Face folder.
        dest: the NeMo checkpoint.
        model_type: as config.json names it.
        dtype: of the weights.
        tensors: how many were read.
        parameters: values in all.
        bytes_written: of the weights.
        dropped: tensors that follow from others and were left out.
        warnings: what to know before training from it.
        seconds: wall time.
        status: `written`, or `unchanged` where the same was there already.
    """

    source: str
    dest: str
    model_type: str
    dtype: str
    tensors: int
    parameters: int
    bytes_written: int
    dropped: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float
    status: str = "written"


@checked
def import_hf(
    source: str | Path,
    dest: str | Path,
    *,
    ignore_fields: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Turn a Hugging Face folder into a NeMo 2.0 checkpoint, without building the model.

    The checkpoint is what `llm.import_ckpt` writes with Transformer Engine's layer spec: readable at any tensor and
    pipeline parallel size, with Transformer Engine or without, by `AutoResume(restore_config=RestoreConfig(path))`.
    Weights keep their bits. One tensor at a time is in memory. `dest/hf` holds the model's small files; a training that
    takes its tokenizer from there carries them into its own checkpoints, where `export_hf` finds them.

    Args:
        source: folder with config.json, safetensors weights and a tokenizer; Llama 2 to 3.2, SmolLM2, Mistral,
            Qwen2, Qwen2.5, Qwen3 and GPT-2.
        dest: the checkpoint's folder; one that this very import made is left as it is.
        ignore_fields: config fields to accept although they are unknown here.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
        CptError: unsupported or inconsistent config, damaged, missing or non-finite weights, no tokenizer, `dest`
            holds something else, not enough disk. Nothing is left at `dest` then.
    """
    start = time.monotonic()
    source = Path(source)
    if (source / "weights").is_dir() and not (source / "config.json").exists():
        raise CptError(f"{source} is a NeMo checkpoint already: give it to a recipe as it is, base={source}")
    # The cheap refusals first: gigabytes are read only when nothing speaks against it.
    arch = read_architecture(source, ignore_fields)
    require_tokenizer(source)
    making = Making("import", {"source": stamps(model_files(source))}, {"ignore_fields": sorted(ignore_fields)})
    if found := making.done(Path(dest)):
        return restored(ImportReport, found, source=str(source), dest=str(dest), status="unchanged")
    weights = HFWeights(source)
    slots = layout.slots(arch)
    dropped = check_tensors(weights, slots, arch)
    # The weights' own dtype where config.json does not say: nothing is cast.
    arch = arch.with_dtype(arch.dtype or weights.infos[slots[0].name].dtype)
    tensors, widened = _for_megatron(weights, slots)
    size = sum(tensors.nbytes(slot.name) for slot in slots)
    with new_folder(dest, size) as folder:
        copy_small_files(source, folder / HF_FOLDER, in_checkpoint=True)
        hand_on(source, folder / HF_FOLDER)
        write_nemo(folder, tensors, arch, progress)
        report = ImportReport(
            source=str(source),
            dest=str(dest),
            model_type=arch.model_type,
            dtype=str(arch.dtype),
            tensors=len(slots),
            parameters=sum(prod(slot.shape) for slot in slots),
            bytes_written=size,
            dropped=tuple(dropped),
            warnings=(*weights.warnings, *_told(widened), *_tokens_without_rows(source, arch)),
            seconds=round(time.monotonic() - start, 3),
        )
        making.note(folder, report.as_dict())
    return report


def _for_megatron(weights: HFWeights, slots: Sequence[layout.Slot]) -> tuple[Tensors, list[str]]:
    """The tensors as they are written, and the names of those that are widened to fp32.

    Megatron keeps all layers of a kind, and what it joins, as one tensor, which has one dtype.
    """
    infos, dtypes = weights.infos, defaultdict(set)
    for slot in slots:
        dtypes[slot.key].add(infos[slot.name].dtype)
    mixed = {slot.name for slot in slots if len(dtypes[slot.key]) > 1}
    dtype = {slot.name: "float32" if slot.name in mixed else infos[slot.name].dtype for slot in slots}
    tensors = Tensors(
        read=lambda name: cast(weights.read(name), name, dtype[name]),
        blocks=lambda name: (cast(block, name, dtype[name]) for block in weights.blocks(name)),
        path=lambda name: infos[name].path,
        nbytes=lambda name: prod(infos[name].shape) * DTYPES[dtype[name]].itemsize,
    )
    return tensors, [name for name in dtype if dtype[name] != infos[name].dtype]


def _told(widened: Sequence[str]) -> Iterator[str]:
    if widened:
        yield (
            f"tensors that are float32 in the checkpoint, {widened[0]} first ({len(widened)} in all): what Megatron "
            "keeps as one has several dtypes in the source"
        )


def _tokens_without_rows(source: Path, arch: Architecture) -> Iterator[str]:
    tokens = count_token_ids(source)
    if tokens is not None and tokens > arch.vocab_size:
        yield (
            f"the tokenizer has {tokens} tokens and the model rows for {arch.vocab_size}: a text with one of the ids "
            f"from {arch.vocab_size} on cannot be trained on. If you need them, give the model their rows first "
            f"(transformers: model.resize_token_embeddings({tokens}))"
        )


def check_tensors(weights: HFWeights, slots: Sequence[layout.Slot], arch: Architecture) -> list[str]:
    """Refuse weights that are not those of a config.json.

    Returns:
        Names of tensors that follow from others.

    Raises:
        CptError: a tensor is missing, has another shape, or has no place in the model.
    """
    for slot in slots:
        info = weights.infos.get(slot.name)
        if info is None and slot.name.removeprefix("transformer.") in weights.infos:
            raise CptError(
                f"{weights.folder}: the tensors have no `transformer.` before their names: it is GPT-2 without its "
                "output layer, as OpenAI's is published. Save it once with transformers' GPT2LMHeadModel."
            )
        if info is None:
            raise CptError(
                f"{weights.folder}: tensor {slot.name} is missing, which config.json asks for "
                f"({arch.num_hidden_layers} layers, tie_word_embeddings={arch.tie_word_embeddings}). "
                "config.json and the weights belong to different models, or a shard is missing."
            )
        if info.shape != slot.shape:
            raise CptError(
                f"{info.path}: tensor {slot.name} has shape {info.shape}, config.json asks for {slot.shape}. "
                "config.json and the weights belong to different models."
            )
    return _droppable(weights, slots, arch)


def _droppable(weights: HFWeights, slots: Sequence[layout.Slot], arch: Architecture) -> list[str]:
    dropped, known = [], {slot.name for slot in slots}
    for name in sorted(weights.infos.keys() - known):
        tied_head = name == layout.HEAD and arch.tie_word_embeddings
        # Old Llama 2 files hold the rotary frequencies, which follow from rope_theta; a tied head is the embedding.
        if not name.endswith("rotary_emb.inv_freq") and not (tied_head and _same_as(slots[0].name, weights)):
            raise CptError(
                f"{weights.infos[name].path}: tensor {name} has no place in a {arch.model_type} model of this config. "
                "It would be lost; check config.json (tie_word_embeddings, num_hidden_layers, biases)."
            )
        dropped.append(name)
    return dropped


def _same_as(embedding: str, weights: HFWeights) -> bool:
    one, other = weights.read(layout.HEAD), weights.read(embedding)
    return one.dtype == other.dtype and np.array_equal(bits(one), bits(other))
