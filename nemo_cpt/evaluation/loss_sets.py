"""The texts that a loss is measured on: those that were named, or those that the run validated on."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_cpt.checkpoint.architecture import read_json
from nemo_cpt.checkpoint.context import RUN_JSON
from nemo_cpt.checkpoint.provenance import read_provenance
from nemo_cpt.checkpoint.tokenizer_ids import END_OF_TEXT
from nemo_cpt.compatibility import check_data, read_base
from nemo_cpt.conversations.dataset import Fit, conversations_prefix, is_conversations, open_conversations
from nemo_cpt.conversations.inspection import SEQ_LENGTH as CONVERSATION_LENGTH
from nemo_cpt.conversations.mixture import SEED, check_any_fits
from nemo_cpt.corpus.dataset.index import fingerprint, full_prefix, read_index, sample_digest
from nemo_cpt.corpus.reading.chunks import hash_file
from nemo_cpt.corpus.reading.long_texts import long_texts
from nemo_cpt.corpus.reading.sources import HUB, list_sources
from nemo_cpt.errors import CptError, near_paths
from nemo_cpt.evaluation.candidates import Candidate, Say
from nemo_cpt.evaluation.reading import holds_conversations
from nemo_cpt.moved import places
from nemo_cpt.training.changes import content_of, same
from nemo_cpt.training.masks import masks_of
from nemo_cpt.training.run_folder import newest_whole

SEQ_LENGTH, SAMPLES = 1024, 512  # of a tokenized set that no run says more of: up to half a million tokens


@dataclass(frozen=True)
class LossSet:
    """A text to measure the loss on.

    Attributes:
        name: in the report.
        path: a file of documents or of conversations, or a Megatron prefix.
        seq_length: of the sequences of a tokenized set; of those that conversations have to fit into; None for
            documents.
        samples: sequences of a tokenized set, or of packed conversations; None for all, and for documents.
        seed: of the order in which sequences are taken.
        masks: those of `MASKS` that a tokenized set is read with.
        too_long: what becomes of longer conversations, as in `Conversations.too_long`; None for texts.
        template: hash of the template that a file's conversations were given; None for all else.
        prefixes: where these are tokenized, by the label of the model.
    """

    name: str
    path: str
    seq_length: int | None = None
    samples: int | None = None
    seed: int = SEED
    masks: Sequence[str] = ()
    too_long: str | None = None
    template: str | None = None
    prefixes: Mapping[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """As in `TextLoss`."""
        return "conversation" if self.too_long else "sequence" if self.seq_length else "document"

    @cached_property
    def fit(self) -> Fit:
        """How conversations fit; a file's by the last model's tokens."""
        chats = open_conversations([self.path, *self.prefixes.values()][-1])
        return chats.fit(self.seq_length or 0, self.too_long or "")

    @cached_property
    def hash(self) -> str:
        """By which its content is known."""
        if self.unit == "document" or self.template:
            return hash_file(self.path) + (self.template or "")
        # A mask may differ where the tokens do not.
        return fingerprint(self.path) + (sample_digest(Path(f"{self.path}.mask")) if self.too_long else "")


def training_record(model: str | Path | None) -> dict[str, Any]:
    """What a run's newest checkpoint, a checkpoint or its export says of its training; empty for other models."""
    path = Path(str(model))
    # A run's folder stands for its newest checkpoint, as everywhere.
    newest = newest_whole(path / "checkpoints") if (path / "checkpoints").is_dir() else None
    record = (newest.path if newest else path) / RUN_JSON
    if record.is_file():
        return read_json(record)
    trainings = read_provenance(path).trainings
    return dict(trainings[-1]) if trainings else {}


def mask_warnings(candidates: Sequence[Candidate], texts: Sequence[LossSet]) -> list[str]:
    """Which models were trained with other masks than those that the losses of tokenized sets are measured with."""
    used = next((each.masks for each in texts if each.unit == "sequence"), None)
    if used is None:
        return []
    records = {each.name: training_record(each.model) for each in candidates if not each.is_endpoint}
    return [
        f"{name} was trained with {_listed(masks_of(record))}, and the losses of tokenized sets are measured with "
        f"{_listed(used)}, for all models: its own validation losses are others"
        for name, record in records.items()
        if record and masks_of(record) != used
    ]


def left_out(texts: Sequence[LossSet]) -> Iterator[str]:
    """Of which sets conversations were too long to be measured whole."""
    for text in (each for each in texts if each.too_long):
        fit = text.fit
        if fit.too_long:
            longer = f"{fit.too_long} of the {len(fit.positions)} conversations of {text.name} are longer than"
            yield f"{longer} {fit.seq_length} tokens: {fit.cut} are cut, and {fit.too_long - fit.cut} left out"


def _listed(masks: Sequence[str]) -> str:
    return " and ".join(masks) or "no mask"


def validated_on(run: Mapping[str, Any], model: str | Path | None, say: Say) -> list[str]:
    """The run's validation sets, those that are still there, or where the run was moved to with them."""
    record = run.get("validated_on", {})
    named = record.get("sets", {}) | record.get("conversations", {})
    found = {name: _set_of_run(run, name, prefix, Path(str(model))) for name, prefix in named.items()}
    for name in (name for name, prefix in found.items() if prefix is None):
        say(f"the run validated on {named[name]}, which is not there any more")
    # Records of older versions do not say where conversations are.
    if chats := sorted(_contents(run).keys() - named.keys()):
        say(f"the run validated on conversations ({', '.join(chats)}): --loss {chats[0]}=PREFIX measures the answers")
    elif not named:
        say("nothing says which sets the model was validated on: no losses (--loss NAME=PATH measures one)")
    return [f"{name}={prefix}" for name, prefix in found.items() if prefix]


def _set_of_run(run: Mapping[str, Any], name: str, prefix: str, model: Path) -> str | None:
    if Path(f"{prefix}.idx").is_file():
        return prefix
    moved = (str(each).removesuffix(".idx") for each in places(Path(f"{prefix}.idx"), model / "checkpoints"))
    return next((each for each in moved if content_of(each) == _contents(run).get(name)), None)


def _name_in_run(run: Mapping[str, Any], prefix: str) -> str | None:
    """What a run calls a set that it validated on, wherever that lies now and whatever its files are called."""
    content = content_of(prefix) if _contents(run) else ""
    return next((name for name, each in _contents(run).items() if same(each, content)), None)


def _contents(run: Mapping[str, Any]) -> Mapping[str, str]:
    """What a run's validation sets held, by their names."""
    found: Mapping[str, str] = run.get("settings", {}).get("validation", {}).get("sets", {})
    return found


def find_loss_sets(
    specs: Sequence[str], candidates: Sequence[Candidate], run: Mapping[str, Any], limit: int | None, say: Say,
    *, template: str | None = None, scratch: str | Path = "",
) -> list[LossSet]:  # fmt: skip
    """The sets of `NAME=PATH`s, whose losses all models can be asked for.

    Args:
        specs: of the command line, or `validated_on`.
        candidates: the models.
        run: as `training_record` gives it; a set that it validated on is read as it did.
        limit: most sequences of each.
        say: told what could not be compared with a model's tokenizer.
        template: that a file's conversations are given; the last model's own when None.
        scratch: a folder where such are tokenized.

    Raises:
        CptError: one is not there or was tokenized for another model, two have one name, or a model is an endpoint.
    """
    named = [_named(spec) for spec in specs]
    check_names([name for name, _ in named])
    # OpenAI's protocol for chats gives no log probabilities of a prompt.
    if named and (remote := [each.model for each in candidates if each.is_endpoint]):
        raise CptError(
            f"{remote[0]} is an endpoint, which gives no losses: leave --loss away, or name the model's folder"
        )
    found = []
    for name, path in named:
        # A dataset may be named by one of its files, too.
        if not Path(path).is_file() or path.endswith((".bin", ".idx", ".mask")):
            found.append(_tokenized_set(name, path, candidates, run, limit))
        elif holds_conversations(path, rather_than_texts=template is not None):
            found.append(_file_of_conversations(name, path, candidates, template, Path(scratch, str(len(found)))))
        else:
            found.append(LossSet(name, path))
            if note := long_texts(list_sources(path)):
                say(f"note: {note}")
    tokenized = [each.path for each in found if each.seq_length and not each.template]
    for candidate in candidates if tokenized else ():
        for warning in check_data(read_base(candidate.folder), tokenized, unlike_base=[END_OF_TEXT]):
            say(warning)
    return found


def _named(spec: str) -> tuple[str, str]:
    name, equals, path = spec.partition("=")
    if not equals or not name or not path:
        raise CptError(f"a set is given as NAME=PATH, such as ja=ds/ja_validation, not {spec!r}")
    return name, path


def _tokenized_set(
    name: str, path: str, candidates: Sequence[Candidate], run: Mapping[str, Any], limit: int | None
) -> LossSet:
    if is_conversations(path):
        return _set_of_conversations(name, conversations_prefix(path), candidates, run)
    if not Path(f"{full_prefix(path)}.idx").exists():
        _refuse_no_prefix(path)
    tokens = read_index(path).tokens
    validated = run.get("validated_on", {})
    same_place = str(Path(full_prefix(path)).absolute()) in validated.get("sets", {}).values()
    if same_place or (validated and _name_in_run(run, path)):  # just what the training's loss is of
        seq_length, samples = validated["seq_length"], validated["samples"] or SAMPLES
        # The run's seed shuffles its validation sets, too: with another, other sequences of a longer set come first.
        recorded = run.get("settings", {}).get("data", {}).get("seed")
        seed = SEED if recorded is None else recorded
    else:
        contexts = [each.context_length for each in candidates if each.context_length]
        seq_length = min([SEQ_LENGTH, *contexts, max(tokens - 1, 1)])
        samples, seed = min(SAMPLES, max((tokens - 1) // seq_length, 1)), SEED
    # The run's on any set: what its loss left out it has not learnt.
    return LossSet(name, path, seq_length, min(samples, limit or samples), seed, masks_of(run))


def _refuse_no_prefix(path: str) -> None:
    """Refuse what is no prefix by its looks: it would be looked for as one, and the message mislead."""
    if Path(path).is_dir():
        raise CptError(f"{path} is a folder: name one file of it, or the Megatron prefix of a dataset")
    if path.startswith(HUB):
        raise CptError(f"{path} is a dataset of the hub: name a file of it (`nemo-cpt fetch` or `split` makes some)")
    if re.search(r"\.(jsonl|json|ndjson|parquet|gz|zst|txt|text|md|markdown|csv|tsv)$", path, re.IGNORECASE):
        raise CptError(f"there is no file {path}{near_paths(Path(path))}")


def _set_of_conversations(name: str, prefix: str, candidates: Sequence[Candidate], run: Mapping[str, Any]) -> LossSet:
    open_conversations(prefix)  # refuses what is not whole, before a part of it is compared
    own = _name_in_run(run, prefix)
    if own is None:
        found = LossSet(name, prefix, _length(candidates), too_long="drop")
    else:
        # What the training's loss is of: a validation ends after so many batches of packed conversations.
        data, batches = run["settings"]["data"], run["settings"]["validation"].get("batches", {}).get(own)
        samples = batches and batches * data["global_batch_size"]
        found = LossSet(name, prefix, data["seq_length"], samples or None, too_long=data["too_long"])
    check_any_fits(found.fit, prefix)
    return found


def _length(candidates: Sequence[Candidate]) -> int:
    return min([CONVERSATION_LENGTH, *(each.context_length for each in candidates if each.context_length)])


def _file_of_conversations(
    name: str, path: str, candidates: Sequence[Candidate], template: str | None, folder: Path
) -> LossSet:
    """Conversations as they are written, tokenized as a training's would be, in one template for all models."""
    from nemo_cpt.conversations.preparation import prepare

    folder.mkdir()
    template = template or _own_template(candidates, path, folder)
    prefixes: dict[str, str] = {}
    # The last model's tokens are taken for the others too, where they mean the same to them: where a tuning changed the
    # end of a text, a template that writes it gives the others' tokenizers another one.
    for candidate in reversed(candidates):
        made = next((each for each in prefixes.values() if _means_the_same(candidate, each)), None)
        if made is None:
            try:
                made = prepare(
                    path, folder / str(len(prefixes)), candidate.folder, template=template, quiet=True
                ).prefix
            except CptError as error:
                raise CptError(
                    f"{error} An evaluation takes all lines of a file as they are: with other options prepare it "
                    f"(nemo-cpt prepare {path} --template ...), and give --loss {name}=PREFIX"
                ) from error
        prefixes = {candidate.label: made} | prefixes
    given = open_conversations(prefixes[candidates[-1].label]).manifest["template"]["sha256"]
    text = LossSet(name, path, _length(candidates), too_long="drop", template=given, prefixes=prefixes)
    check_any_fits(text.fit, path)
    return text


def _own_template(candidates: Sequence[Candidate], path: str, folder: Path) -> str:
    """The last model's chat template, or the nearest's that has one, as a file."""
    from nemo_cpt.conversations.templates import SHIPPED, own_template

    text = next((found for each in reversed(candidates) if (found := own_template(each.folder)) is not None), None)
    if text is None:
        raise CptError(
            f"{path} holds conversations, and no model has a chat template to put them in: name one, such as "
            f"--template {SHIPPED[0]} ({', '.join(SHIPPED[1:])}, or a Jinja file)"
        )
    (written := folder / "chat_template.jinja").write_text(text, "utf-8")
    return str(written)


def _means_the_same(candidate: Candidate, prefix: str) -> bool:
    """Whether a model's own tokenizer would give the very ids of a set."""
    try:
        return not check_data(read_base(candidate.folder), [prefix], unlike_base=[END_OF_TEXT])
    except CptError:
        return False


def check_names(names: Sequence[str]) -> None:
    """Refuse two sets of one name."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise CptError(f"two sets are named {twice[0]!r}: give each NAME=... of its own")
