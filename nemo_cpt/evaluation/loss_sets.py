"""The texts that a loss is measured on: those that were named, or those that the run validated on."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_cpt.checkpoint.architecture import read_json
from nemo_cpt.checkpoint.context import RUN_JSON
from nemo_cpt.checkpoint.provenance import read_provenance
from nemo_cpt.compatibility import END_OF_TEXT, check_data, read_base
from nemo_cpt.conversations.dataset import is_conversations
from nemo_cpt.conversations.mixture import SEED
from nemo_cpt.corpus.dataset.index import fingerprint, full_prefix, read_index
from nemo_cpt.corpus.reading.chunks import hash_file
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.candidates import Candidate, Say
from nemo_cpt.moved import places
from nemo_cpt.training.changes import content_of
from nemo_cpt.training.masks import masks_of
from nemo_cpt.training.run_folder import newest_whole

SEQ_LENGTH, SAMPLES = 1024, 512  # of a tokenized set that no run says more of: up to half a million tokens


@dataclass(frozen=True)
class LossSet:
    """A text to measure the loss on.

    Attributes:
        name: in the report.
        path: a file of documents, or a Megatron prefix.
        seq_length: of the sequences of a tokenized set; None for documents.
        samples: sequences of a tokenized set; None for documents.
        seed: of the order in which sequences are taken.
        masks: those of `MASKS` that a tokenized set is read with.
    """

    name: str
    path: str
    seq_length: int | None = None
    samples: int | None = None
    seed: int = SEED
    masks: Sequence[str] = ()

    @cached_property
    def hash(self) -> str:
        """By which its content is known."""
        return fingerprint(self.path) if self.seq_length else hash_file(self.path)


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
    used = next((each.masks for each in texts if each.seq_length), None)
    if used is None:
        return []
    records = {each.name: training_record(each.model) for each in candidates if not each.is_endpoint}
    return [
        f"{name} was trained with {_listed(masks_of(record))}, and the losses of tokenized sets are measured with "
        f"{_listed(used)}, for all models: its own validation losses are others"
        for name, record in records.items()
        if record and masks_of(record) != used
    ]


def _listed(masks: Sequence[str]) -> str:
    return " and ".join(masks) or "no mask"


def validated_on(run: Mapping[str, Any], model: str | Path | None, say: Say) -> list[str]:
    """The run's validation sets, those that are still there, or where the run was moved to with them."""
    named = run.get("validated_on", {}).get("sets", {})
    found = {name: _set_of_run(run, name, prefix, Path(str(model))) for name, prefix in named.items()}
    for name in (name for name, prefix in found.items() if prefix is None):
        say(f"the run validated on {named[name]}, which is not there any more")
    if chats := sorted(_contents(run).keys() - named.keys()):
        say(f"the run validated on conversations ({', '.join(chats)}): `nemo-cpt report` has the losses on answers")
    elif not named:
        say("nothing says which sets the model was validated on: no losses (--loss NAME=PATH measures one)")
    return [f"{name}={prefix}" for name, prefix in found.items() if prefix]


def _set_of_run(run: Mapping[str, Any], name: str, prefix: str, model: Path) -> str | None:
    if Path(f"{prefix}.idx").is_file():
        return prefix
    moved = (str(each).removesuffix(".idx") for each in places(Path(f"{prefix}.idx"), model / "checkpoints"))
    return next((each for each in moved if content_of(each) == _contents(run).get(name)), None)


def _contents(run: Mapping[str, Any]) -> Mapping[str, str]:
    """What a run's validation sets held, by their names."""
    found: Mapping[str, str] = run.get("settings", {}).get("validation", {}).get("sets", {})
    return found


def find_loss_sets(
    specs: Sequence[str], candidates: Sequence[Candidate], run: Mapping[str, Any], limit: int | None, say: Say
) -> list[LossSet]:
    """The sets of `NAME=PATH`s, whose losses all models can be asked for.

    Args:
        specs: of the command line, or `validated_on`.
        candidates: the models.
        run: as `training_record` gives it; a set that it validated on is read as it did.
        limit: most sequences of each.
        say: told what could not be compared with a model's tokenizer.

    Raises:
        CptError: one is not there or was tokenized for another model, two have one name, or a model is an endpoint.
    """
    found = [_loss_set(spec, candidates, run, limit) for spec in specs]
    check_names([each.name for each in found])
    # OpenAI's protocol for chats gives no log probabilities of a prompt.
    if found and (remote := [each.model for each in candidates if each.is_endpoint]):
        raise CptError(
            f"{remote[0]} is an endpoint, which gives no losses: leave --loss away, or name the model's folder"
        )
    tokenized = [each.path for each in found if each.seq_length]
    for candidate in candidates if tokenized else ():
        for warning in check_data(read_base(candidate.folder), tokenized, unlike_base=[END_OF_TEXT]):
            say(warning)
    return found


def _loss_set(spec: str, candidates: Sequence[Candidate], run: Mapping[str, Any], limit: int | None) -> LossSet:
    name, equals, path = spec.partition("=")
    if not equals or not name or not path:
        raise CptError(f"a set is given as NAME=PATH, such as ja=ds/ja_validation, not {spec!r}")
    # A dataset may be named by one of its files, too.
    if Path(path).is_file() and not path.endswith((".bin", ".idx")):
        return LossSet(name, path)
    if is_conversations(path):
        raise CptError(
            f"{path} holds conversations, whose loss is of their answers alone: a run that validates on them measures "
            "it (`nemo-cpt report`). Give a set of texts, or ask the questions (--prompts)"
        )
    # A mistyped file would be looked for as a Megatron prefix, and its message mislead.
    if re.search(r"\.(jsonl|json|parquet|gz|zst)$", path):
        raise CptError(f"there is no file {path}")
    tokens = read_index(path).tokens
    validated = run.get("validated_on", {})
    same_place = str(Path(full_prefix(path)).absolute()) in validated.get("sets", {}).values()
    if same_place or (validated and content_of(path) in _contents(run).values()):  # just what the training's loss is of
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


def check_names(names: Sequence[str]) -> None:
    """Refuse two sets of one name."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise CptError(f"two sets are named {twice[0]!r}: give each NAME=... of its own")
