"""A tuned model leaves with the template that it was trained on, and stops by itself; a pretrained one as its base."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from nemo_cpt.checkpoint import export_hf, import_hf, verify
from nemo_cpt.checkpoint.chat_template import instruction_template
from nemo_cpt.checkpoint.folders import TEMPLATES
from nemo_cpt.conversations import open_conversations, prepare
from nemo_cpt.errors import CptError
from nemo_cpt.inference import Sampling, open_engine
from nemo_cpt.made import RECORD
from tests.support import tokenizers

ANSWERS = {"日本の首都は？": "東京です。", "What is 2 + 3?": "It is 5.", "日本で一番高い山は？": "富士山です。"}
END = "<|im_end|>"


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, a small base without a template whose weights know three answers in ChatML, and `sft`.

    The weights come from a loop of plain PyTorch over the tokens and the mask that `prepare` wrote.
    """
    folder = tmp_path_factory.mktemp("tuned")
    base = folder / "hf"
    base.mkdir()
    texts = [(files("nemo_cpt.demo") / "corpus" / f"{name}.jsonl").read_text("utf-8") for name in ("ja", "en")]
    tokenizers.qwen25(base, texts)
    lines = [json.dumps({"query": query, "answer": answer}) for query, answer in ANSWERS.items()]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    prepare(folder / "chats.jsonl", folder / "sft", base, template="chatml", workers=1, quiet=True)
    ids = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|endoftext|>")
    config = LlamaConfig(
        vocab_size=2008, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=ids,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    _overfit(model, folder / "sft")
    model.save_pretrained(base)
    return folder


def _overfit(model: LlamaForCausalLM, prefix: Path) -> None:
    chats = open_conversations(prefix)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        for number in range(len(chats)):
            tokens, mask = (torch.from_numpy(each.astype("int64")) for each in chats.read(number))
            logits = model(tokens[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")[mask[1:].bool()].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss.item() < 0.05


@pytest.fixture(scope="session")
def checkpoint(tuned: Path) -> Path:
    """What a training on `sft` leaves: the weights in NeMo's form, and the record of the template."""
    nemo = tuned / "nemo"
    import_hf(tuned / "hf", nemo)
    record(nemo, open_conversations(tuned / "sft").manifest["template"])
    return nemo


def record(nemo: Path, template: Any) -> None:
    (nemo / "run.json").write_text(json.dumps({"step": 60, "template": template}))


def _reply(folder: Path, question: str, room: int = 30) -> list[int]:
    """A greedy reply through plain transformers, with nothing said of ends."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    message = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        replied = model.generate(**inputs, max_new_tokens=room, do_sample=False)
    return replied[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_tuned_model_answers_and_stops_by_itself(tuned: Path, checkpoint: Path, tmp_path: Path) -> None:
    report = export_hf(checkpoint, tmp_path / "out")
    assert report.chat_template == "chatml"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for question, answer in ANSWERS.items():
        reply = _reply(tmp_path / "out", question)
        assert tokenizer.decode(reply) == answer + END
        assert len(reply) < 30
    # With the base's files the same weights go on until there is no room.
    export_hf(checkpoint, tmp_path / "untold", chat_template="none")
    shutil.copy(tmp_path / "out" / "chat_template.jinja", tmp_path / "untold")
    assert len(_reply(tmp_path / "untold", "What is 2 + 3?")) == 30


def test_templates_that_it_was_not_tuned_on_stay_behind(checkpoint: Path, tmp_path: Path) -> None:
    nemo = Path(shutil.copytree(checkpoint, tmp_path / "nemo"))
    for folder in (nemo / "hf", nemo / "context" / "nemo_tokenizer"):
        (folder / f".{TEMPLATES}.json").write_text(json.dumps({"tool_use.jinja": "{{ tools }}"}))
    assert TEMPLATES not in "".join(export_hf(nemo, tmp_path / "out").files)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == instruction_template(nemo).text
    assert f"{TEMPLATES}/tool_use.jinja" in export_hf(nemo, tmp_path / "base_s", chat_template="none").files


def test_the_files_say_it_wherever_a_reader_looks(tuned: Path, checkpoint: Path, tmp_path: Path) -> None:
    report = export_hf(checkpoint, tmp_path / "out")
    template = open_conversations(tuned / "sft").manifest["template"]
    base_end, end = 2000, template["stop"][1]
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (tmp_path / "out" / "chat_template.jinja").read_text() == template["text"]
    assert settings["eos_token"] == END
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [base_end, end]
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [base_end, end]
    assert f"eos_token_id: [{base_end}, {end}] instead of {base_end}" in report.config_changes
    assert set(report.files) == {path.name for path in (tmp_path / "out").glob("[!.]*")}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tuned / "hf" / "tokenizer.json").read_bytes()
    text = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        [{"role": "user", "content": "日本の首都は？"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\n日本の首都は？<|im_end|>\n<|im_start|>assistant\n"


def test_an_import_of_the_export_keeps_them(checkpoint: Path, tmp_path: Path) -> None:
    export_hf(checkpoint, tmp_path / "out")
    import_hf(tmp_path / "out", tmp_path / "nemo")
    export_hf(tmp_path / "nemo", tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        if path.name != RECORD:  # of what each was made of
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("choice", [None, "none"])
def test_a_pretrained_model_leaves_with_its_base_s_files(choice: str | None, tuned: Path, tmp_path: Path) -> None:
    """`none` says so of a tuned one; nothing says it of a run on texts, whose record has no template."""
    nemo = tmp_path / "nemo"
    import_hf(tuned / "hf", nemo)
    record(nemo, None if choice is None else open_conversations(tuned / "sft").manifest["template"])
    report = export_hf(nemo, tmp_path / "out", chat_template=choice)
    assert (report.chat_template, report.config_changes) == (None, ())
    for path in (tuned / "hf").glob("[!m]*"):  # all but the weights, whose headers differ
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {path.name for path in (tuned / "hf").iterdir()}


def test_another_template_can_be_chosen(tuned: Path, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{%- for m in messages %}{{ m['role'] + ':' + m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert export_hf(checkpoint, tmp_path / "out", chat_template=str(file)).chat_template == str(file)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    # The template writes eos_token too, so that it keeps its meaning; replies end at both.
    assert settings["eos_token"] == "<|endoftext|>"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2000, 2002]
    report = export_hf(checkpoint, tmp_path / "plain", chat_template="alpaca-ja")
    assert report.config_changes == ()  # its answers end with the base's own end of text
    assert "### 指示" in (tmp_path / "plain" / "chat_template.jinja").read_text()
    with pytest.raises(CptError, match="There is no template 'chat-ml'"):
        export_hf(checkpoint, tmp_path / "none", chat_template="chat-ml")
    with pytest.raises(CptError, match=r"uses <\|begin_of_text\|>|uses <\|end_header_id\|>"):
        export_hf(checkpoint, tmp_path / "none", chat_template="llama3")
    assert not (tmp_path / "none").exists()


def test_stale_and_named_templates_of_the_base_give_way(checkpoint: Path, tmp_path: Path) -> None:
    nemo = shutil.copytree(checkpoint, tmp_path / "nemo")
    (nemo / "hf" / "chat_template.json").write_text('{"chat_template": "old"}')
    settings = json.loads((nemo / "hf" / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "old"}]
    settings["eos_token"] = {"content": "<|endoftext|>", "lstrip": False}
    (nemo / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    (nemo / "hf" / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (nemo / "hf" / "generation_config.json").unlink()
    report = export_hf(nemo, tmp_path / "out")
    assert "chat_template.json" not in report.files
    assert not (tmp_path / "out" / "chat_template.json").exists()
    assert json.loads((tmp_path / "out" / "special_tokens_map.json").read_text()) == {"eos_token": END}
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.eos_token, loaded.chat_template) == (END, (tmp_path / "out" / "chat_template.jinja").read_text())
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2000, 2002]


def test_a_base_with_another_tokenizer_is_refused(tuned: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tuned / "hf", tmp_path / "other")
    definition = json.loads((other / "tokenizer.json").read_text())
    definition["added_tokens"] = [
        token | {"content": token["content"].replace("im_end", "im_over")} for token in definition["added_tokens"]
    ]
    (other / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(CptError, match="would not answer as it was trained on the template chatml"):
        export_hf(checkpoint, tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["{", '{"template": {"name": "chatml"}}', '{"template": "chatml"}'])
def test_a_damaged_record_is_no_run_without_a_template(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    nemo = shutil.copytree(checkpoint, tmp_path / "nemo")
    (nemo / "run.json").write_text(damage)
    with pytest.raises(CptError, match=r"run\.json"):
        export_hf(nemo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _spoil_end(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 2000}')


def _spoil_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "bot"))


def _remove_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_spoil_end, r"generation_config.json does not end replies at <|im_end|> (2002): eos_token_id is 2000"),
        (_spoil_template, "has another chat template"),
        (_remove_template, "has no chat template"),
    ],
)
def test_verify_tells_where_a_folder_would_not_answer_as_tuned(
    spoil: Callable[[Path], None], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    export_hf(checkpoint, tmp_path / "out")
    report = verify(checkpoint, tmp_path / "out", logits=False)
    assert report.identical
    assert (report.chat_template, report.chat, report.warnings) == ("chatml", (), ())
    spoil(tmp_path / "out")
    report = verify(checkpoint, tmp_path / "out", logits=False)
    assert not report.identical
    assert says in report.chat[0]


def test_verify_explains_a_template_that_no_training_recorded(tuned: Path, tmp_path: Path) -> None:
    import_hf(tuned / "hf", tmp_path / "nemo")
    export_hf(tmp_path / "nemo", tmp_path / "out", chat_template="chatml")
    report = verify(tmp_path / "nemo", tmp_path / "out", logits=False)
    assert report.identical
    assert report.chat_template is None
    assert "has another chat template than the base of" in report.warnings[0]
    assert verify(tmp_path / "nemo", tuned / "hf", logits=False).warnings == ()


def test_chat_and_serve_take_the_checkpoint_as_it_is(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [sys.executable, "-m", "nemo_cpt.cli", "chat", str(checkpoint), "--temperature", "0", "--device", "cpu"]
    done = subprocess.run(command, input="日本の首都は？\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "東京です。"

    said: list[str] = []
    engine = open_engine(checkpoint, say=said.append, device="cpu")  # what serve opens
    assert "its export is in the cache" in said[0]
    ((_, reply),) = engine.generate([[{"role": "user", "content": "What is 2 + 3?"}]], Sampling(temperature=0))
    assert (reply.text, reply.finish_reason) == ("It is 5.", "stop")


def test_the_cache_tells_one_template_from_another(checkpoint: Path, tmp_path: Path) -> None:
    from nemo_cpt.inference.models import _content_key

    nemo = shutil.copytree(checkpoint, tmp_path / "nemo")
    assert _content_key(nemo, None) == _content_key(checkpoint, None)
    record(nemo, None)
    assert _content_key(nemo, None) != _content_key(checkpoint, None)


def test_an_adapter_says_that_it_carries_no_template(nemo_jobs: Path, tuned: Path, tmp_path: Path) -> None:
    (last,) = (nemo_jobs / "runs" / "lora" / "checkpoints").glob("*-last")
    nemo = shutil.copytree(last, tmp_path / "nemo")
    record(nemo, {"name": "words", "sha256": "", "text": "", "stop": ["t2", 2], "tokens": {"t2": 2}})
    (warning,) = export_hf(nemo, tmp_path / "adapter", adapter=True).warnings
    assert "tuned on the chat template words, which an adapter does not carry, and ends its answers with t2" in warning
    with pytest.raises(CptError, match="An adapter for peft carries no chat template"):
        export_hf(nemo, tmp_path / "out", adapter=True, chat_template="chatml")


def test_a_checkpoint_of_plain_nemo_has_no_record(nemo_jobs: Path, tmp_path: Path) -> None:
    (last,) = (nemo_jobs / "runs" / "full" / "checkpoints").glob("*-last")
    assert instruction_template(last) is None
    assert export_hf(last, tmp_path / "out").chat_template is None
