"""A model with rows for the tokens by which its tokenizer grew: Hugging Face folder or NeMo checkpoint, streaming."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from nemo_cpt.arguments import checked
from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import Architecture, read_architecture, read_json
from nemo_cpt.checkpoint.arrays import BLOCK_BYTES, cast, check_finite
from nemo_cpt.checkpoint.base import check_dest, model_files, nemo_folder, unchanged
from nemo_cpt.checkpoint.chat_template import InstructionTemplate, write_template
from nemo_cpt.checkpoint.context import HF_FOLDER
from nemo_cpt.checkpoint.exporting import inputs_of
from nemo_cpt.checkpoint.folders import copy_small_files, require_tokenizer
from nemo_cpt.checkpoint.importing import check_tensors
from nemo_cpt.checkpoint.nemo_writer import Tensors, write_nemo
from nemo_cpt.checkpoint.provenance import hand_on
from nemo_cpt.checkpoint.safetensors_files import SHARD_BYTES, HFWeights, TensorPlan, write_weights
from nemo_cpt.checkpoint.trained import describe, open_trained
from nemo_cpt.conversations.templates import own_template
from nemo_cpt.corpus.atomic_folders import new_folder
from nemo_cpt.corpus.reading.chunks import stamps_of
from nemo_cpt.corpus.reading.sources import Inputs
from nemo_cpt.corpus.tokenization.tokenizer import Tokenizer
from nemo_cpt.corpus.tokenization.tokenizer_files import FILES, read_object
from nemo_cpt.errors import CptError
from nemo_cpt.made import Making, stamps
from nemo_cpt.records import AsDict, restored
from nemo_cpt.vocabulary.byte_level import FIRST_ROW, RECORD, ByteLevelBPE, grew_from, read_byte_level
from nemo_cpt.vocabulary.similarity import Likeness, similar_tokens

INITIALISATIONS = {
    "mean": "the mean of the rows of its old tokens",
    "noise": "that mean with a twentieth of the rows' spread as noise, so that no two new rows are alike",
    "zero": "zeros",
    "focus": "a weighted mean of the rows of old tokens that a corpus uses alike; the mean where it is rare there",
}
_NOISE = 0.05


@dataclass(frozen=True)
class GrowModelReport(AsDict):
    """What growing a model did.

    Attributes:
        source: the model.
        dest: the model that was made, of the same kind.
        tokenizer: whose tokens it has rows for.
        model_type: as config.json names it.
        dtype: of the weights.
        old_tokens: ids that had a row before.
        new_tokens: ids that were given one.
        rows: of the embedding: all ids, and the source's spare rows where those reach further.
        grown: the tensors that were given rows; one where the output layer is the embedding.
        initialisation: of the new rows.
        by_similarity: new tokens whose rows are, with `focus`, of tokens that are used alike.
        bytes_written: of the weights.
        seconds: wall time.
        status: `written`, or `unchanged` where the same was there already.
    """

    source: str
    dest: str
    tokenizer: str
    model_type: str
    dtype: str
    old_tokens: int
    new_tokens: int
    rows: int
    grown: tuple[str, ...]
    initialisation: str
    by_similarity: int
    bytes_written: int
    seconds: float
    status: str = "written"


@dataclass(frozen=True)
class _Growth:
    """The new rows: what each is made of.

    Attributes:
        first: the first new id.
        parts: of each new token in turn, old ids and their weights: those that its text was tokenized to, each 1, or
            those that it is used like.
        rows: of the grown tensors.
        initialisation: see `INITIALISATIONS`.
        by_similarity: new tokens whose parts are those that they are used like.
    """

    first: int
    parts: Sequence[Likeness]
    rows: int
    initialisation: str
    by_similarity: int

    def blocks(self, old: Iterable[np.ndarray], name: str) -> Iterator[np.ndarray]:
        """A tensor with the new rows in it, in one pass over the old one's blocks."""
        # By old id, so that a block of old rows takes a stretch of these, and the old tensor is read once.
        of_part = np.concatenate([part.ids for part in self.parts])
        weights = np.concatenate([part.weights for part in self.parts])
        of_new = np.repeat(np.arange(len(self.parts)), [len(part.ids) for part in self.parts])
        order = np.argsort(of_part, kind="stable")
        of_part, of_new, weights = of_part[order], of_new[order], weights[order]
        sums: np.ndarray | None = None
        total, squares, row, end = 0.0, 0.0, 0, self.first + len(self.parts)
        for block in old:
            if sums is None:
                sums = np.zeros((len(self.parts), block.shape[1]), np.float32)
            # Rows of tokens; those behind them are the model's spare ones, which the new tokens take first.
            known = block[: max(self.first - row, 0)]
            low, high = (int(np.searchsorted(of_part, edge)) for edge in (row, row + len(known)))
            # A part at a time of them: many new tokens may have the same old ones.
            step = max(BLOCK_BYTES // (4 * block.shape[1]), 1)
            for start in range(low, high, step):
                taken = slice(start, min(start + step, high))
                weighted = known[of_part[taken] - row].astype(np.float32) * weights[taken, None]
                np.add.at(sums, of_new[taken], weighted)
            if self.initialisation == "noise":
                values = known.astype(np.float32)
                total, squares = total + float(values.sum()), squares + float(np.square(values).sum())
            if len(known):
                yield known
            # Where the old tokens end: by then every row that a new one is made of has been seen.
            if row < self.first <= row + len(block) or (row == 0 and self.first == 0):
                yield from self._new(sums, total, squares, block.dtype.name, name)
            spare = block[max(end - row, 0) :] if row + len(block) > end else block[:0]
            row += len(block)
            if len(spare):
                yield spare

    def _new(self, sums: np.ndarray, total: float, squares: float, dtype: str, name: str) -> Iterator[np.ndarray]:
        if self.initialisation == "zero":
            sums[:] = 0
        else:
            sums /= np.array([part.weights.sum() if len(part.ids) else 1 for part in self.parts], np.float32)[:, None]
        if self.initialisation == "noise":
            count = self.first * sums.shape[1]
            spread = (squares / count - (total / count) ** 2) ** 0.5
            # The same numbers each time: a model that is grown again is the same one.
            chance = np.random.default_rng(0)
            sums += _NOISE * spread * chance.standard_normal(sums.shape, np.float32)
        yield cast(sums, name, dtype)


@checked
def grow_model(
    source: str | Path,
    dest: str | Path,
    tokenizer: str | Path,
    *,
    base: str | Path | None = None,
    initialisation: str = "mean",
    corpus: Inputs | None = None,
    json_key: str = "text",
    shard_bytes: float = SHARD_BYTES,
    ignore_fields: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> GrowModelReport:
    """Give a model rows for the tokens by which its tokenizer grew, without building it.

    The old rows and all other weights keep their bits, so that a text of old tokens has the same logits for them. A new
    row is the mean of the rows of the tokens that its text was before, in the embedding and in the output layer alike,
    as Swallow did (arXiv 2404.17790): the model reads nearly what it read, and a new token is about as likely as its
    beginning was. One block of a tensor and the new rows are in memory.

    Args:
        source: a Hugging Face folder, or a NeMo checkpoint (of an import, or of a training, adapters merged).
        dest: the folder to make, of the same kind; one that these very arguments made is left as it is.
        tokenizer: folder of the grown tokenizer, as `nemo-cpt tokenizer grow` makes it.
        base: of a LoRA run's checkpoint, where it is not the one that the run recorded.
        initialisation: of the new rows, one of `INITIALISATIONS`.
        corpus: with `focus`, texts of the language that was added, as `prepare` takes them (`vocabulary.similarity`).
        json_key: of `corpus`, the field that holds the text.
        shard_bytes: the most that one file of a Hugging Face folder's weights holds.
        ignore_fields: config fields to accept although they are unknown here.
        progress: called with (bytes done, bytes in all).

    Raises:
        CptError: the tokenizer did not grow from the model's, or from one with other special tokens or another chat
            template; the model has no rows for its own tokens; whatever
            `import_hf` or `export_hf` refuses of it; `dest` holds something else. Nothing is left there then.
    """
    start = time.monotonic()
    source, tokenizer = Path(source), Path(tokenizer)
    check_options(initialisation, corpus)
    check_dest(dest, source, base)
    making = _making(source, tokenizer, base, initialisation, corpus, json_key, shard_bytes, ignore_fields)
    if found := making.done(Path(dest)):
        return restored(GrowModelReport, found, source=str(source), dest=str(dest), status="unchanged")
    with _opened(source, base, ignore_fields) as model:
        growth = _growth(model.arch, model.files, tokenizer, initialisation, corpus, json_key)
        grown = replace(model.arch, vocab_size=growth.rows)
        rows = tuple(slot.name for slot in layout.slots(grown) if slot.part == "vocab")
        plans = [TensorPlan(slot.name, model.dtype_of(slot.name), slot.shape) for slot in layout.slots(grown)]
        size = sum(plan.nbytes for plan in plans)
        with new_folder(dest, size) as folder:
            small_files = folder if model.is_hf else folder / HF_FOLDER
            model.write_files(small_files)
            _replace_tokenizer(small_files, tokenizer, growth)
            if model.template:  # which stands in the tokenizer's files
                write_template(small_files, model.template)
            grow_rows = partial(_with_new_rows, model, growth, rows)
            _write_weights(folder, model, grow_rows, grown, plans, shard_bytes, progress or (lambda done, total: None))
            report = GrowModelReport(
                source=str(source),
                dest=str(dest),
                tokenizer=str(tokenizer),
                model_type=grown.model_type,
                dtype=str(grown.dtype),
                old_tokens=growth.first,
                new_tokens=len(growth.parts),
                rows=growth.rows,
                grown=rows,
                initialisation=initialisation,
                by_similarity=growth.by_similarity,
                bytes_written=size,
                seconds=round(time.monotonic() - start, 3),
            )
            making.note(folder, report.as_dict())
            model.check_unchanged()  # before the folder gets its name
    return report


def _making(
    source: Path, tokenizer: Path, base: str | Path | None, initialisation: str, corpus: Inputs | None, json_key: str,
    shard_bytes: float, ignore_fields: Collection[str],
) -> Making:  # fmt: skip
    is_hf = _is_hf(source)
    read = {"source": stamps(model_files(source))} if is_hf else inputs_of(nemo_folder(source), base)
    read |= {"tokenizer": stamps(model_files(tokenizer)), "corpus": stamps_of(corpus)}
    options = {"initialisation": initialisation, "json_key": json_key, "ignore_fields": sorted(ignore_fields)}
    return Making("grow", read, options | ({"shard_bytes": shard_bytes} if is_hf else {}))


def check_options(initialisation: str, corpus: Inputs | None) -> None:
    """Check the options of `grow_model` that need no model.

    Raises:
        CptError: one is unusable.
    """
    if initialisation not in INITIALISATIONS:
        raise CptError(f"initialisation is {initialisation!r}; it can be {', '.join(INITIALISATIONS)}")
    if (initialisation == "focus") != (corpus is not None):
        raise CptError(
            f"initialisation is {initialisation!r}, and corpus {corpus!r}: focus, and no other, is learnt from a "
            "corpus (--corpus) of the language that was added"
        )


@dataclass(frozen=True)
class _Model:
    """What is grown, from a Hugging Face folder or a NeMo checkpoint.

    Attributes:
        is_hf: whether it is a Hugging Face folder, and so the result.
        arch: its dtype is set.
        files: the folder of its small files.
        where: of its weights, for messages.
        read: gives a tensor whole.
        blocks: gives a tensor in blocks of rows.
        dtype_of: a tensor's, as it is written.
        write_files: writes its small files into a folder.
        template: the chat template that a run was tuned on.
        check_unchanged: raises CptError if a run replaced the checkpoint meanwhile.
    """

    is_hf: bool
    arch: Architecture
    files: Path
    where: Path
    read: Callable[[str], np.ndarray]
    blocks: Callable[[str], Iterable[np.ndarray]]
    dtype_of: Callable[[str], str]
    write_files: Callable[[Path], object]
    template: InstructionTemplate | None = None
    check_unchanged: Callable[[], None] = lambda: None


@contextmanager
def _opened(source: Path, base: str | Path | None, ignore_fields: Collection[str]) -> Iterator[_Model]:
    if _is_hf(source):
        yield _open_hf(source, base, ignore_fields)
        return
    nemo = nemo_folder(source)
    with unchanged(nemo) as check_unchanged:
        described = describe(nemo, base, None, ignore_fields)
        trained = open_trained(nemo, described, base)
        dtype = described.config.arch.dtype or trained.dtype
        yield _Model(
            is_hf=False,
            arch=described.config.arch.with_dtype(dtype),
            files=described.files,
            where=trained.where,
            read=trained.read,
            blocks=trained.blocks,
            dtype_of=lambda name: dtype,
            write_files=lambda folder: described.write(folder, dtype, in_checkpoint=True),
            template=described.template,
            check_unchanged=check_unchanged,
        )


def _is_hf(source: Path) -> bool:
    return (source / "config.json").is_file() and not (source / "weights").is_dir()


def _open_hf(source: Path, base: str | Path | None, ignore_fields: Collection[str]) -> _Model:
    if base is not None:
        raise CptError(f"{source} is a Hugging Face model, which needs no base: leave base= (--base) away")
    arch = read_architecture(source, ignore_fields)
    require_tokenizer(source)
    weights = HFWeights(source)
    check_tensors(weights, layout.slots(arch), arch)
    return _Model(
        is_hf=True,
        arch=arch.with_dtype(arch.dtype or weights.dtype),
        files=source,
        where=source,
        read=weights.read,
        blocks=weights.blocks,
        # Each its own: a folder may hold norms in fp32 beside matrices in bf16, and all old bits stay.
        dtype_of=lambda name: weights.infos[name].dtype,
        write_files=lambda folder: _copy_files(source, folder),
    )


def _copy_files(source: Path, folder: Path) -> None:
    copy_small_files(source, folder)
    hand_on(source, folder)


def _with_new_rows(model: _Model, growth: _Growth, grown: Collection[str], name: str) -> Iterator[np.ndarray]:
    """A tensor in blocks, with its new rows where it is one of those that are grown."""
    old = model.blocks(name)
    for block in growth.blocks(old, name) if name in grown else old:
        yield cast(block, name, model.dtype_of(name))


def _write_weights(
    folder: Path,
    model: _Model,
    blocks: Callable[[str], Iterator[np.ndarray]],
    grown: Architecture,
    plans: Sequence[TensorPlan],
    shard_bytes: float,
    progress: Callable[[int, int], None],
) -> None:
    """Write the tensors in the form of the model's kind."""
    sizes = {plan.name: plan.nbytes for plan in plans}
    if model.is_hf:
        write_weights(folder, plans, _watched(blocks, sum(sizes.values()), model.where, progress), shard_bytes)
    else:
        tensors = Tensors(
            read=lambda name: cast(model.read(name), name, model.dtype_of(name)),
            blocks=blocks,
            path=lambda name: model.where,
            nbytes=sizes.__getitem__,
        )
        write_nemo(folder, tensors, grown, progress)


def _growth(
    arch: Architecture, files: Path, tokenizer: Path, initialisation: str, corpus: Inputs | None, json_key: str
) -> _Growth:
    """What the new rows are made of, the two tokenizers compared."""
    old, new = read_byte_level(str(files)), read_byte_level(str(tokenizer))
    if reason := grew_from(new, old):
        raise CptError(
            f"the tokenizer {tokenizer} did not grow from that of {files}: {reason}. Grow that one: "
            f"nemo-cpt tokenizer grow {files} CORPUS --tokens N --output FOLDER"
        )
    if changed := _other_settings(files, tokenizer, old.described, new.described):
        raise CptError(
            f"the tokenizer {tokenizer} grew from one of the same tokens as that of {files}, and would take its "
            f"{changed} away. Grow the model's own: nemo-cpt tokenizer grow {files} CORPUS --tokens N --output FOLDER"
        )
    if new.size == old.size:
        raise CptError(f"the tokenizer {tokenizer} has no token that {files} has not: there is nothing to grow")
    if old.size > arch.vocab_size:
        raise CptError(
            f"the model in {files} has {arch.vocab_size:,} rows (vocab_size of its config.json) and its tokenizer "
            f"{old.size:,} tokens: give it a row for each first (transformers: "
            f"model.resize_token_embeddings({old.size}))"
        )
    alike = similar_tokens(old, new, corpus, json_key) if corpus is not None else {}
    parts = [alike.get(number, part) for number, part in enumerate(_old_tokens(old, new), old.size)]
    return _Growth(old.size, parts, max(arch.vocab_size, new.size), initialisation, len(alike))


def _other_settings(files: Path, tokenizer: Path, old: Tokenizer, new: Tokenizer) -> str | None:
    """What of a model's tokenizer another of the same tokens has not, such as a base model's in an instructed one."""
    template = own_template(files)
    if template is not None and template != own_template(tokenizer):
        return "chat template"
    # One that the model's own lacks may come with the grown one; one that it has must not change.
    kinds = [kind for kind in ("bos", "eos", "pad") if getattr(old, kind) not in (None, getattr(new, kind))]
    return next((f"{kind}_token {getattr(old, kind)[0]!r}" for kind in kinds), None)


def _old_tokens(old: ByteLevelBPE, new: ByteLevelBPE) -> list[Likeness]:
    """The old ids of each new token's text, by new id, all of one weight."""
    # A new token is spelled in bytes' characters, and the old model's merges cut that spelling as they cut the text.
    names = {number: token for token, number in new.ids.items()}
    words = [names.get(number, "") for number in range(old.size, new.size)]
    encodings = old.model_alone().encode_batch_fast(words, add_special_tokens=False)
    return [Likeness(np.array(each.ids, np.int64), np.ones(len(each.ids), np.float32)) for each in encodings]


def _watched(
    blocks: Callable[[str], Iterable[np.ndarray]], size: int, where: Path, progress: Callable[[int, int], None]
) -> Callable[[str], Iterator[np.ndarray]]:
    """The same blocks, refused where a value is not finite, with progress after each."""
    done = 0

    def watched(name: str) -> Iterator[np.ndarray]:
        nonlocal done
        for block in blocks(name):
            check_finite(block, name, where)
            yield block
            done += block.nbytes
            progress(done, size)

    return watched


def _replace_tokenizer(folder: Path, tokenizer: Path, growth: _Growth) -> None:
    """Put the grown tokenizer in the place of the old one, and the rows into config.json."""
    # Also those that the grown tokenizer lacks: a slow tokenizer's files would say other ids.
    for name in (*FILES, RECORD):
        (folder / name).unlink(missing_ok=True)
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    for path in tokenizer.glob("*.jinja"):
        shutil.copyfile(path, folder / path.name)
    # A tokenizer may have grown twice since: to the model all of it is new.
    if record := read_object(folder / RECORD):
        (folder / RECORD).write_text(json.dumps(record | {FIRST_ROW: growth.first}, indent=2) + "\n", encoding="utf-8")
    config = read_json(folder / "config.json") | {"vocab_size": growth.rows}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
