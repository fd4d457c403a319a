"""Conversations made from a corpus: by rules without a model, or by a model behind an endpoint."""

import hashlib
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

import nemo_cpt
from nemo_cpt.arguments import checked
from nemo_cpt.corpus.atomic_files import locked, make_folder, write_whole
from nemo_cpt.corpus.dataset.manifest import changed_input, describe_inputs
from nemo_cpt.corpus.reading.chunks import Feed, hash_file, texts_of
from nemo_cpt.corpus.reading.sources import REPLIES, SYNTHESIS, Inputs, Source, list_sources
from nemo_cpt.corpus.reading.tally import NO_SKIPPING, Tally
from nemo_cpt.corpus.splitting.duplicates import fingerprint
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.journal import Journal
from nemo_cpt.synthesis.questions import KINDS, LANGUAGES, SHORTEST, Document, Question, Rules, fill, untitled
from nemo_cpt.urls import hide_credentials

if TYPE_CHECKING:
    from nemo_cpt.synthesis.grounded import Model

SETS = ("validation", "train")  # in the order in which they are made
LOCK = ".synthesis.lock"
SPARE = 4  # documents taken for each one needed: some give no question
RULES = "rules"
LICENCES = {
    "llama": 'Llama\'s licence asks that a model trained on its outputs has "Llama" at the beginning of its name.',
    "gemma": "Gemma's terms of use also hold for models that are trained on its outputs.",
    "gpt-": "OpenAI's terms forbid to train models on outputs that compete with its own.",
    "claude": "Anthropic's terms forbid to train models on outputs that compete with its own.",
    "gemini": "Google's terms forbid to train models on outputs that compete with its own.",
}


@dataclass(frozen=True)
class SynthesisReport:
    """What `synthesize` did.

    Attributes:
        folder: Where the sets are.
        status: `written` or `unchanged`.
        questions: Questions in each set.
        kinds: Questions of each kind, in all.
        rejected: Pairs of a model that were not taken, by reason.
        generator: What made them: `name` (`rules` or the model's), and a model's `endpoint` and `licence`.
        warnings: Sentences for people.
    """

    folder: str
    status: str
    questions: dict[str, int]
    kinds: dict[str, int]
    rejected: dict[str, int]
    generator: dict[str, str]
    warnings: list[str] = field(default_factory=list)


@checked
def synthesize(
    inputs: Inputs | None,
    output: str | os.PathLike[str],
    *,
    train: int = 150,
    validation: int = 50,
    kinds: Sequence[str] = KINDS,
    slots: str | os.PathLike[str] | None = None,
    language: str | None = None,
    json_key: str = "text",
    seed: int = 0,
    endpoint: str | None = None,
    model: str | None = None,
    licence: str | None = None,
    pairs: int = 3,
    concurrency: int = 4,
    overwrite: bool = False,
    quiet: bool = False,
) -> SynthesisReport:
    """Make questions with answers, `OUTPUT/train.jsonl` and `validation.jsonl`, one `query` and `answer` a line.

    Without an endpoint, rules make them out of the texts, and templates with slots out of the user's own values. With
    one, a model writes them about passages; what is in another language, too long, copied from the passage, a refusal
    or a near duplicate is left out. No document gives questions to both sets. `synthesis.json` says what was made of
    what. A run that is interrupted begins anew when it is called again, but asks no model twice for a reply that
    `replies.jsonl` has.

    Args:
        inputs: The corpus, as `prepare` takes it; None where only templates are filled.
        output: Folder for the sets.
        train: Questions to train on.
        validation: Questions to validate on.
        kinds: Which questions rules make: `title`, `continuation`, `cloze`, `summary`; see `questions.ask`. Not with an
            endpoint, nor are slots.
        slots: A JSON file with `templates`, each a `query` and an `answer` in which `{city}` stands for a value, and
            `slots`, each one's values; see `questions.fill`.
        language: Of the questions' words, `ja`, `en` or `zh`; by default each document's own.
        json_key: The field that holds a document's text. A short first line without a full stop is its title.
        seed: Which documents, wordings and values are chosen.
        endpoint: Base address of a server that speaks OpenAI's protocol, such as `http://localhost:8000/v1`. A key is
            taken from the environment, NEMO_CPT_API_KEY or OPENAI_API_KEY.
        model: The model's name at the endpoint.
        licence: The model's licence, or the terms of its outputs; it goes into `synthesis.json`.
        pairs: Questions to ask a model for about each passage.
        concurrency: Requests at once.
        overwrite: Replace what is there.
        quiet: Show no progress.

    Raises:
        CptError: An option cannot be used, the inputs give too few questions, the endpoint fails, or the folder holds
            something else.
    """
    if endpoint:  # not before: rules need not wait for OpenAI's client
        from nemo_cpt.synthesis import grounded

    check_options(train, validation, kinds, slots, language, pairs, concurrency, endpoint, model, licence)
    wanted = {"validation": validation, "train": train}
    # With the endpoint's address, less its credentials: it is kept in the manifest.
    generator = _generator(endpoint, model, licence)
    templates, values = _read_slots(slots) if slots is not None else ([], {})
    sources = list_sources(inputs) if inputs else []
    if not sources and (endpoint or not templates):
        raise CptError("There is nothing to make questions of: give a corpus, or templates with slots (--slots).")
    options = {"sets": wanted, "generator": generator, "language": language, "json_key": json_key, "seed": seed}
    options |= {"pairs": pairs, "prompt": _digest(grounded.PROMPT)} if endpoint else {"kinds": list(kinds)}
    options |= {"slots": _digest(orjson.dumps([templates, values]))} if templates else {}
    folder = _Folder(Path(output), options)
    make_folder(folder.path)
    with locked(folder.path / LOCK, patience=0):
        if folder.is_done(sources, overwrite):
            return folder.report("unchanged")
        # Before anything is asked for: a second job with other options is refused from here on.
        folder.begin()
        per_document = pairs if endpoint else 1
        documents, hashes = _sample(sources, json_key, SPARE * math.ceil((train + validation) / per_document), seed)
        maker: Model | Rules
        if endpoint:
            server = closing(grounded.open_endpoint(endpoint, str(model), concurrency))
            shown = _Shown(train + validation, quiet)
            with server as engine, Journal(folder.path / REPLIES) as replies:
                maker = grounded.Model(engine, replies, language, pairs, seed, shown)
                sets = _make_sets(maker, documents, wanted)
        else:
            filled = fill(templates, values, train + validation, random.Random(seed))
            maker = Rules(kinds if sources else (), filled, language, seed)
            sets = _make_sets(maker, documents, wanted)
        folder.finish(sets, maker.rejected, describe_inputs(sources, hashes))
    return folder.report("written")


def check_options(
    train: int,
    validation: int,
    kinds: Sequence[str],
    slots: str | os.PathLike[str] | None,
    language: str | None,
    pairs: int,
    concurrency: int,
    endpoint: str | None,
    model: str | None,
    licence: str | None,
) -> None:
    """Check the options of `synthesize` that need no input.

    Raises:
        CptError: One is unusable, or does not belong to the others.
    """
    if min(train, validation) < 0 or not (train or validation):
        raise CptError(
            f"validation is {validation} and train is {train}: these are numbers of questions, not all of them 0."
        )
    if pairs < 1 or concurrency < 1:
        raise CptError(f"pairs is {pairs} and concurrency {concurrency}; both must be positive.")
    if language not in (None, *LANGUAGES):
        raise CptError(f"language is {language!r}; it can be {', '.join(LANGUAGES)}.")
    if not kinds or not set(kinds) <= set(KINDS):
        raise CptError(f"kinds are {', '.join(kinds) or 'none'}; they can be {', '.join(KINDS)}.")
    if endpoint and (slots is not None or set(kinds) != set(KINDS)):
        raise CptError(
            f"{'slots' if slots is not None else 'kinds'} are for questions that rules make, and with an endpoint a "
            "model makes all of them: make two sets, each in a folder of its own."
        )
    _generator(endpoint, model, licence)


def _generator(endpoint: str | None, model: str | None, licence: str | None) -> dict[str, str]:
    if endpoint is None:
        if model or licence:
            raise CptError("A model or a licence is named, but no endpoint to ask: name it too (--endpoint).")
        return {"name": RULES}
    if not model or not licence:
        raise CptError(
            "An endpoint needs the model's name (--model) and the licence of its outputs (--licence), by which whoever "
            f"trains on them is bound; it goes into {SYNTHESIS}."
        )
    return {"name": model, "endpoint": hide_credentials(endpoint), "licence": licence}


def _licence_warning(model: str) -> str:
    """Return what the terms of a known family of models ask of whoever trains on its outputs."""
    return next((text for name, text in LICENCES.items() if name in model.lower()), "")


def _read_slots(path: str | os.PathLike[str]) -> tuple[list[Any], dict[str, Any]]:
    example = '{"templates": [{"query": "Where is {city}?", "answer": "In Japan."}], "slots": {"city": ["Kyoto"]}}'
    try:
        content = orjson.loads(Path(path).read_bytes())
        templates, values = content["templates"], content["slots"]
    except OSError as error:
        raise CptError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CptError(f"{path} is not like {example}: {error!r}.") from error
    lists = isinstance(values, dict) and all(isinstance(value, list) and value for value in values.values())
    if not isinstance(templates, list) or not templates or not lists:
        raise CptError(f"{path} is not like {example}: templates are a list, and each slot has a list of values.")
    return templates, values


def _digest(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def _sample(sources: list[Source], json_key: str, count: int, seed: int) -> tuple[list[Document], dict[str, str]]:
    """Choose documents at random, each as likely as any other, in one pass over the inputs.

    Returns:
        The documents in a random order, of equal ones the first, and the inputs' hashes.
    """
    chance, chosen, hashes, seen, number = random.Random(seed), list[Document](), {}, 0, 0
    tally = Tally()
    for task in Feed(sources, json_key, 2 << 20):
        found = texts_of(task, json_key)
        tally.add(task, found.reading, sources[task.source], NO_SKIPPING)
        for text in found.texts:
            document, number = untitled(text, number), number + 1
            if len(document.text) < SHORTEST:
                continue
            # Reservoir sampling (Vitter's R): each document is as likely, and their number need not be known.
            place, seen = chance.randrange(seen + 1), seen + 1
            if len(chosen) < count:
                chosen.append(document)
            elif place < count:
                chosen[place] = document
        if task.last:
            hashes[str(task.source)] = task.hash
    # The reservoir keeps early documents in early places.
    chance.shuffle(chosen)
    # A copy of a document would give questions to the set that the other one is held out from.
    different = dict[int, Document]()
    for document in chosen:
        different.setdefault(fingerprint(document.text), document)
    return list(different.values()), hashes


def _make_sets(
    maker: "Rules | Model", documents: list[Document], wanted: Mapping[str, int]
) -> dict[str, list[Question]]:
    """Make the sets of questions, each about its own share of the documents."""
    # Rounded up: a small validation set must not be left without a document.
    held = math.ceil(len(documents) * wanted["validation"] / sum(wanted.values()))
    # By document, so that no text gives questions to both sets.
    parts = {"validation": documents[:held], "train": documents[held:]}
    sets = {name: maker.make(parts[name], wanted[name]) for name in SETS}
    for name, questions in sets.items():
        if len(questions) < wanted[name]:
            source = f"{len(parts[name])} documents" if documents else "the slots' values"
            rejected = ", ".join(f"{count} {reason}" for reason, count in maker.rejected.items())
            raise CptError(
                f"There are only {len(questions)} of the {wanted[name]} questions for {name}, out of {source}"
                f"{f' (left out: {rejected})' if rejected else ''}. Ask for fewer ({name}=..., --{name}), or give more "
                "texts, kinds or values."
            )
    return sets


class _Shown:
    """Prints how many questions a model has given, every few seconds."""

    def __init__(self, wanted: int, quiet: bool, interval: float = 10.0) -> None:
        self._wanted, self._quiet, self._interval, self._last = wanted, quiet, interval, time.monotonic()

    def __call__(self, found: int) -> None:
        now = time.monotonic()
        if not self._quiet and now - self._last > self._interval:
            self._last = now
            print(f"synthesize: {found:,} of {self._wanted:,} questions", file=sys.stderr, flush=True)


class _Folder:
    """The sets of one job. The manifest stands there from the beginning, unfinished, and says whose they are."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path, self._options = path, options
        self._manifest = path / SYNTHESIS

    def is_done(self, sources: list[Source], overwrite: bool) -> bool:
        """Say whether the sets of this very job are there.

        Raises:
            CptError: Something else has their names, and may not be replaced.
        """
        if overwrite:
            return False
        if not self._manifest.exists():
            if foreign := [name for name in SETS if self._file(name).exists()]:
                raise CptError(self._refusal(f"{self._file(foreign[0])} is not of its making"))
            return False
        manifest = self._read()
        made = [path for path in (self.path / REPLIES, *map(self._file, SETS)) if path.exists()]
        # A job that failed ahead of its first question, such as at a misspelt field: there is nothing to keep.
        if not manifest["finished"] and not made:
            return False
        if differ := [key for key, value in self._options.items() if manifest["options"].get(key) != value]:
            raise CptError(self._refusal(f"what is there was made with another {', '.join(differ)}"))
        # The same job's, interrupted: it begins anew, with the replies that are there.
        if not manifest["finished"]:
            return False
        if (change := changed_input(sources, manifest["inputs"])) is not None:
            raise CptError(self._refusal(change))
        # A set that somebody edited is theirs by now.
        for name, was in manifest["files"].items():
            if self._file(name).exists() and hash_file(str(self._file(name))) != was:
                raise CptError(self._refusal(f"{self._file(name)} was changed since"))
        return all(self._file(name).exists() for name in SETS)

    def _refusal(self, reason: str) -> str:
        return (
            f"{self.path} cannot be written: {reason}. Take another folder, or replace it with overwrite=True "
            "(--overwrite)."
        )

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.jsonl"

    def _read(self) -> dict[str, Any]:
        try:
            manifest = orjson.loads(self._manifest.read_bytes())
            manifest["options"], manifest["finished"]
        except (ValueError, KeyError, TypeError) as error:
            raise CptError(self._refusal(f"{self._manifest} is not of its making")) from error
        return manifest

    def _write(self, **values: Any) -> None:
        content = {"made_by": f"nemo_cpt {nemo_cpt.__version__}", "options": self._options} | values
        write_whole(self._manifest, orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")

    def begin(self) -> None:
        """Claim the folder."""
        self._write(finished=False)

    def finish(
        self, sets: Mapping[str, Sequence[Question]], rejected: Mapping[str, int], inputs: list[dict[str, Any]]
    ) -> None:
        """Write the sets, and then what says that they are whole."""
        # Before the manifest's last version, which vouches for them.
        for name, questions in sets.items():
            write_whole(self._file(name), b"".join(orjson.dumps(asdict(question)) + b"\n" for question in questions))
        self._write(
            finished=True,
            questions={name: len(sets[name]) for name in SETS},
            kinds=Counter(question.kind for questions in sets.values() for question in questions),
            rejected=rejected,
            inputs=inputs,
            files={name: hash_file(str(self._file(name))) for name in SETS},
        )

    def report(self, status: str) -> SynthesisReport:
        """Return what the manifest says."""
        manifest = self._read()
        generator = manifest["options"]["generator"]
        terms = _licence_warning(generator["name"])
        return SynthesisReport(
            folder=str(self.path),
            status=status,
            generator=generator,
            warnings=[f"{terms} See that its licence, {generator['licence']}, allows this use."] if terms else [],
            **{name: manifest[name] for name in ("questions", "kinds", "rejected")},
        )
