"""Which datasets a training sees, in which shares, and which it is validated on."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_cpt.arguments import checked, names_checked, plain_scalar
from nemo_cpt.corpus.dataset.index import Index, fingerprint, full_prefix, read_index
from nemo_cpt.errors import CptError

WEIGHTINGS = ("share", "tokens", "documents")
MANY_EPOCHS = 4  # up to here repeated data is nearly as good as new (Muennighoff et al. 2023, arXiv:2305.16264)


@names_checked
@dataclass(frozen=True)
class Blend:
    """Datasets to train on with their weights, and named ones to validate and test on.

    A prefix is Megatron's (`ds/ja_text_document`) or the one given to `prepare` (`ds/ja`); neither has .bin or .idx.
    Plain data only, so that a blend can stand in a Fiddle or NeMo-Run config; nothing is read before a method needs it.

    Attributes:
        train: Weights by prefix.
        validation: Prefixes by name, one validation loss each.
        test: Prefixes by name.
        weighting: What a weight counts: `share` (of the training's tokens), `tokens` (a multiple of the dataset's
            tokens: 1.0 sees each dataset as often as any other) or `documents` (a multiple of its documents).
        note: What the shares rest on; presets put their source here.
        caution: A warning that goes with the blend into its report.
    """

    train: Mapping[str, float]
    validation: Mapping[str, str] = field(default_factory=dict)
    test: Mapping[str, str] = field(default_factory=dict)
    weighting: str = "share"
    note: str = ""
    caution: str = ""

    def __post_init__(self) -> None:
        """Refuse what is no mapping where it is written, and not in the recipe that reads it.

        Raises:
            CptError: train, validation or test is none.
        """
        for name in ("train", "validation", "test"):
            object.__setattr__(self, name, plain_mapping(getattr(self, name)))
            check_mapping(name, getattr(self, name))

    @classmethod
    @checked
    def replay(
        cls, new: str, old: str, share: float = 0.25, validation: Mapping[str, str] | None = None, note: str = ""
    ) -> "Blend":
        """Blend new data with a share of the data that the base model knows, against forgetting.

        Args:
            new: Prefix of the new language or domain.
            old: Prefix of data like the base model's.
            share: Share of the old data in the training's tokens. Ibrahim et al. 2024 (arXiv:2403.08763) take 0.05 for
                a weak and 0.25 for a strong shift of distribution, such as another language.
            validation: Prefixes by name.
            note: What the share rests on.

        Raises:
            CptError: The share is not between 0 and 1, or both prefixes name one dataset.
        """
        if not 0 < share < 1:
            raise CptError(f"The replay share is {share}; it must lie between 0 and 1, for instance 0.25.")
        check_distinct([new, old])
        return cls(train={new: 1 - share, old: share}, validation=dict(validation or {}), note=note)

    def check(self) -> None:
        """Check everything that can be known before the job starts.

        Raises:
            CptError: A mapping is a string or has the wrong kind of value, a weight is not positive, a file is missing
                or damaged, a dataset is trained on twice, or trained on and held out; a copy or a link is the same one.
        """
        self.check_form()
        for prefix in self.prefixes():
            read_index(prefix)
        self._check_held_out()

    def prefixes(self) -> list[str]:
        """Return the prefix of every dataset of the blend, each one once."""
        return list(dict.fromkeys([*self.train, *self.validation.values(), *self.test.values()]))

    def _check_held_out(self) -> None:
        check_held_out(self.train, {"validation": self.validation, "test": self.test})

    def check_form(self) -> None:
        """Check what can be known without the files.

        Raises:
            CptError: As `check`.
        """
        if not self.train:
            raise CptError("The blend has no training data: Blend(train={'ds/ja': 0.75, 'ds/en': 0.25}).")
        if self.weighting not in WEIGHTINGS:
            raise CptError(f"The blend's weighting is {self.weighting!r}; it can be {', '.join(WEIGHTINGS)}.")
        check_weights(self.train)
        check_distinct(self.train)

    def shares(self) -> dict[str, float]:
        """Return each training set's share of the tokens by its full prefix; they add up to 1.

        Raises:
            CptError: As `check` on the form; with weighting by tokens or documents, also on the files.
        """
        self.check_form()
        sizes = {prefix: weight * self._size(prefix) for prefix, weight in self.train.items()}
        total = sum(sizes.values())
        return {full_prefix(prefix): size / total for prefix, size in sizes.items()}

    def _size(self, prefix: str) -> float:
        if self.weighting == "share":
            return 1.0
        index = read_index(prefix)
        return float(index.tokens if self.weighting == "tokens" else index.documents)

    def paths(self) -> list[Any]:
        """Return Megatron's flat list for training, [share, full prefix, share, full prefix, …]."""
        # Weight before prefix, in one flat list, as Megatron's `--data-path` has it.
        return [item for prefix, share in self.shares().items() for item in (share, prefix)]

    def validation_paths(self) -> dict[str, str]:
        """Return the full prefix of each validation set by its name."""
        return {name: full_prefix(prefix) for name, prefix in self.validation.items()}

    def test_paths(self) -> dict[str, str]:
        """Return the full prefix of each test set by its name."""
        return {name: full_prefix(prefix) for name, prefix in self.test.items()}

    def tokens(self) -> dict[str, int]:
        """Return the tokens of each training set by its full prefix, counted from its `.idx`.

        Raises:
            CptError: As `read_index`.
        """
        self.check_form()
        return {full_prefix(prefix): read_index(prefix).tokens for prefix in self.train}

    @checked
    def epochs(self, train_tokens: float) -> dict[str, float]:
        """Return how often a training on so many tokens in all sees each set, by its full prefix.

        Args:
            train_tokens: steps * global_batch_size * seq_length.
        """
        tokens = self.tokens()
        # Both by the full prefix: what was given may be the output prefix of `prepare`.
        return {prefix: train_tokens * share / tokens[prefix] for prefix, share in self.shares().items()}

    @checked
    def steps(self, global_batch_size: int, seq_length: int) -> int:
        """Return the steps after which the first training set has been seen once: no set is repeated before.

        Args:
            global_batch_size: Sequences a step.
            seq_length: Tokens a sequence.

        Raises:
            CptError: The batch size or length is not positive, or the data do not fill one batch.
        """
        if global_batch_size < 1 or seq_length < 1:
            raise CptError(
                f"global_batch_size is {global_batch_size} and seq_length {seq_length}; both must be positive."
            )
        tokens, shares = self.tokens(), self.shares()
        # The set that is used up first, for its share, ends the epoch; its last token is only predicted.
        once = min((tokens[prefix] - 1) / shares[prefix] for prefix in tokens)
        # Rounded down: one step more would begin the set anew.
        steps = int(once // (global_batch_size * seq_length))
        if steps == 0:
            raise CptError(
                f"The blend has {once:,.0f} tokens before a set repeats, less than one step of {global_batch_size} x "
                f"{seq_length}. "
                f"Use more data, a smaller global_batch_size or a shorter seq_length."
            )
        return steps

    @checked
    def report(self, global_batch_size: int, seq_length: int, steps: int | None = None) -> "BlendReport":
        """Return tokens, shares, epochs and steps of a training with this blend.

        Args:
            global_batch_size: Sequences a step.
            seq_length: Tokens a sequence.
            steps: Length of the training; by default until the first set has been seen once.

        Raises:
            CptError: As `check` and `steps`.
        """
        # The whole check first: a report on a blend that cannot be trained on would only mislead.
        self.check()
        if steps is not None and steps < 1:
            raise CptError(f"steps is {steps}; it must be 1 or more.")
        steps = self.steps(global_batch_size, seq_length) if steps is None else steps
        train_tokens = steps * global_batch_size * seq_length
        shares, epochs = self.shares(), self.epochs(train_tokens)
        indices = {prefix: read_index(prefix) for prefix in shares}
        sets = [_describe(index, shares[prefix], epochs[prefix]) for prefix, index in indices.items()]
        validation = {name: read_index(prefix).tokens for name, prefix in self.validation.items()}
        return BlendReport(steps, train_tokens, sets, validation, _blend_warnings(self, sets), self.note)


@dataclass(frozen=True)
class BlendReport:
    """What a training with a blend amounts to.

    Attributes:
        steps: Optimizer steps.
        train_tokens: Tokens seen in all.
        sets: Of each training set its `prefix`, `dtype`, `documents`, `tokens`, `share` and `epochs`.
        validation: Tokens of each validation set by its name.
        warnings: Sentences for people.
        note: The blend's note.
    """

    steps: int
    train_tokens: int
    sets: list[dict[str, Any]]
    validation: dict[str, int]
    warnings: list[str]
    note: str


def _describe(index: Index, share: float, epochs: float) -> dict[str, Any]:
    return {
        "prefix": index.prefix,
        "dtype": index.dtype,
        "documents": index.documents,
        "tokens": index.tokens,
        "share": share,
        "epochs": epochs,
    }


def _blend_warnings(blend: Blend, sets: list[dict[str, Any]]) -> list[str]:
    warnings = [
        f"{entry['prefix']} is repeated {entry['epochs']:.1f} times; beyond {MANY_EPOCHS} epochs repeated data gains "
        "little."
        for entry in sets
        if entry["epochs"] > MANY_EPOCHS
    ]
    if len({entry["dtype"] for entry in sets}) > 1:
        warnings.append("The training sets differ in dtype: they were probably made with different tokenizers.")
    if not blend.validation:
        warnings.append("There is no validation set: nothing will show overfitting or forgetting.")
    if blend.caution:
        warnings.append(blend.caution)
    return warnings


def _is_number(text: Any) -> bool:
    try:
        return isinstance(text, str) and math.isfinite(float(text))
    except ValueError:
        return False


def check_weights(train: Mapping[str, Any], kind: str = "blend") -> None:
    """Check that every training set of a blend, or of another kind of mixture, has a positive weight.

    Raises:
        CptError: One has not.
    """
    for prefix, weight in train.items():
        # A bool is an int in Python, and no weight.
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight <= 0:
            raise CptError(
                f"The weight of {prefix!r} in the {kind} is {weight!r}; it must be a positive number"
                + (" (YAML takes it for text: write 1.0e-3 or 0.001, not 1e-3)." if _is_number(weight) else ".")
            )


def check_held_out(train: Iterable[str], held_out: Mapping[str, Mapping[str, str]], kind: str = "blend") -> None:
    """Check by content that nothing is trained on twice, or trained on and held out, be it as a part of more.

    Args:
        train: Prefixes of the training sets.
        held_out: Prefixes by name, of each part that is not trained on.
        kind: Of mixture.

    Raises:
        CptError: Something is; a copy or a link is the same one.
    """
    trained: dict[str, str] = {}
    for prefix in train:
        # By content, not by path: a symbolic link, a copy and a relative path are all the same data.
        digest = fingerprint(prefix)
        if digest in trained:
            raise CptError(f"The {kind} trains on one dataset twice: {prefix} is a copy of {trained[digest]}.")
        trained[digest] = prefix
    for part, sets in held_out.items():
        for name, prefix in sets.items():
            if same := trained.get(fingerprint(prefix)):
                under = "" if same == prefix else f", as {same}"
                raise CptError(
                    f"The {part} set {name!r} ({prefix}) is also trained on{under}: its loss would show memory. "
                    "Take a held-out one (nemo-cpt split)."
                )
            _check_inputs(prefix, f"{part} set {name!r}", trained.values())


def _check_inputs(held_out: str, what: str, trained: Iterable[str]) -> None:
    """Check that a held-out set was made of no file that a training set was made of, as their manifests tell.

    Raises:
        CptError: It was.
    """
    held = _inputs_of(held_out)
    for prefix in trained:
        if both := held.keys() & _inputs_of(prefix).keys():
            raise CptError(
                f"The {what} ({held_out}) is also trained on: it was made of {held[min(both)]}, and so was {prefix}. "
                "Its loss would show memory. Prepare the training set of a file without the held-out documents "
                "(train.jsonl of nemo-cpt split)."
            )


def _inputs_of(prefix: str) -> dict[tuple[str, str], str]:
    """Return the paths of what `prepare` made a dataset of, by content and field; none where it did not make it."""
    from nemo_cpt.corpus.dataset.manifest import read_manifest  # needs orjson, which the doctor may miss

    try:
        manifest = read_manifest(prefix)
    except CptError:
        return {}
    # Two fields of one file, as of a parallel corpus, are two texts.
    field_name = str(manifest.get("options", {}).get("json_key", ""))
    # Of what has bytes, or is on the hub: empty files are all alike, and hold no text that could be in two sets.
    known = (
        each for each in manifest.get("inputs", ()) if each.get("hash") and (each["size"] or each["kind"] == "hub")
    )
    return {(entry["hash"], field_name): entry["path"] for entry in known}


def plain_mapping(value: Any) -> Any:
    """A mixture's mapping with its Paths as text and numpy's numbers as Python's; what is none as it is."""
    if not isinstance(value, Mapping):
        return value
    plain = {plain_scalar(key): plain_scalar(item) for key, item in value.items()}
    # A Path beside the same as text would become one with it, unnoticed.
    return plain if len(plain) == len(value) else value


def check_mapping(name: str, value: Any, kind: str = "blend") -> None:
    """Check that a field of a mixture maps strings; the usual slip is the Hydra string of NeMo's old scripts.

    Raises:
        CptError: It does not.
    """
    example = {"train": "{'ds/ja': 0.75, 'ds/en': 0.25}"}.get(name, "{'ja': 'ds/ja_validation'}")
    if isinstance(value, str):
        what = "a dictionary written as a string" if "{" in value or "[" in value else "a string"
        call = {"blend": "Blend"}.get(kind, "Conversations")
        raise CptError(f"The {kind}'s {name} is {what}, {value!r}. Write a dictionary: {call}({name}={example}).")
    if not isinstance(value, Mapping):
        raise CptError(
            f"The {kind}'s {name} is a {type(value).__name__}, {value!r}. Write a dictionary: {name}={example}."
        )
    for key, item in value.items():
        if not isinstance(key, str) or (name != "train" and not isinstance(item, str | os.PathLike)):
            raise CptError(f"The {kind}'s {name} maps {key!r} to {item!r}. Write it like {name}={example}.")


def check_distinct(prefixes: Iterable[str], kind: str = "blend", full_name: Callable[[str], str] = full_prefix) -> None:
    """Check that no two prefixes name one dataset: as keys of a mapping, equal ones would become one unnoticed.

    Raises:
        CptError: Two do.
    """
    seen: dict[str, str] = {}
    for prefix in prefixes:
        full = full_name(prefix)
        if full in seen:
            raise CptError(f"The {kind} names one dataset twice: {seen[full]!r} and {prefix!r} are both {full}.")
        seen[full] = prefix
