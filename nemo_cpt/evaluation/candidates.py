"""The models that an evaluation measures, and what can be known of them without loading them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_cpt.checkpoint.architecture import context_length, read_json
from nemo_cpt.checkpoint.rope import in_older_spelling
from nemo_cpt.corpus.reading.chunks import hash_file
from nemo_cpt.errors import CptError, near_paths
from nemo_cpt.evaluation.journal import Journal, key_of
from nemo_cpt.inference import Engine, open_engine
from nemo_cpt.inference.arithmetic import Arithmetic, arithmetic_of
from nemo_cpt.inference.asked_as import end_ids, has_chat_template, reply_warnings
from nemo_cpt.inference.models import Found, check_model, find_model, takes_base
from nemo_cpt.made import RECORD
from nemo_cpt.training.run_folder import checkpoints
from nemo_cpt.urls import is_address

Say = Callable[[str], None]


@dataclass
class Candidate:
    """A model that is measured.

    Attributes:
        label: its name in the report.
        model: as the user gave it; an endpoint that serves several models as ADDRESS#MODEL.
        step: of the checkpoint that it is; None where that does not matter.
    """

    label: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    say: Say = lambda line: None
    _engine: Engine | None = None

    @property
    def is_endpoint(self) -> bool:
        """Whether it is asked over HTTP."""
        return is_address(self.model)

    @cached_property
    def found(self) -> Found:
        """Its Hugging Face folder; a NeMo checkpoint is exported into the cache first."""
        base = self.options.get("base") if takes_base(self.model) else None
        return find_model(self.model, base=base, say=self.say)

    @property
    def folder(self) -> Path:
        """See `found`."""
        return self.found.folder

    @property
    def name(self) -> str:
        """What was measured: of a run also which step, because it may have gone on when somebody reads that."""
        return self.model if self.is_endpoint else self.found.name

    @cached_property
    def key(self) -> str:
        """What tells it from other models: its content, or the address and name of an endpoint."""
        if self.is_endpoint:
            return self.engine.name
        # Every byte: a training of a few rows or layers leaves most of them as they were.
        files = (path for path in sorted(self.folder.iterdir()) if path.is_file() and path.name != RECORD)
        return key_of([(path.name, hash_file(str(path))) for path in files])

    @cached_property
    def arithmetic(self) -> Arithmetic | None:
        """In what it computes; None for an endpoint, which does not tell."""
        return None if self.is_endpoint else arithmetic_of(self.folder, self.options.get("device"))

    @property
    def identity(self) -> str:
        """What tells its answers from others': its key, and in what it computes."""
        return f"{self.key}, {self.arithmetic}" if self.arithmetic else self.key

    @property
    def engine(self) -> Engine:
        """The engine, opened when it is first needed."""
        if self._engine is None:
            self.say(f"opening {self.label}: {self.model}")
            if self.is_endpoint:
                address, _, served_as = self.model.partition("#")
                key = self.options.get("api_key")
                self._engine = open_engine(address, served_as=served_as or None, api_key=key)
            else:
                device = self.options.get("device")
                self._engine = open_engine(self.folder, **({"device": device} if device else {}))
        return self._engine

    def close(self) -> None:
        """Let go of the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @cached_property
    def context_length(self) -> int | None:
        """Tokens of its context; None for an endpoint."""
        return None if self.is_endpoint else context_length(self.folder)

    @cached_property
    def rope(self) -> dict[str, Any]:
        """What transformers 4 has to be told of its rotary embedding, which transformers 5 wrote; else nothing."""
        path = self.folder / "config.json"
        spelled = None if self.is_endpoint else in_older_spelling(read_json(path), str(path))
        return {name: spelled[name] for name in ("rope_theta", "rope_scaling")} if spelled else {}

    @cached_property
    def has_chat_template(self) -> bool:
        """Whether it can be given messages; an endpoint is believed to."""
        return self.is_endpoint or has_chat_template(self.folder)

    @cached_property
    def ends(self) -> list[int] | None:
        """The ids that end its replies, by generation_config.json, else config.json; None for an endpoint."""
        return None if self.is_endpoint else end_ids(self.folder)


def _check_run(run: Path) -> None:
    if not run.exists():
        raise CptError(f"there is no run {run}{near_paths(run) or '; `nemo-cpt ls` lists runs'}")
    if not (run / "checkpoints").is_dir():
        raise CptError(
            f"{run} is no run's folder: it has no folder checkpoints, all of which --checkpoints measures. One model "
            "is named without it"
        )


def find_candidates(
    model: str | Path | None, against: str | Path | None, run: str | Path | None, options: Mapping[str, Any], say: Say
) -> list[Candidate]:
    """The models in order: the one compared with first, the one that matters last.

    Raises:
        CptError: one of them is not there; nothing is loaded yet.
    """
    if (model is None) == (run is None):
        raise CptError("name either a model to evaluate, or a run whose checkpoints are (--checkpoints RUN)")
    for each in (model, against):  # both, before one is exported
        if each is not None:
            check_model(each)
    # Step 0: in a series over a run's checkpoints it is what the training began with.
    before = [Candidate("before", str(against), options, 0, say)] if against is not None else []
    if run is None:
        return [*before, Candidate("after", str(model), options, None, say)]
    _check_run(Path(run))
    whole = [each for each in reversed(checkpoints(Path(run, "checkpoints"))) if each.fault is None]
    by_step = {each.step: each for each in whole}  # the last checkpoint of a run and the best may be one step's
    if not by_step:
        raise CptError(f"{run} has no whole checkpoint: there is nothing to evaluate")
    return before + [Candidate(f"step {step}", str(each.path), options, step, say) for step, each in by_step.items()]


@dataclass
class Kept:
    """What a journal has of a model: what it computed itself under its arithmetic too, which changes every number."""

    candidate: Candidate
    journal: Journal
    _questions: dict[str, str] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    def key(self, *asked: Any) -> str:
        """The key of what was asked; says where the journal has it computed otherwise alone."""
        question, arithmetic = key_of(*asked), self.candidate.arithmetic
        if arithmetic is None:
            if self.get(question) is not None:
                self._say(
                    f"{self.candidate.label}: {self.candidate.name} is known by its name and address alone, and what "
                    "the journal has of it is taken; if another model answers there now, take another --output"
                )
            return question
        key = key_of(*asked, arithmetic)
        self._questions[key] = question
        if self.get(key) is None:
            self._tell(question, arithmetic)
        return key

    def get(self, key: str) -> dict[str, Any] | None:
        """As the journal's."""
        return self.journal.get(key)

    def keep(self, key: str, record: Mapping[str, Any]) -> None:
        """As the journal's, of a key that this gave."""
        own = {"model": self.candidate.label, **record}
        if self.candidate.arithmetic is not None:
            own |= {"asked": self._questions[key], "computed": str(self.candidate.arithmetic)}
        self.journal.keep(key, own)

    def _tell(self, question: str, arithmetic: Arithmetic) -> None:
        """Say, once, in what the journal has a question's answer."""
        # Older versions kept it under the question alone.
        unknown = [""] if self.journal.get(question) is not None else []
        for other in [*(each["computed"] for each in self.journal.asked(question)), *unknown]:
            label, device = self.candidate.label, other.rpartition(" ")[2]
            known = f"{label} was measured in {other}" if other else (
                f"an earlier version measured {label}, and did not keep in which precision"
            )  # fmt: skip
            takes = f" (--device {device} takes what is there)" if device not in ("", arithmetic.device) else ""
            self._say(f"{known}: it is measured again, in {arithmetic}{takes}")

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.candidate.say(line)


def first_and_last(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The two that are compared, or the only one."""
    return [candidates[0], candidates[-1]] if len(candidates) > 1 else [candidates[0]]


def described(candidate: Candidate) -> dict[str, Any]:
    """What a report says of a model."""
    return {
        "label": candidate.label,
        "model": candidate.name,
        "folder": None if candidate.is_endpoint else str(candidate.folder),
        "device": candidate.arithmetic and candidate.arithmetic.device,
        "precision": candidate.arithmetic and candidate.arithmetic.precision,
        "key": candidate.key,
        "step": candidate.step,
        "chat_template": candidate.has_chat_template,
        "end_tokens": candidate.ends,
        "context_length": candidate.context_length,
    }


def warnings_of(candidates: Sequence[Candidate]) -> list[str]:
    """What lets the first and the last model's replies go wrong, or makes them differ beside their weights."""
    first, last = candidates[0], candidates[-1]
    found = [
        warning
        for each in first_and_last(candidates)
        if not each.is_endpoint
        for warning in reply_warnings(each.folder)
    ]
    if first.has_chat_template != last.has_chat_template:
        with_it, without = (first, last) if first.has_chat_template else (last, first)
        found.append(f"{without.name} has no chat template, {with_it.name} has one")
    # None is an endpoint's, which does not tell.
    if first.ends != last.ends and None not in (first.ends, last.ends):
        found.append(f"replies of {first.name} end with the ids {first.ends}, those of {last.name} with {last.ends}")
    computed = {each.name: each.arithmetic for each in candidates if each.arithmetic}
    if len(set(computed.values())) > 1:
        listed = ", ".join(f"{name} in {arithmetic}" for name, arithmetic in computed.items())
        found.append(f"the models are computed in other precisions ({listed}): that may be all of a small difference")
    if first.key == last.key and first is not last:
        found.append(f"{first.name} and {last.name} hold the same bytes: there is no difference to find")
    return found
