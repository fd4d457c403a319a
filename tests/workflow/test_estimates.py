"""What a dry run says that steps would take."""

import gzip
from pathlib import Path

import pytest

from nemo_cpt.checkpoint import make_untrained
from nemo_cpt.planning import Workload
from nemo_cpt.vocabulary import train
from nemo_cpt.workflow import Chosen, Step, Workflow, clean, estimates, split
from nemo_cpt.workflow.dry_run import UNKNOWN, dry_run
from nemo_cpt.workflow.kinds import KINDS


def corpus(folder: Path) -> bytes:
    lines = b"".join(
        b'{"text": "A line of text, of which there are many, the %dth."}\n' % number for number in range(9999)
    )
    (folder / "en.jsonl").write_bytes(lines)
    return lines


def test_of_a_compressed_input_what_is_in_it_counts(tmp_path: Path) -> None:
    lines = corpus(tmp_path)
    with gzip.open(tmp_path / "en.jsonl.gz", "wb") as file:
        file.write(lines)
    packed = split("packed", inputs="en.jsonl.gz", output_folder="packed")
    plain = split("plain", inputs="en.jsonl", output_folder="plain")
    estimates = dry_run(Workflow("w", [packed, plain], tmp_path), Chosen()).estimates
    assert estimates[1].disk_bytes == len(lines)
    assert estimates[0].disk_bytes == pytest.approx(len(lines), rel=0.3)
    assert (tmp_path / "en.jsonl.gz").stat().st_size < len(lines) / 3


def test_rules_that_tell_languages_apart_take_their_time(tmp_path: Path) -> None:
    corpus(tmp_path)
    steps = [clean(rules, inputs="en.jsonl", output=rules, rules=rules, workers=1) for rules in ("en", "ja")]
    english, japanese = (each.seconds for each in dry_run(Workflow("w", steps, tmp_path), Chosen()).estimates)
    assert english is not None
    assert japanese is not None
    assert english > 2 * japanese


def test_a_training_on_gpus_writes_its_checkpoints_and_its_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workload(
        num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
        kv_channels=128, vocab_size=128_256, max_steps=100,
    )  # fmt: skip
    monkeypatch.setattr(estimates, "workload", lambda *recipe: work)  # which NeMo would build the recipe for
    (tmp_path / "base").mkdir()
    (tmp_path / "a.idx").touch()
    (tmp_path / "a.bin").touch()
    given = {"recipe": "llama31_8b.continual_pretrain", "base": "base", "data": {"train": {"a": 1.0}}, "max_steps": 100}
    step = Step("one", "train", given | {"val_check_interval": 10, "export_every": 20})
    (found,) = dry_run(Workflow("w", [step], tmp_path), Chosen()).estimates
    # The three best, the last and the one being written, of 14 bytes a parameter; five exports in bf16.
    assert found.disk_bytes == 8_030_261_248 * (5 * 14 + 5 * 2)


@pytest.mark.parametrize("do", [do for do, kind in KINDS.items() if not kind.recipe and do != "prepare_conversations"])
def test_what_is_not_estimated_says_why(tmp_path: Path, do: str) -> None:
    corpus(tmp_path)
    (tmp_path / "hf").mkdir()
    given = {
        "clean": {"inputs": "hf:a/b", "output": "o", "rules": "ja"},
        "download": {"repo_id": "a/b", "dest": "o"},
        "evaluate": {"model": "hf", "output": "o"},
        "fetch": {"corpus": "llm-jp/ja_wiki", "folder": "o"},
        "grow_tokenizer": {"tokenizer": "hf", "inputs": "en.jsonl", "output": "o", "tokens": 9},
        "init": {"dest": "o", "tokenizer": "hf"},
        "prepare": {"inputs": "hf:a/b", "output_prefix": "o", "tokenizer": "hf"},
        "push": {"folder": "hf", "repo_id": "a/b"},
        "report": {"run": "hf", "output": "o"},
        "serve": {"model": "hf"},
        "split": {"inputs": "hf:a/b", "output_folder": "o"},
        "synthesize": {"inputs": "en.jsonl", "output": "o"},
        "tokenizer": {"corpora": "hf:a/b", "output": "o"},
        "verify": {"nemo": "hf", "hf": "hf"},
    }.get(do, {"source": "hf", "dest": "o", **({"tokenizer": "hf"} if do == "grow" else {})})
    row = next(dry_run(Workflow("w", [Step("one", do, given)], tmp_path), Chosen()).rows())
    assert row[4] == UNKNOWN
    assert row[-1]


def test_a_base_that_a_step_makes_is_no_fault_of_the_plan(tmp_path: Path) -> None:
    corpus(tmp_path)
    (tmp_path / "hf").mkdir()
    steps = [
        Step("data", "prepare", {"inputs": "en.jsonl", "output_prefix": "ds", "tokenizer": "hf"}),
        Step("init", "init", {"dest": "random", "tokenizer": "hf"}),
        Step("train", "train", {"recipe": "gpt.pretrain", "base": "random", "data": {"train": {"ds": 1.0}}}),
    ]
    found = dry_run(Workflow("w", steps, tmp_path), Chosen())
    assert found.estimates[-1].note == "not known before its base is there"
    assert not [finding for _, finding in found.findings if finding.name == "plan"]


def test_a_training_is_examined_where_it_is_to_run(tmp_path: Path) -> None:
    """On the executor of its jobs, with its options; one that names its own takes that."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").touch()
    for ending in (".bin", ".idx"):
        (tmp_path / f"ds_text_document{ending}").touch()
    given = {"recipe": "llama31_8b.continual_pretrain", "base": "base", "data": {"train": {"ds": 1.0}}}
    steps = [Step("theirs", "train", given), Step("own", "train", given | {"executor": "local", "directory": "other"})]

    def found(gpus: int) -> dict[str, str]:
        options = [f"gpus_per_node={gpus}"]
        run = dry_run(Workflow("w", steps, tmp_path), Chosen(), plan=False, executor="slurm", options=options)
        return {name: finding.found for name, finding in run.findings if finding.name == "settings"}

    assert "slurm starts 4" in found(4)["theirs"]
    assert found(8) == {}


def test_a_model_of_random_weights_is_known_before_it_and_its_tokenizer_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    corpus(tmp_path)
    steps = [
        Step("words", "tokenizer", {"corpora": "en.jsonl", "output": "words", "vocabulary_size": 300}),
        Step("data", "prepare", {"inputs": "en.jsonl", "output_prefix": "ds", "tokenizer": "words"}),
        Step("init", "init", {"dest": "random", "tokenizer": "words", "params": "tiny"}),
        Step("train", "train", {"recipe": "tiny.continual_pretrain", "model": "base", "base": "random",
                                "data": {"train": {"ds": 1.0}}}),
    ]  # fmt: skip
    estimate = dry_run(Workflow("w", steps, tmp_path), Chosen()).estimates[-1]
    train(str(tmp_path / "en.jsonl"), tmp_path / "words", vocabulary_size=300)
    made = make_untrained(tmp_path / "random", tmp_path / "words", "tiny")
    assert estimate.model_bytes == 4 * made.parameters  # on a CPU in fp32
