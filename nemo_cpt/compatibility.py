"""What belongs together in a run: its base, model, tokenizer, data and checkpoint, compared by content.

The one place of this comparison: recipe functions, `guards.check`, the doctor, the job and the evaluation call it. It
imports neither torch nor NeMo.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_cpt import corpus
from nemo_cpt.checkpoint.architecture import Architecture, read_carried, read_json
from nemo_cpt.checkpoint.base import base_weights, carried_places
from nemo_cpt.checkpoint.context import HF_FOLDER
from nemo_cpt.checkpoint.exported_config import can_be_written
from nemo_cpt.checkpoint.folders import has_tokenizer
from nemo_cpt.checkpoint.model_config import (
    Constants,
    Difference,
    constants_of,
    constants_of_nemo,
    described,
    differences,
    read_model_config,
)
from nemo_cpt.checkpoint.tokenizer_ids import END_OF_TEXT, end_ids
from nemo_cpt.checkpoint.weights_digest import base_weights_of, samples, sums_of, weights_digest
from nemo_cpt.errors import CptError
from nemo_cpt.rounding import rounded_up

ROWS = "vocab_size"
TILE = 16  # rows of a weight that the GPU's matrix products take at once, in bf16 as in fp8
# What a training may change on purpose, such as to a longer context: no tensor's shape depends on it, and an export
# writes it. The last one is the data's.
CHANGEABLE = ("rope_theta", "rope_scaling", "sliding_window", "rms_norm_eps", END_OF_TEXT)


@dataclass(frozen=True)
class Base:
    """What weights say of themselves: those of an imported base, of a training's checkpoint, of a Hugging Face folder.

    Attributes:
        folder: where they are.
        config: their config.json; empty where they carry none, as those of NeMo's own importer.
        architecture: what config.json and context say together; None where config.json is missing or not translated.
        ends: ids at which a text ends, by config.json and generation_config.json; empty where neither says.
        constants: of the forward pass; empty where neither config.json nor the context says any that are understood.
        tokenizer: the folder of their tokenizer; None where they carry none.
    """

    folder: Path
    config: Mapping[str, Any]
    architecture: Architecture | None
    ends: frozenset[int]
    constants: Constants
    tokenizer: Path | None

    @cached_property
    def rows(self) -> int:
        """Rows that are tokens'; where no file says, all of the embedding's, Megatron's padding among them."""
        return self.config.get(ROWS) or self.constants.get(ROWS) or embedding_rows(self.folder) or 0

    @cached_property
    def tokenizer_hashes(self) -> tuple[str, str] | None:
        """Of the tokenizer's vocabulary and of its settings; they tell equal tokenizers without loading them."""
        from nemo_cpt.corpus.tokenization.tokenizer_files import settings_hash, vocabulary_hash

        return (vocabulary_hash(self.tokenizer), settings_hash(self.tokenizer)) if self.tokenizer else None

    @cached_property
    def loaded_tokenizer(self) -> Any:
        """The tokenizer, described. One that is more than its tokenizer.json takes seconds: transformers loads it."""
        from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer

        return load_tokenizer(self.tokenizer or self.folder)

    @cached_property
    def tokenizers_before_growth(self) -> list[Any]:
        """The tokenizers that theirs grew from, described, the nearest first."""
        from nemo_cpt.vocabulary.byte_level import before_growth

        return list(before_growth(self.tokenizer)) if self.tokenizer else []


def positions(base: Base, seq_length: int) -> int:
    """The positions of a model of the base's shape that is trained on sequences of a length.

    Raises:
        CptError: the base has learnt fewer.
    """
    if base.architecture is None or not base.architecture.like_gpt2:
        return seq_length
    # Learnt positions are weights: the model has the base's, and sequences may be shorter.
    learnt = base.architecture.max_position_embeddings
    if seq_length > learnt:
        raise CptError(
            f"seq_length is {seq_length}, and {base.folder} has learnt {learnt} positions: give shorter sequences, or "
            "make another with nemo-cpt init --max-position-embeddings"
        )
    return learnt


def check(
    base: Base,
    model: Any = None,
    tokenizer: str | None = None,
    prefixes: Iterable[str] = (),
    unlike_base: Collection[str] = (),
) -> list[str]:
    """Compare all that a run is made of with its base.

    Args:
        base: what the run's weights come from: an imported model, or a checkpoint of a training.
        model: NeMo's model config, or its fields by name (see `constants_of_nemo`); nothing leaves it out.
        tokenizer: the run's, where that is not the base's own; a name on the hub is not looked up.
        prefixes: the datasets.
        unlike_base: which of `CHANGEABLE` differ from the base on purpose.

    Returns:
        What could not be compared, and what may hurt, in sentences.

    Raises:
        CptError: something belongs to another base; the message holds both values and what to do.
    """
    warnings = check_model(base, model, unlike_base)
    return warnings + check_tokenizer(base, tokenizer) + check_data(base, prefixes, unlike_base, tokenizer)


def read_base(folder: str | os.PathLike[str]) -> Base:
    """Read what weights say of themselves.

    A training may have changed constants of the config.json that its checkpoints carry: the context has the last word.

    Raises:
        CptError: a file is damaged, or an import's context and its config.json tell of two models.
    """
    folder = Path(folder)
    # A Hugging Face folder, an import, a training's checkpoint: each has config.json in one of them.
    places = [folder, *carried_places(folder)]
    home = next((place for place in places if (place / "config.json").is_file()), None)
    # The config's neighbour first: it is the tokenizer that this config.json was published with.
    tokenizers = (place for place in ([home] if home else []) + places if has_tokenizer(place))
    architecture, in_context = _architecture(home), _in_context(folder)
    in_config = constants_of(architecture) if architecture else {}
    if (folder / HF_FOLDER).is_dir() and (found := differences(in_context, in_config)):
        raise CptError(
            f"the base {folder} is not the model of its config.json, {described(found, 'its context', 'config.json')}: "
            f"import it again with `nemo-cpt import HF_MODEL {folder}`"
        )
    # Only these: shapes cannot change, and the context's rows count padding.
    changed = {name: in_context[name] for name in CHANGEABLE if name in in_context}
    rows = {name: value for name, value in in_config.items() if name == ROWS}  # a context counts padding among them
    return Base(
        folder,
        read_json(home / "config.json") if home else {},
        replace(architecture, **changed) if architecture else None,
        frozenset(_ends(home)),
        {**in_config, **in_context, **rows},
        next(tokenizers, None),
    )


def _architecture(home: Path | None) -> Architecture | None:
    try:
        return read_carried(home) if home else None
    except CptError:  # a model that is not translated here can be trained all the same, and its context compared
        return None


def _in_context(folder: Path) -> Constants:
    model = read_model_config(folder)
    return constants_of_nemo(model) if model else {}


def _ends(home: Path | None) -> Iterator[int]:
    for name in ("config.json", "generation_config.json"):
        if home and (home / name).is_file():
            yield from end_ids(read_json(home / name), str(home / name))


def unlike(base: Base, model: Any) -> list[Difference]:
    """In what a model, built or configured, is not the base's; rows are compared elsewhere."""
    return [each for each in differences(constants_of_nemo(model), base.constants) if each.name != ROWS]


def check_unlike_base(names: Collection[str]) -> None:
    """Raise CptError where a recipe's `unlike_base=` names something that is not one of `CHANGEABLE`."""
    if unknown := [name for name in names if name not in CHANGEABLE]:
        raise CptError(f"unlike_base names {', '.join(unknown)}: what can be changed is {', '.join(CHANGEABLE)}")


def check_model(base: Base, model: Any, unlike_base: Collection[str] = ()) -> list[str]:
    """Refuse a model that is not the base's, whether its tensors fit or not.

    Returns:
        A warning where they could not be compared.

    Raises:
        CptError: a constant of the forward pass differs and `unlike_base` does not name it, or rows are missing.
    """
    check_unlike_base(unlike_base)
    if not model:
        return []
    # A warning, not an error: NeMo's own importer leaves no config.json, and its bases train.
    if not base.constants:
        return [f"The base {base.folder} does not say what model it is: the recipe's is not compared with it."]
    found = unlike(base, model)
    if not_meant := [each for each in found if each.name not in unlike_base]:
        raise CptError(
            f"the recipe's model is not that of its base {base.folder}, "
            f"{described(not_meant, 'the recipe', 'the base')}: {_model_cure(base, not_meant)}"
        )
    if base.architecture and (unsaid := [each for each in found if not can_be_written(each, base.architecture)]):
        raise CptError(
            f"{described(unsaid, 'the recipe', 'the base')}, and no config.json of model_type "
            f"{base.architecture.model_type} can say that: the run could not be exported. Take the base's value"
        )
    rows = given(model, ROWS)
    if rows and rows < base.rows:
        raise CptError(
            f"the recipe's model has {rows:,} rows (model.config.vocab_size), its base {base.folder} {base.rows:,}: "
            "leave vocab_size alone, the model gets the base's"
        )
    return []


def _model_cure(base: Base, found: Iterable[Difference]) -> str:
    from nemo_cpt.recipe_models import LIKE_BASE, model_config, recipe_modules

    theirs = {name: value for name, value in base.constants.items() if name != ROWS}
    recipes = [each.stem for each in recipe_modules() if not differences(constants_of_nemo(model_config(each)), theirs)]
    cure = f"run {recipes[0]}, whose model it is, or" if recipes else ""
    cure += f" give model={LIKE_BASE}, which takes the base's shape"
    names = [each.name for each in found]
    changeable = base.architecture and all(can_be_written(each, base.architecture) for each in found)
    return cure.strip() + (f"; if the change is meant, say so with unlike_base={names}" if changeable else "")


def rows_to_build(base: Base, model: Any, tensor_model_parallel_size: int) -> int:
    """The rows that NeMo's model is built with: those its config was given, else those of the weights, padded.

    A run that is resumed keeps its rows, which the optimizer's states have too. NeMo pads to 128 rows for each
    tensor-parallel rank. Padding has random weights and takes part in the softmax, so that it is kept to whole tiles,
    unless the config was given `make_vocab_size_divisible_by`.

    Raises:
        CptError: the given rows cannot be shared by the ranks.
    """
    rows = given(model, ROWS)
    # Rows that were given are built as given, or refused.
    multiple = 1 if rows else given(model, "make_vocab_size_divisible_by") or TILE
    padded = rounded_up(rows or embedding_rows(base.folder) or base.rows, multiple * tensor_model_parallel_size)
    if rows and rows != padded:
        raise CptError(
            f"model.config.vocab_size {rows} cannot be cut into {tensor_model_parallel_size} equal parts "
            f"(tensor_model_parallel_size): leave it away, or make it {padded}"
        )
    return padded


def given(model: Any, name: str) -> Any:
    """What a NeMo model config was given for a field; None where it has its class's value."""
    if isinstance(model, Mapping):
        return model.get(name)
    if hasattr(model, "__arguments__"):  # a run.Config
        return model.__arguments__.get(name)
    # A built config has every field: what equals the class's default was not given.
    value = getattr(model, name, None)
    return None if value == getattr(type(model), name, None) else value


def check_tokenizer(base: Base, tokenizer: str | None) -> list[str]:
    """Refuse a run's tokenizer that gives other ids than its base's own.

    Returns:
        A warning where they could not be compared.

    Raises:
        CptError: they differ, in size or in what they make of a text.
    """
    if tokenizer is None or base.tokenizer is None:
        return []
    folder = Path(tokenizer)
    if not has_tokenizer(folder):
        return [f"The tokenizer {tokenizer} is no folder here: it is not compared with {base.tokenizer}."]
    other = read_base(folder)
    # Equal files need not be loaded, which takes seconds.
    if other.tokenizer_hashes == base.tokenizer_hashes:
        return []
    from nemo_cpt.corpus.tokenization.probes import probe

    one, two = other.loaded_tokenizer, base.loaded_tokenizer
    described_as = {"vocabulary_size": one.vocabulary_size, "eos": one.eos, "bos": one.bos}
    if difference := _difference(described_as, {}, probe(one.reference_encoder()), False, two):
        raise CptError(
            f"the tokenizer {tokenizer} is not that of the base, {base.tokenizer} ({difference}): leave tokenizer= "
            "away, or take the base that it belongs to"
        )
    return []


def check_data(
    base: Base, prefixes: Iterable[str], unlike_base: Collection[str] = (), tokenizer: str | None = None
) -> list[str]:
    """Refuse datasets whose ids mean something else to the base, or nothing.

    Args:
        base: as `read_base` gives it.
        prefixes: of the datasets, all there and whole.
        unlike_base: with `eos_token_id`, documents may end with a token at which the base's config.json ends no text.
        tokenizer: the folder to compare with where the base carries no tokenizer.

    Returns:
        What could not be compared, and what may hurt, in sentences.

    Raises:
        CptError: a dataset was made with another tokenizer, holds an id beyond the base's rows, or ends its documents
            with another token than the base's texts do.
    """
    if base.tokenizer is None and tokenizer and has_tokenizer(tokenizer):
        # A base of NeMo's own importer carries none: the run's tokenizer is then what its data have to fit.
        base = replace(base, tokenizer=Path(tokenizer))
    datasets = {str(prefix): _manifest(prefix) for prefix in prefixes}
    warnings = [warning for prefix, manifest in datasets.items() for warning in _check_maker(base, prefix, manifest)]
    for prefix, manifest in datasets.items():
        _check_ids(base, prefix, manifest)
    if END_OF_TEXT in unlike_base:
        return warnings
    return warnings + [each for prefix, manifest in datasets.items() for each in _check_end(base, prefix, manifest)]


def check_template(base: Base, prefixes: Iterable[str]) -> list[str]:
    """Refuse conversations with special tokens that the base never learnt, for a training that freezes their rows.

    A token that is read needs a row of the embedding that was trained, the one that ends an answer also one of the
    output layer.

    Args:
        base: as `read_base` gives it.
        prefixes: of datasets and of conversations, all there and whole.

    Returns:
        A warning where the base's weights cannot be read.

    Raises:
        CptError: rows of the template's special tokens are as nothing has trained them.
    """
    from nemo_cpt.checkpoint.layout import slots
    from nemo_cpt.conversations.special_rows import measure_rows

    template = next((manifest["template"] for each in prefixes if "template" in (manifest := _manifest(each))), None)
    if template is None or not template["tokens"]:
        return []
    if base.architecture is None:
        return [f"The base {base.folder} carries no config.json: whether it knows the template's tokens is not known."]
    weights, stop = base_weights(base.folder, base.architecture), [template["stop"]]
    # Of tied embeddings there is no second one.
    embedding, *head = (slot.name for slot in slots(base.architecture) if slot.part == "vocab")
    tokens = {embedding: template["tokens"]} | {name: dict(stop) for name in head}
    rows = {(row.token, row.id) for name, each in tokens.items()
            for row in measure_rows(weights.read(name), each) if row.untrained}  # fmt: skip
    if rows:
        listed = ", ".join(f"{token} ({number})" for token, number in sorted(rows, key=lambda row: row[1]))
        raise CptError(
            f"the template {template['name']} uses {listed}, which the base {base.folder} was never trained with (by "
            "the rows of its embedding and output layer), and these stay frozen: the model could not learn when an "
            "answer ends. Train them beside the adapters, embeddings_lr=2e-5, or prepare the conversations with a "
            "template of plain text, nemo-cpt prepare ... --template alpaca-ja (alpaca-en, alpaca-zh)"
        )
    return []


def _manifest(prefix: str) -> dict[str, Any]:
    """A dataset's manifest; empty for one that `prepare` did not make."""
    from nemo_cpt.corpus.dataset.manifest import manifest_path

    if not manifest_path(prefix).exists():
        return {}
    manifest, index = corpus.read_manifest(prefix), corpus.read_index(prefix)
    # A manifest that was copied with another dataset would vouch for the wrong tokenizer.
    if (manifest["tokens"], manifest["documents"]) != (index.tokens, index.documents):
        raise CptError(
            f"{index.prefix} has {index.documents:,} documents and {index.tokens:,} tokens, its manifest tells of "
            f"{manifest['documents']:,} and {manifest['tokens']:,}: remove {manifest_path(prefix)}, which is another "
            "dataset's, or prepare this one again"
        )
    return manifest


def _check_maker(base: Base, prefix: str, manifest: Mapping[str, Any]) -> list[str]:
    """Refuse a dataset that another tokenizer made; return a warning where that cannot be known."""
    look = "Read a sample of it decoded: nemo-cpt inspect PREFIX --tokenizer FOLDER."
    if base.tokenizer is None:
        return [f"The base {base.folder} carries no tokenizer to compare {prefix} with. {look}"]
    if not manifest:
        return [f"{prefix} has no manifest: no one knows which tokenizer made it. {look}"]
    made_with = manifest["tokenizer"]
    vocabulary, settings = base.tokenizer_hashes or ("", "")
    # Manifests of older versions lack the settings' hash: there the vocabulary's decides.
    if (made_with["sha256"], made_with.get("settings_sha256", settings)) == (vocabulary, settings):
        return []
    splits = manifest["options"].get("split_special_tokens", False)
    of_data = (made_with, manifest.get("markers", {}), manifest.get("probes", {}), splits)
    difference = _difference(*of_data, base.loaded_tokenizer)
    if difference and any(not _difference(*of_data, older) for older in base.tokenizers_before_growth):
        return [
            f"{prefix} was made with a tokenizer that the base's grew from: its ids are the same ones, but its texts "
            f"have more tokens than they need. Prepare it again: nemo-cpt prepare ... --tokenizer {base.tokenizer}"
        ]
    if difference:
        raise CptError(
            f"{prefix} was made with the tokenizer {made_with['name']}, which is not the base's ({difference}): "
            f"prepare it again with that, nemo-cpt prepare ... --tokenizer {base.tokenizer}"
        )
    if manifest.get("probes"):
        return []
    return [
        f"{prefix} was made with as many tokens as {base.tokenizer} has, but with other files, and its manifest, of an "
        f"older version, cannot tell whether the ids are the same. {look}"
    ]


def _difference(
    made_with: Mapping[str, Any], markers: Mapping[str, Any], probes: Mapping[str, str], splits: bool, tokenizer: Any
) -> str | None:
    """What tells a tokenizer, as a manifest describes it, from a loaded one."""
    from nemo_cpt.corpus.tokenization.probes import first_difference

    size = made_with["vocabulary_size"]
    if size != tokenizer.vocabulary_size:
        return f"{size:,} tokens against {tokenizer.vocabulary_size:,}"
    for token in (made_with.get("eos"), made_with.get("bos"), *markers.values()):
        text, number = token or ("", 0)
        # A token that is not special here is no difference yet: its probe tells.
        if tokenizer.special.get(text, number) != number:
            return f"{text!r} is {number} against {tokenizer.special[text]}"
    found = first_difference(probes, tokenizer.reference_encoder(splits)) if probes else None
    if found is None:
        return None
    text, ours, theirs = found
    ours, theirs = (" ".join(ids.split()[:4]) for ids in (ours, theirs))
    return f"{text[:20]!r} begins with the ids {ours} against {theirs}"


def _check_ids(base: Base, prefix: str, manifest: Mapping[str, Any]) -> None:
    """Refuse an id beyond the base's rows, where it is known or seen in a sample; the job looks at every batch."""
    from nemo_cpt.corpus.dataset.index import largest_id_in_sample

    largest = manifest["largest"] if "largest" in manifest else largest_id_in_sample(prefix)
    check_largest_id(largest, base.rows, prefix)


def check_largest_id(largest: int, rows: int, where: str) -> None:
    """Refuse a token id that has no row in the embedding.

    Raises:
        CptError: it has none.
    """
    if largest >= rows:
        raise CptError(
            f"{where} holds the token id {largest}, but the base has {rows:,} rows (vocab_size of its config.json): "
            "prepare the data with a tokenizer that has no token beyond them, such as a [PAD] that was added to it"
        )


def _check_end(base: Base, prefix: str, manifest: Mapping[str, Any]) -> list[str]:
    """Refuse documents that end with a token at which the base's texts do not end; warn where they end with none."""
    # Conversations have none: how their answers end is for the template to say.
    if "markers" not in manifest:
        return []
    if manifest["markers"]["eod"] is None:
        return [f"{prefix} has no end-of-document tokens: the model will not learn where a text ends."]
    text, number = manifest["markers"]["eod"]
    if not base.ends or number in base.ends:
        return []
    begins = ", with which texts begin there" if number == base.config.get("bos_token_id") else ""
    ends = " or ".join(str(each) for each in sorted(base.ends))
    raise CptError(
        f"the documents of {prefix} end with {text!r} ({number}), but the base {base.folder} ends a text with {ends} "
        f"(eos_token_id of its config.json){begins}: prepare it again with the token of that id, --eod-token TOKEN; if "
        f"the other end is meant, say so with unlike_base=['{END_OF_TEXT}']"
    )


def check_resumed(checkpoint: str | os.PathLike[str], base: str | os.PathLike[str] | None, model: Any = None) -> None:
    """Refuse to go on with a run as another model than it has been trained as, or on another base.

    Args:
        checkpoint: the run's, to be resumed.
        base: that the recipe names, which need not be there any more.
        model: NeMo's model config; None leaves it out.

    Raises:
        CptError: the model or the base is another one, or the run was trained with fewer rows than its base has.
    """
    checkpoint = Path(checkpoint)
    was = read_base(checkpoint)
    stated = constants_of_nemo(model) if model is not None else {}
    # Rows are looked at below, as the run really has them.
    stated.pop(ROWS, None)
    if found := differences(stated, was.constants):
        raise CptError(
            f"the run was trained as another model up to {checkpoint}, "
            f"{described(found, 'the recipe', 'the checkpoint')}: take those values again, or give the run another name"
        )
    for folder in _bases(checkpoint, base):
        _check_same_base(checkpoint, was, read_base(folder))
    rows = embedding_rows(checkpoint)
    if rows is not None and rows < was.rows:
        raise CptError(
            f"the run was trained with {rows:,} of the {was.rows:,} rows of its base up to {checkpoint}, and cannot be "
            "exported: start it again under another name"
        )


def _bases(checkpoint: Path, named: str | os.PathLike[str] | None) -> list[Path]:
    """The bases of a run that is resumed, as far as they are there: the named one, and the one that adapters record."""
    from nemo_cpt.checkpoint.lora import holds_adapters, recorded_base

    found = [Path(named)] if named is not None and Path(named).exists() else []
    # NeMo adds adapters to the weights that they record, whatever the recipe names.
    recorded = recorded_base(checkpoint) if holds_adapters(checkpoint) else None
    if recorded is not None and not any(recorded.samefile(each) for each in found):
        found.append(recorded)
    return found


def _check_same_base(checkpoint: Path, was: Base, base: Base) -> None:
    """Refuse another base than the run's; what a training may change is compared with the recipe's model."""
    fixed = {name: value for name, value in was.constants.items() if name not in CHANGEABLE}
    found = described(differences(fixed, base.constants), "the checkpoint", "the base")
    if not found and _has_other_weights(checkpoint, base.folder):
        found = "which has other weights"
    if found:
        raise CptError(
            f"the run is another base's than {base.folder} up to {checkpoint}, {found}: name its own base, or give the "
            "run another name"
        )


def _has_other_weights(checkpoint: Path, base: Path) -> bool:
    """Whether a run began with other weights than a base's, as far as its checkpoint says."""
    from nemo_cpt.checkpoint.lora import holds_adapters, recorded_base

    if (began_with := base_weights_of(checkpoint)) is not None:
        return began_with != weights_digest(base)
    # An older version's: adapters alone say where they began.
    recorded = recorded_base(checkpoint) if holds_adapters(checkpoint) else None
    if recorded is None or recorded.samefile(base):
        return False
    was, now = (sums_of(each) for each in (recorded, base))
    if was is None or now is None:
        return samples(recorded) != samples(base)
    return was != now


def embedding_rows(checkpoint: str | os.PathLike[str]) -> int | None:
    """The rows of a checkpoint's embedding, Megatron's padding among them; None for one that holds adapters alone."""
    from nemo_cpt.checkpoint.distributed_reader import DistributedReader
    from nemo_cpt.checkpoint.layout import EMBEDDING

    shapes = DistributedReader(Path(checkpoint, "weights")).shapes
    rows = (shape[0] for key, shape in shapes.items() if key.endswith(EMBEDDING) and "optimizer" not in key)
    return next(rows, None)
