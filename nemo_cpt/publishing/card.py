"""The model card: what a model was made of, with what, and what came of it. No path of this machine gets into it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_cpt.checkpoint.provenance import Provenance
from nemo_cpt.publishing.licences import Licence

TAG = "nemo-cpt"  # in the tags of every card that is written here
# Parameters of recipes that name files of this machine, or services and secrets of their user.
_PRIVATE = ("base", "data", "directory", "name", "tokenizer", "replay", "logger", "secrets")
_WORD = re.compile(r"[A-Za-z0-9_.+-]{1,32}")  # no path, address or sentence
LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]{2,4})?")


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        repo_id: its repository.
        origin: where the model comes from.
        licence: of the base, or of a model from scratch.
        languages: it was trained on, as ISO 639 codes.
        is_adapter: it is an adapter for peft, not a whole model.
        has_template: it carries a chat template.
    """

    repo_id: str
    origin: Provenance
    licence: Licence
    languages: Sequence[str]
    is_adapter: bool
    has_template: bool


def model_card(subject: Subject) -> str:
    """Write a card, in Markdown with the hub's metadata before it."""
    return f"---\n{_metadata(subject)}---\n\n" + "\n".join(_body(subject)) + "\n"


def languages_of(origin: Provenance) -> list[str]:
    """The languages that a model was trained on, where its datasets are called by their codes (`ds/ja`, `ja_train`)."""
    names = [name.partition("_")[0] for training in origin.trainings for name, _ in _sets(training)]
    return sorted({name for name in names if LANGUAGE.fullmatch(name) and len(name.partition("-")[0]) == 2})


def _metadata(subject: Subject) -> str:
    licence, base = subject.licence, subject.origin.repo_id
    tuned = any(map(_on_conversations, subject.origin.trainings))
    pretraining = "pretraining" if subject.origin.from_scratch else "continual-pretraining"
    fields = {
        "license": licence.id,
        "license_name": licence.name,
        "license_link": licence.link,
        "base_model": base and [base],
        "base_model_relation": base and ("adapter" if subject.is_adapter else "finetune"),
        "language": list(subject.languages),
        "library_name": "peft" if subject.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [TAG, pretraining, *(["instruction-tuning"] if tuned else [])],
    }
    return yaml.safe_dump({name: value for name, value in fields.items() if value}, sort_keys=False)


def _body(subject: Subject) -> Iterator[str]:
    origin, licence = subject.origin, subject.licence
    yield f"# {subject.repo_id.partition('/')[2]}\n"
    if licence.display:
        yield f"**{licence.display}**\n"
    what = "An adapter for" if subject.is_adapter else "A model trained from"
    whose = "" if origin.from_scratch else ", the base's"
    revision = f", revision `{origin.commit[:12]}`" if origin.commit else ""
    yield f"{what} {_base(origin)}{revision}. Licence: {licence.name or licence.id}{whose}.\n"
    yield "## How to use it\n"
    yield _usage(subject)
    for number, training in enumerate(origin.trainings, start=1):
        first = "Pretraining" if origin.from_scratch and number == 1 else "Continual pretraining"
        kind = "Instruction tuning" if _on_conversations(training) else first
        yield f"## {f'{number}. ' if len(origin.trainings) > 1 else ''}{kind}\n"
        yield from _training(training)
    if not origin.trainings:
        yield "How it was trained was not recorded.\n"


def _base(origin: Provenance) -> str:
    if origin.from_scratch:
        return "random weights"
    return f"[{origin.repo_id}](https://huggingface.co/{origin.repo_id})" if origin.repo_id else "a base of its own"


def _usage(subject: Subject) -> str:
    ask = (
        '[{"role": "user", "content": "..."}]\n'
        "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt', "
        "return_dict=True)"
    )
    lines = ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if subject.is_adapter:
        lines += ["from peft import PeftModel"]
    # An adapter is loaded onto its base, whose tokenizer it is used with.
    source = subject.origin.repo_id if subject.is_adapter else subject.repo_id
    lines += [f'\ntokenizer = AutoTokenizer.from_pretrained("{source}")']
    lines += [f'model = AutoModelForCausalLM.from_pretrained("{source}", dtype="auto")']
    lines += [f'model = PeftModel.from_pretrained(model, "{subject.repo_id}")'] if subject.is_adapter else []
    lines += [f"messages = {ask}" if subject.has_template else 'inputs = tokenizer("...", return_tensors="pt")']
    lines += [
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))",
        "```\n",
    ]
    return "\n".join(lines)


def _training(training: Mapping[str, Any]) -> Iterator[str]:
    settings = training.get("settings", {})
    data, schedule = settings.get("data", {}), settings.get("schedule", {})
    step, batch, length = training.get("step"), data.get("global_batch_size"), data.get("seq_length")
    tokens = step * batch * length if step and batch and length else None
    yield from _data(training, tokens)
    yield from _losses(training.get("losses", ()))
    adapters, template = settings.get("adapters", {}), training.get("template")
    not_full = " at most, as sequences are not all full" if _on_conversations(training) else ""
    facts = {
        "steps": step and f"{step:,}",
        "tokens": tokens and f"{tokens:,}{not_full}",
        "batch": batch and f"{batch} sequences of {length} tokens",
        "learning rate": schedule.get("lr") and f"{schedule['lr']:g}, {schedule.get('lr_scheduler')}",
        "adapters": adapters.get("peft") and f"{adapters['peft']}, rank {adapters.get('dim')}",
        "precision": settings.get("layout", {}).get("precision"),
        "chat template": template and Path(template["name"]).name,
        "recipe": _recipe(training.get("launched")),
        "versions": ", ".join(f"{name} {version}" for name, version in (training.get("versions") or {}).items()),
    }
    yield from _table(("training", ""), ((name, str(value)) for name, value in facts.items() if value))


def _on_conversations(training: Mapping[str, Any]) -> bool:
    """Whether it was instruction tuning. A template says it not: a run on texts hands on that of its start."""
    return training.get("settings", {}).get("data", {}).get("too_long") is not None


def _data(training: Mapping[str, Any], tokens: int | None) -> Iterator[str]:
    """The datasets. The weight of conversations is how often an epoch goes through them, that of replay its share."""
    if _on_conversations(training):
        return _table(("data", "weight"), ((name, f"{weight:g}") for name, weight in _sets(training)))
    sets = _sets(training)
    total = sum(weight for _, weight in sets) or 1
    shares = ((name, weight / total) for name, weight in sets)
    return _table(("data", "share", "tokens"), (
        (name, f"{share:.1%}", f"{share * tokens / 1e6:,.1f} M" if tokens else "") for name, share in shares
    ))  # fmt: skip


def _losses(found: Sequence[Mapping[str, float | None]]) -> Iterator[str]:
    if not found:
        return
    first, last = found[0], found[-1]
    columns = ("held-out loss (nats per token)", f"at step {first['step']}", f"at step {last['step']}")
    # Sets of both ends alone: one that a resumed run added has nothing to be compared with.
    names = [name for name in last if name != "step" and name in first]
    yield from _table(columns, ((name, _loss(first[name]), _loss(last[name])) for name in names))


def _loss(loss: float | None) -> str:
    return "NaN" if loss is None else f"{loss:.4f}"  # as the run's record holds what was not finite


def _sets(training: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Each training set's name and its weight, the larger first."""
    sets = training.get("settings", {}).get("data", {}).get("train") or []
    return sorted(((name.rpartition(":")[0], weight) for weight, name in sets), key=lambda each: -each[1])


def _recipe(launched: Mapping[str, Any] | None) -> str | None:
    """The recipe as it was called, without what names this machine's files or may do so."""
    if not launched:
        return None
    # Both sieves: by name what is private whatever it says, by form what may be a path under any other name.
    given = {name: value for name, value in launched.get("arguments", {}).items() if name not in _PRIVATE}
    words = [f"{name}={value}" for name, value in given.items() if _is_public(value)]
    return f"`{' '.join([launched['recipe'], *words])}`"


def _is_public(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and bool(_WORD.fullmatch(value)))


def _table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    found = list(rows)
    if found:
        yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
        yield from (f"| {' | '.join(row)} |" for row in found)
        yield ""
