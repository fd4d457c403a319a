"""The loss on the answers of conversations: of a prepared set, of a file, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_cpt.conversations import open_conversations, prepare
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation import comparison, evaluate
from nemo_cpt.inference.transformers_engine import TransformersEngine

PAIRS = [
    {"query": "What is the capital of Japan?", "answer": "Tokyo."},
    {"query": "日本で一番高い山は?", "answer": "富士山です。"},
    {"query": "Tell me of temples.", "answer": "There are many." * 12},
    {"messages": [{"role": role, "content": f"{role} {turn}"} for turn in "ab" for role in ("user", "assistant")]},
]
ANSWERS = [*(pair["answer"] for pair in PAIRS[:3]), "assistant aassistant b"]


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`before` and `after`, the latter a little changed; `chats.jsonl`, and `sft/chats` made of it."""
    folder = tmp_path_factory.mktemp("conversations")
    for name, noise in (("before", 0.0), ("after", 0.02)):
        network = AutoModelForCausalLM.from_pretrained(world / "base_hf")
        torch.manual_seed(1)
        for parameter in network.parameters():
            parameter.data += noise * torch.randn_like(parameter)
        network.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(world / "base_hf").save_pretrained(folder / name)
    (folder / "chats.jsonl").write_text("".join(json.dumps(each) + "\n" for each in PAIRS))
    settings = {"template": "alpaca-en", "workers": 1, "quiet": True}
    prepare(folder / "chats.jsonl", folder / "sft/chats", folder / "before", **settings)
    return folder


def measured(folder: Path, output: Path, *losses: str, **options: Any) -> comparison.Report:
    given = {"against": folder / "before", "device": "cpu", "quiet": True, "losses": losses}
    return evaluate(folder / "after", output, **given | options)


def test_a_file_is_measured_as_the_set_that_is_made_of_it_and_nothing_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"set={folder / 'sft/chats'}", f"file={folder / 'chats.jsonl'}"]
    found = measured(folder, tmp_path, *given, template="alpaca-en")
    rows = {(row.group, row.measure.partition(",")[0]): row for row in found.rows}
    for measure in ("bits per byte", "loss", "perplexity"):
        of_set, of_file = (rows[name, measure] for name in ("set", "file"))
        assert (of_set.before, of_set.after, of_set.low) == (of_file.before, of_file.after, of_file.low)
    nats, tokens = _by_transformers(folder)
    assert rows["set", "loss"].before == pytest.approx(nats / tokens, rel=1e-5)
    size = len("".join(ANSWERS).encode())
    assert rows["set", "bits per byte"].before == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert [(each["unit"], each["units"], each["tokens"], each["bytes"]) for each in found.sets] == [
        ("conversation", len(PAIRS), tokens, size)
    ] * 2
    assert rows["set", "bits per byte"].note == "first token: an answer's, after its question in the template alpaca-en"
    monkeypatch.setattr("nemo_cpt.evaluation.candidates.open_engine", None)
    assert measured(folder, tmp_path, *given, template="alpaca-en").rows == found.rows


@torch.inference_mode()
def _by_transformers(folder: Path) -> tuple[float, int]:
    """Summed nats and number of the tokens that are trained on, each conversation by itself."""
    network, chats = AutoModelForCausalLM.from_pretrained(folder / "before"), open_conversations(folder / "sft/chats")
    nats, count = 0.0, 0
    for number in range(len(chats)):
        ids, trained = (torch.as_tensor(each.astype("int64")) for each in chats.read(number))
        each = -network(ids[None]).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        nats, count = nats + float((each * trained[1:]).sum()), count + int(trained[1:].sum())
    return nats, count


def test_the_template_is_the_models_own_or_the_others(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CptError, match=r"holds conversations, and no model has a chat template .*--template alpaca-en"):
        measured(folder, tmp_path / "out", f"chats={folder / 'chats.jsonl'}")
    template = open_conversations(folder / "sft/chats").manifest["template"]["text"]
    (folder / "before/chat_template.jinja").write_text(template)
    try:
        found = measured(folder, tmp_path / "out", f"set={folder / 'sft/chats'}", f"file={folder / 'chats.jsonl'}")
    finally:
        (folder / "before/chat_template.jinja").unlink()
    assert [row.after for row in found.rows[:3]] == [row.after for row in found.rows[3:]]


def test_what_is_longer_than_the_context_is_left_out_and_said(folder: Path, tmp_path: Path) -> None:
    context = int(max(open_conversations(folder / "sft/chats").index.lengths)) - 2
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        for path in (folder / name).iterdir():
            (tmp_path / name / path.name).symlink_to(path)
        config = json.loads((folder / name / "config.json").read_text())
        (tmp_path / name / "config.json").unlink()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    found = measured(tmp_path, tmp_path / "out", f"chats={folder / 'sft/chats'}", limit=2)
    left_out = f"1 of the 4 conversations of chats are longer than {context} tokens: 0 are cut, and 1 left out"
    assert found.warnings == [left_out]
    assert found.sets[0]["units"] == 2
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps(PAIRS[2]) + "\n")
    with pytest.raises(CptError, match=rf"None of the 1 conversations of .*long.jsonl fits into {context} positions"):
        measured(tmp_path, tmp_path / "out", f"long={long}", template="alpaca-en")


def test_models_of_other_tokens_are_compared_by_the_byte(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "before")
    tokenizer.add_tokens(["Tokyo", "temples"])
    network = AutoModelForCausalLM.from_pretrained(folder / "after")
    network.resize_token_embeddings(len(tokenizer))
    for each in (tokenizer, network):
        each.save_pretrained(tmp_path / "after")
    (tmp_path / "before").symlink_to(folder / "before")
    found = measured(tmp_path, tmp_path / "out", f"chats={folder / 'chats.jsonl'}", template="alpaca-en")
    assert found.sets[0]["bytes"] == len("".join(ANSWERS).encode())
    assert [row.better for row in found.rows] == ["lower", None, None]
    with pytest.raises(CptError, match="which is not the base's"):
        measured(tmp_path, tmp_path / "out", f"chats={folder / 'sft/chats'}")


def test_what_cannot_be_read_is_refused(folder: Path, world: Path, tmp_path: Path) -> None:
    with pytest.raises(CptError, match="template is set, and nothing that is to be evaluated uses it"):
        measured(folder, tmp_path, f"set={folder / 'sft/chats'}", template="alpaca-en")
    with pytest.raises(CptError, match="There is no template 'alpaca'"):
        measured(folder, tmp_path, f"chats={folder / 'chats.jsonl'}", template="alpaca")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(PAIRS[0]) + '\n{"query": "and?"}\n')
    with pytest.raises(CptError, match=r"broken.jsonl, line 2.*prepare it .*and give --loss chats=PREFIX"):
        measured(folder, tmp_path, f"chats={broken}", template="alpaca-en")
    both = tmp_path / "both.jsonl"
    both.write_text(json.dumps(PAIRS[0] | {"text": "A rendered text."}) + "\n")
    units = [
        measured(folder, tmp_path / "out", f"both={both}", template=each).sets[0]["unit"]
        for each in (None, "alpaca-en")
    ]
    assert units == ["document", "conversation"]


def test_numbers_that_cannot_be(folder: Path) -> None:
    from nemo_cpt.evaluation import conversations_loss

    engine = TransformersEngine(folder / "before", device="cpu")
    for numbers in ({"seq_length": 0}, {"seq_length": 64, "sequences": 0}, {"seq_length": 64, "limit": 0}):
        with pytest.raises(CptError, match="have to be 1 or more"):
            conversations_loss(engine, folder / "sft/chats", **numbers)
    with pytest.raises(CptError, match="too_long is 'leave'"):
        conversations_loss(engine, folder / "sft/chats", seq_length=64, too_long="leave")
