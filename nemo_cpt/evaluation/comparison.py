"""What a training changed: models measured on the same texts and prompts, one beside the other, with intervals.

An evaluation finds the models (`Candidate`) and the sets (`LossSet`, `PromptSet`), measures each model (`_Work`,
through a journal, so that nothing is done twice, nor loaded for nothing), and compares the first with the last.
"""

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from nemo_cpt.arguments import checked
from nemo_cpt.conversations.templates import check_there
from nemo_cpt.corpus.dataset.index import fingerprint
from nemo_cpt.corpus.progress import ProgressBar
from nemo_cpt.corpus.reading.sources import list_sources
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation import benchmarks
from nemo_cpt.evaluation.bootstrap import Measure, Row, compare, mean, ratio
from nemo_cpt.evaluation.candidates import Candidate, Kept, Say, described, find_candidates, first_and_last, warnings_of
from nemo_cpt.evaluation.journal import Journal, key_of
from nemo_cpt.evaluation.language import UNDECIDED, WRAPPERS, judge_language, language_share, wrap
from nemo_cpt.evaluation.loss_sets import (
    LossSet,
    check_names,
    find_loss_sets,
    left_out,
    mask_warnings,
    training_record,
    validated_on,
)
from nemo_cpt.evaluation.questions import SHIPPED
from nemo_cpt.evaluation.reading import Asked, PromptSet, check_language, prompt_set, read_documents
from nemo_cpt.inference import Prompt, Reply, Sampling
from nemo_cpt.inference.models import takes_base
from nemo_cpt.installed import installed_versions
from nemo_cpt.records import restored
from nemo_cpt.urls import hide_credentials

if TYPE_CHECKING:
    from nemo_cpt.evaluation.bits_per_byte import TextLoss
    from nemo_cpt.evaluation.judge_questions import JudgeQuestion
    from nemo_cpt.evaluation.judge_report import JudgeReport

FORMAT = 1  # of the journal's records; another one starts afresh
JOURNAL = "journal.jsonl"
WINDOW = 2048  # tokens, or the shortest context of the models: all are given the same windows
MOST_ASKED = 4096  # prompts given to an engine at once, which sorts them by length
PACKAGES = ("torch", "transformers", "tokenizers", "sacrebleu", "lingua-language-detector", "lm_eval", "numpy")


@dataclass
class Measured:
    """What one model gave: the loss on each set; the replies to each set's prompts, by the wrapper."""

    losses: dict[str, "TextLoss"] = field(default_factory=dict)
    replies: dict[tuple[str, str], list[Reply]] = field(default_factory=dict)


@dataclass
class Report:
    """All that an evaluation found; `report.py` shows it.

    Attributes:
        title: the model, and what it is compared with.
        models: of each model its label, what it is, its content's key, chat template and end tokens.
        rows: the table, of the first model against the last.
        series: for more than two models, a measure's value for each: group, measure, steps, values.
        sets: of each set its name, path, hash, size and how it was read.
        replies: of each prompt the prompt, the answers and each model's reply with its language.
        warnings: what a reader must know.
        settings: everything that decides the numbers.
        versions: of this library and of what computed them.
        judged: what the judge said; None without one.
    """

    title: str
    models: list[dict[str, Any]]
    rows: list[Row]
    series: list[dict[str, Any]]
    sets: list[dict[str, Any]]
    replies: list[dict[str, Any]]
    warnings: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]
    judged: dict[str, Any] | None = None


@checked
def evaluate(
    model: str | Path | None,
    output: str | Path,
    *,
    against: str | Path | None = None,
    checkpoints_of: str | Path | None = None,
    losses: Sequence[str] = (),
    template: str | None = None,
    prompts: Sequence[str] = (),
    tasks: Sequence[str] = (),
    judge: str | None = None,
    judge_key: str | None = None,
    wrappers: Sequence[str] = (),
    language: str | None = None,
    max_tokens: int = 256,
    limit: int | None = None,
    seed: int = 0,
    base: str | Path | None = None,
    device: str | None = None,
    api_key: str | None = None,
    say: Say = lambda line: None,
    quiet: bool = False,
) -> Report:
    """Measure a model, and what changed against another, or over the checkpoints of a run.

    Without `losses`, `prompts`, `tasks` and `judge`, bits per byte of the sets that the run validated on, and the
    questions that ship in their languages. Replies are greedy. A killed evaluation goes on where it was when it is run
    again with the same output.

    Args:
        model: a Hugging Face folder, a NeMo checkpoint, a run's folder, or an endpoint's address.
        output: folder of the journal and the report.
        against: the model to compare with, of the same forms.
        checkpoints_of: a run's folder, all of whose whole checkpoints are measured.
        losses: `NAME=PATH` of texts, each a Megatron prefix or a file of documents; or of conversations, of which the
            answers count: what `prepare` made of them, or a file of them.
        template: that a file's conversations are given, as in `prepare`; the model's own when None.
        prompts: `[NAME=]FILE` or names of shipped sets; see `reading.prompt_set`.
        tasks: lm-evaluation-harness' tasks or presets; see `benchmarks`.
        judge: the address of a judge that scores answers to the shipped questions in eight categories.
        judge_key: the judge's; `api_key` when None.
        wrappers: how texts are asked, of "none", "system" and "chat"; "chat" where every model has a template, else
            "none".
        language: that replies should be in where the prompts do not say.
        max_tokens: the most of a reply.
        limit: prompts, documents, sequences and samples of a task to stop after, of each set.
        seed: of the bootstrap.
        base: the base of LoRA checkpoints whose own record of it does not hold any more.
        device: of models in this process.
        api_key: an endpoint's.
        say: called with a line about what takes time or was chosen.
        quiet: show no progress.

    Raises:
        CptError: something cannot be found, read, or asked for; what was measured before is kept.
    """
    check_options(template, tasks, wrappers, language, max_tokens, limit, seed)
    found_tasks = benchmarks.find_tasks(tasks) if tasks else []
    options = {"base": base, "device": device, "api_key": api_key}
    # From here to the journal everything is looked at that can be refused: no model is loaded yet.
    candidates = find_candidates(model, against, checkpoints_of, options, say)
    # Where nothing is named, what the run validated on and the shipped questions are meant.
    everything = not (losses or prompts or tasks or judge)
    asks = bool(prompts) or everything
    _refuse_unused(
        {
            "wrapper": (wrappers, asks),
            "language": (language, asks or judge),
            "judge_key": (judge_key, judge),
            "base": (base, any(takes_base(each.model) for each in candidates)),
            "device": (device, any(not each.is_endpoint for each in candidates)),
            "api_key": (api_key, judge or any(each.is_endpoint for each in candidates)),
        }
    )
    trained = checkpoints_of or model
    run = training_record(trained)
    own = validated_on(run, trained, say) if everything else []
    with TemporaryDirectory(prefix="nemo_cpt-conversations-") as scratch:
        texts = find_loss_sets(losses or own, candidates, run, limit, say, template=template, scratch=scratch)
        _refuse_unused({"template": (template, any(each.template for each in texts))})
        sets = [
            _limited(prompt_set(each, language), limit) for each in prompts or (_shipped(texts) if everything else [])
        ]
        check_names([each.name for each in sets])
        # One way for all models: replies to prompts in other words could not be compared.
        wrappers = wrappers or (["chat"] if all(each.has_chat_template for each in candidates) else ["none"])
        _check_conversations(candidates, sets, wrappers)
        questions = _judge_questions(judge, candidates, language or "ja", limit, say) if judge else []
        # The same for all models: with more context a loss is lower, whatever was learned.
        window = min([WINDOW, *(each.context_length for each in candidates if each.context_length)])
        sampling = Sampling(max_tokens=max_tokens)
        output = Path(output)
        with Journal(output / JOURNAL) as journal:
            found = []
            for candidate in candidates:
                work = _Work(candidate, Kept(candidate, journal), sampling, window, limit, quiet)
                found.append(work.measure(texts, sets, wrappers))
                # One model in memory at a time.
                candidate.close()
            rows = list(_rows(found, sets, seed))
            if found_tasks:
                rows += benchmarks.rows(candidates, found_tasks, output, journal, limit=limit, say=say)
    judged = None
    if judge:
        judged = _judged(judge, questions, candidates, output, judge_key or api_key, say)
        rows.append(_judge_row(judged, seed))
    return Report(
        title=" against ".join(each.name for each in reversed(first_and_last(candidates))),
        models=[described(each) for each in candidates],
        rows=rows,
        series=_series(candidates, found, sets) if len(candidates) > 2 else [],
        sets=_described_sets(texts, sets, found[-1]),
        replies=list(_shown_replies(candidates, found, sets, wrappers)),
        warnings=[*warnings_of(candidates), *mask_warnings(candidates, texts), *left_out(texts)],
        settings={
            "seed": seed,
            "sampling": asdict(sampling),
            "wrappers": list(wrappers),
            "window": window,
            "limit": limit,
            "tasks": list(tasks),
        },
        versions=installed_versions(PACKAGES) | {"python": platform.python_version()},
        judged=judged.as_dict() if judged else None,
    )


def check_options(
    template: str | None,
    tasks: Sequence[str],
    wrappers: Sequence[str],
    language: str | None,
    max_tokens: int,
    limit: int | None,
    seed: int,
) -> None:
    """Check the options of `evaluate` that need neither a model nor a file.

    Raises:
        CptError: one is unusable.
    """
    if template is not None:
        check_there(template)
    benchmarks.read_tasks(tasks)
    if unknown := [each for each in wrappers if each not in WRAPPERS]:
        raise CptError(f"there is no wrapper {unknown[0]!r}; there are {', '.join(WRAPPERS)}")
    check_language(language)
    if max_tokens < 1 or (limit is not None and limit < 1):
        raise CptError(f"max_tokens {max_tokens} and limit {limit} have to be 1 or more")
    if seed < 0:
        raise CptError(f"seed is {seed}; it has to be 0 or more")


def _refuse_unused(settings: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse a setting, by name its value and whether anything uses it, that would be passed over."""
    for name, (value, used) in settings.items():
        if value and not used:
            raise CptError(f"{name} is set, and nothing that is to be evaluated uses it: leave it away")


def _shipped(texts: Sequence[LossSet]) -> list[str]:
    """The shipped sets in the languages that the losses' sets are named for; Japanese where there is none."""
    return [each.name for each in texts if each.name in SHIPPED] or ["ja"]


def _limited(prompts: PromptSet, limit: int | None) -> PromptSet:
    return PromptSet(prompts.name, prompts.prompts[:limit])


def _check_conversations(candidates: list[Candidate], sets: Sequence[PromptSet], wrappers: Sequence[str]) -> None:
    """Refuse, before anything is loaded, what could not be asked."""
    without = [each.model for each in candidates if not each.has_chat_template]
    for each in sets:
        if without and any(not isinstance(asked.prompt, str) for asked in each.prompts):
            raise CptError(
                f"{each.name} has messages, and {without[0]} has no chat template: give prompts as text, or the model "
                "a template (chat_template.jinja)"
            )
        if without and "chat" in wrappers:
            raise CptError(f"{without[0]} has no chat template: ask it with --wrapper none, or give it a template")
        if "system" in wrappers and any(asked.language is None for asked in each.prompts):
            raise CptError(f"{each.name} does not say its language, in which a system prompt is to be: add --language")


@dataclass
class _Work:
    """The measuring of one model, through the journal."""

    candidate: Candidate
    kept: Kept
    sampling: Sampling
    window: int
    limit: int | None
    quiet: bool

    def measure(self, texts: Sequence[LossSet], sets: Sequence[PromptSet], wrappers: Sequence[str]) -> Measured:
        """Everything that the journal does not have yet, and what it has."""
        found = Measured()
        for text in texts:
            found.losses[text.name] = self._loss(text)
        for prompts in sets:
            for wrapper in wrappers:
                found.replies[prompts.name, wrapper] = self._replies(prompts, wrapper)
        return found

    def _loss(self, text: LossSet) -> "TextLoss":
        from nemo_cpt.evaluation.bits_per_byte import TextLoss

        # All that the number depends on is in the key: what was measured otherwise is measured again.
        key = self.kept.key("loss", FORMAT, self.candidate.key, text.hash, self._read_as(text))
        record = self.kept.get(key)
        if record is None:
            record = asdict(self._measured_loss(text))
            self.kept.keep(key, {"set": text.name, "loss": record})
            return TextLoss(**record)
        return restored(TextLoss, record["loss"])

    def _read_as(self, text: LossSet) -> tuple[Any, ...]:
        if text.unit == "document":
            # The file's kind too: under another name the same bytes may be other documents than lines of JSON.
            kind = list_sources(text.path)[0].kind
            return (self.window, self.limit) if kind == "plain" else (self.window, self.limit, kind)
        if text.unit == "sequence":
            return text.seq_length, text.samples, text.seed, *text.masks
        # The tokens too: those of a file may be another model's in the evaluation.
        tokens = fingerprint(self._prefix(text))
        return text.seq_length, text.samples, text.too_long, self.limit, tokens

    def _prefix(self, text: LossSet) -> str:
        return text.prefixes.get(self.candidate.label, text.path)

    def _measured_loss(self, text: LossSet) -> "TextLoss":
        from nemo_cpt.evaluation.bits_per_byte import conversations_loss, documents_loss, sequences_loss

        engine: Any = self.candidate.engine
        title = f"{self.candidate.label}, loss on {text.name}"
        total = (text.samples if text.unit == "sequence" else self.limit) or 0
        with ProgressBar(title, total, self.quiet, unit=f"{text.unit}s") as bar:
            if text.seq_length is None:
                return documents_loss(
                    engine, islice(read_documents(text.path), self.limit), window=self.window, tell=bar.update
                )
            if text.too_long is None:
                return sequences_loss(
                    engine, text.path, seq_length=text.seq_length, samples=text.samples, seed=text.seed,
                    tell=bar.update, **dict.fromkeys(text.masks, True),
                )  # fmt: skip
            return conversations_loss(
                engine, self._prefix(text), seq_length=text.seq_length, too_long=text.too_long,
                sequences=text.samples, limit=self.limit, tell=bar.update,
            )  # fmt: skip

    def _replies(self, prompts: PromptSet, wrapper: str) -> list[Reply]:
        asked = [_wrapped(each, wrapper, self.candidate.has_chat_template) for each in prompts.prompts]
        keys = [self.kept.key("reply", FORMAT, self.candidate.key, each, self.sampling) for each in asked]
        # By key: a prompt that stands in two sets is asked once.
        missing = {key: prompt for key, prompt in zip(keys, asked, strict=True) if self.kept.get(key) is None}
        if missing:
            self._ask(missing, f"{self.candidate.label}, replies to {prompts.name} ({wrapper})")
        return [_reply(self.kept.get(key)) for key in keys]

    def _ask(self, missing: Mapping[str, Prompt], title: str) -> None:
        waiting, done = list(missing.items()), 0
        with ProgressBar(title, len(waiting), self.quiet, unit="replies") as bar:
            bar.update(0)
            for start in range(0, len(waiting), MOST_ASKED):
                part = waiting[start : start + MOST_ASKED]
                for index, reply in self.candidate.engine.generate([prompt for _, prompt in part], self.sampling):
                    key, prompt = part[index]
                    record = {name: value for name, value in asdict(reply).items() if name != "logprobs"}
                    self.kept.keep(key, {"prompt": prompt, "reply": record})
                    bar.update(done := done + 1)


def _wrapped(asked: Asked, wrapper: str, chat_template: bool) -> Prompt:
    if not isinstance(asked.prompt, str):
        return list(asked.prompt)
    return wrap(asked.prompt, wrapper, asked.language or "en", chat_template=chat_template)


def _reply(record: Any) -> Reply:
    return restored(Reply, record["reply"])


def _rows(found: Sequence[Measured], sets: Sequence[PromptSet], seed: int) -> Iterator[Row]:
    """The table: the first model against the last, or the only one alone."""
    alike = _tokenized_alike(found)
    # Paired by place: both models were given the same sets in the same order.
    before = [measure for _, measure in _measures(found[0], sets, alike)] if len(found) > 1 else None
    for number, (group, after) in enumerate(_measures(found[-1], sets, alike)):
        yield compare(group, before[number] if before else None, after, seed)


def _tokenized_alike(found: Sequence[Measured]) -> set[str]:
    """The sets of which every document, or sequence, has as many tokens for all models."""
    tokens = {name: [list(each.losses[name].tokens) for each in found] for name in found[0].losses}
    return {name for name, (first, *others) in tokens.items() if all(each == first for each in others)}


def _measures(found: Measured, sets: Sequence[PromptSet], alike: set[str]) -> Iterator[tuple[str, Measure]]:
    """Every measure of a model with the name of its group, in the table's order; see `_tokenized_alike`."""
    for name, loss in found.losses.items():
        for measure in loss_measures(loss, comparable=name in alike):
            yield name, measure
    by_name = {each.name: each for each in sets}
    for (name, wrapper), replies in found.replies.items():
        for measure in prompt_measures(by_name[name].prompts, replies):
            yield f"{name} ({wrapper})", measure


def loss_measures(loss: "TextLoss", comparable: bool = True) -> Iterator[Measure]:
    """Bits per byte, loss and perplexity, by unit.

    Args:
        loss: of a model on a set.
        comparable: with the other model's by the token. Where a tokenizer has grown, a token holds more text: its loss
            is higher also where the model is better.
    """
    bits = [nats / math.log(2) for nats in loss.nats]
    yield ratio("bits per byte", bits, loss.bytes, better="lower", note=f"first token: {loss.first_token}")
    better: Literal["lower"] | None = "lower" if comparable else None
    note = "" if comparable else "the models cut the text into other tokens: compare bits per byte"
    nats = ratio("loss", loss.nats, loss.tokens, better=better, unit="nats per token", note=note)
    yield nats

    def perplexity(chosen: Any) -> float:
        # e to 700 is still a float; a model that is worse has no number worth printing.
        return math.exp(min(nats.value(chosen), 700))

    yield replace(nats, name="perplexity", unit="of a token", value=perplexity)


def prompt_measures(prompts: Sequence[Asked], replies: Sequence[Reply]) -> Iterator[Measure]:
    """The share in the language asked in, the scores against answers, and what replies are by themselves."""
    from nemo_cpt.evaluation.metrics import answer_measures, reply_measures

    for language in dict.fromkeys(each.language for each in prompts if each.language):
        texts = [reply.text for each, reply in zip(prompts, replies, strict=True) if each.language == language]
        yield language_measure(texts, language)
    answered = [(each, reply.text) for each, reply in zip(prompts, replies, strict=True) if each.answers]
    if answered:
        answers = [each.answers for each, _ in answered]
        yield from answer_measures([text for _, text in answered], answers, answered[0][0].language)
    yield from reply_measures(replies)


def language_measure(texts: Sequence[str], language: str) -> Measure:
    """The share of replies in a language, of those whose language can be told."""
    verdicts = [judge_language(text, language).language for text in texts]
    hits = [100 * (verdict == language) for verdict in verdicts]
    judged = [verdict != UNDECIDED for verdict in verdicts]
    note = language_share(texts, language).summary
    return ratio(f"replies in {language}", hits, judged, better="higher", unit="%", note=note)


def _series(
    candidates: Sequence[Candidate], found: Sequence[Measured], sets: Sequence[PromptSet]
) -> list[dict[str, Any]]:
    alike = _tokenized_alike(found)
    columns = [dict(((group, each.name), each) for group, each in _measures(one, sets, alike)) for one in found]
    steps = [each.step for each in candidates]
    return [
        {
            "group": group,
            "measure": f"{measure.name}, {measure.unit}" if measure.unit else measure.name,
            "better": measure.better,
            "steps": steps,
            "values": [column[group, name].whole for column in columns],
        }
        for (group, name), measure in columns[-1].items()
    ]


def _described_sets(texts: Sequence[LossSet], sets: Sequence[PromptSet], found: Measured) -> list[dict[str, Any]]:
    losses = [
        {name: value for name, value in asdict(text).items() if name != "prefixes"}
        | {
            "hash": text.hash,
            "unit": found.losses[text.name].unit,
            "units": len(found.losses[text.name].nats),
            "tokens": sum(found.losses[text.name].tokens),
            "bytes": sum(found.losses[text.name].bytes),
            "first_token": found.losses[text.name].first_token,
        }
        for text in texts
    ]
    asked = [{"name": each.name, "prompts": len(each.prompts), "hash": key_of(each.prompts)} for each in sets]
    return losses + asked


def _shown_replies(
    candidates: Sequence[Candidate], found: Sequence[Measured], sets: Sequence[PromptSet], wrappers: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for each in sets:
        for wrapper in wrappers:
            for at, asked in enumerate(each.prompts):
                replies = {
                    one.label: _shown_reply(measured.replies[each.name, wrapper][at], asked.language)
                    for one, measured in zip(candidates, found, strict=True)
                }
                yield {"set": each.name, "wrapper": wrapper} | asdict(asked) | {"replies": replies}


def _shown_reply(reply: Reply, language: str | None) -> dict[str, Any]:
    shown = {name: value for name, value in asdict(reply).items() if name != "logprobs"}
    return shown | ({"language": judge_language(reply.text, language).language} if language else {})


def _judge_questions(
    address: str, candidates: Sequence[Candidate], language: str, limit: int | None, say: Say
) -> Sequence["JudgeQuestion"]:
    """The questions that a judge is for, once it is said what it will cost: before hours of other measurements."""
    from nemo_cpt.evaluation.judge import expected_cost
    from nemo_cpt.evaluation.judge_questions import judge_questions

    questions = judge_questions(language=language)[:limit]
    cost = expected_cost(questions, len(first_and_last(candidates)))
    say(f"judge {hide_credentials(address)}, if every answer is of full length: {cost}")
    return questions


def _judged(
    address: str,
    questions: Sequence["JudgeQuestion"],
    candidates: Sequence[Candidate],
    output: Path,
    key: str | None,
    say: Say,
) -> "JudgeReport":
    from nemo_cpt.evaluation.judge import run_judge
    from nemo_cpt.inference.endpoint import EndpointEngine

    asked = first_and_last(candidates)
    url, _, served_as = address.partition("#")
    judge = EndpointEngine(url, served_as or None, api_key=key)
    try:
        report = run_judge(
            {each.label: each.engine for each in asked},
            judge,
            questions,
            output,
            identities={each.label: each.identity for each in asked},
            say=say,
        )
    finally:
        judge.close()
        for each in asked:
            each.close()
    for line in report.lines():
        say(line)
    return report


def _judge_row(judged: "JudgeReport", seed: int) -> Row:
    """The mean score of the questions that both models' answers were scored on."""
    scores = [judged.scores(model) for model in judged.models]
    # Paired: a question without a readable verdict on one is left out of both.
    both = [question for question in scores[0] if question in scores[-1]]
    measures = [mean("score", [each[question] for question in both], better="higher", unit="of 10") for each in scores]
    row = compare("judge", measures[0] if len(measures) > 1 else None, measures[-1], seed)
    return replace(row, note=f"{judged.judge}, prompt {judged.prompt_version}")
