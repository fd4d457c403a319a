"""`nemo-cpt evaluate`: tables, reports, resumption, and what is refused."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_cpt import page
from nemo_cpt.corpus.reading.chunks import hash_file
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation import comparison, evaluate, report
from nemo_cpt.evaluation.bits_per_byte import TextLoss
from nemo_cpt.evaluation.candidates import Candidate, described, warnings_of
from nemo_cpt.evaluation.journal import Journal, key_of
from nemo_cpt.evaluation.reading import prompt_set
from nemo_cpt.inference.endpoint import EndpointEngine
from nemo_cpt.inference.transformers_engine import TransformersEngine
from tests.inference.conftest import TEMPLATE
from tests.support import browser
from tests.support.chat_server import NAME, Body, ChatServer, FaultError
from tests.support.crashes import FORK

QUESTIONS = [
    {"prompt": "日本の首都は?", "answer": ["東京", "東京都"]},
    {"query": "富士山の高さは?", "answer": "3776メートル"},
    {"question": "猫は何と鳴きますか?", "id": "cat", "answer": "にゃあ"},
    {"prompt": "今日は良い天気ですね。", "answer": "はい"},
]


@pytest.fixture(scope="module")
def models(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base, and the same a little changed; both of a short context."""
    folder = tmp_path_factory.mktemp("models")
    for name, noise in (("base", 0.0), ("result", 0.02)):
        network = AutoModelForCausalLM.from_pretrained(world / "base_hf")
        network.config.max_position_embeddings = 512
        torch.manual_seed(1)
        for parameter in network.parameters():
            parameter.data += noise * torch.randn_like(parameter)
        network.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(world / "base_hf").save_pretrained(folder / name)
    return folder / "base", folder / "result"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "ja.jsonl"
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in QUESTIONS))
    return path


def evaluated(
    models: tuple[Path, Path], world: Path, questions: Path, output: Path, **options: Any
) -> comparison.Report:
    given = {
        "against": models[0],
        "losses": [f"ja={world / 'ja_validation.jsonl'}"],
        "prompts": [str(questions)],
        "max_tokens": 8,
        "device": "cpu",
        "quiet": True,
    }
    return evaluate(models[1], output, **given | options)


@pytest.fixture(scope="module")
def whole(
    models: tuple[Path, Path], world: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> comparison.Report:
    return evaluated(models, world, prompts, tmp_path_factory.mktemp("whole"))


def texts(found: comparison.Report) -> list[str]:
    return [reply["text"] for each in found.replies for reply in each["replies"].values()]


def test_the_table(whole: comparison.Report) -> None:
    rows = {(row.group, row.measure): row for row in whole.rows}
    bits = rows["ja", "bits per byte"]
    assert bits.before is not None
    assert bits.difference == pytest.approx(bits.after - bits.before)
    assert bits.low < bits.difference < bits.high
    assert bits.note == "first token: <|begin_of_text|> (0), once before each document"
    assert rows["ja (none)", "replies in ja, %"].note.startswith("ja: ")
    for name in ("exact match, %", "character F1, %", "ROUGE-L, %", "BLEU", "chrF", "length, characters"):
        assert ("ja (none)", name) in rows
    assert "tok:ja-mecab" in rows["ja (none)", "BLEU"].note
    assert rows["ja (none)", "latency, p95, s"].low is None  # replies of one batch are not independent


def test_the_replies_are_the_engines(whole: comparison.Report, models: tuple[Path, Path]) -> None:
    engine = TransformersEngine(models[1], device="cpu")
    wanted = dict(engine.generate([each.get("prompt") or each.get("query") or each["question"] for each in QUESTIONS],
                                  comparison.Sampling(max_tokens=8)))  # fmt: skip
    assert [each["replies"]["after"]["text"] for each in whole.replies] == [wanted[at].text for at in range(4)]
    assert [each["id"] for each in whole.replies] == ["1", "2", "cat", "4"]
    assert whole.replies[0]["answers"] == ("東京", "東京都")


def test_the_report_is_whole_and_opens_offline(whole: comparison.Report, tmp_path: Path) -> None:
    whole.replies[0]["replies"]["after"]["text"] = "</script><script>alert(1)</script>"
    paths = report.write(whole, tmp_path)
    assert sorted(path.name for path in paths) == ["report.html", "report.json", "report.png"]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<script>") == 1
    assert "data:image/png;base64," in page
    assert not any(outside in page for outside in ('src="http', 'href="', "@import", "url("))
    assert all(each["prompt"] in page for each in whole.replies)
    content = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert content["settings"]["sampling"]["temperature"] == 0
    assert content["versions"]["transformers"]
    assert [each["label"] for each in content["models"]] == ["before", "after"]
    assert all(each["key"] for each in content["models"])
    assert content["sets"][0]["unit"] == "document"
    assert content["rows"][0]["verdict"] in ("", "better", "worse")


SEARCH = """
const box = document.getElementById('search'), shown = () => [...document.querySelectorAll('#replies tbody tr')]
    .filter(row => !row.hidden).length, before = shown();
box.value = '%s'; box.dispatchEvent(new Event('input'));
return [before, shown(), document.getElementById('count').textContent]
"""


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_shows_the_page_and_its_box_finds_replies(
    whole: comparison.Report, tmp_path: Path, width: int
) -> None:
    report.write(whole, tmp_path)
    seen = browser.see(tmp_path / "report.html", width, tmp_path, SEARCH % "富士山")
    assert (seen.errors, seen.overflows, seen.images) == ([], False, True)
    assert seen.answer == [4, 1, "1 of 4"]


def test_a_loss_by_the_token_is_no_verdict_on_models_of_other_tokens() -> None:
    """The grown model needs fewer bits for the text, and has fewer tokens: each of them is harder to predict."""
    base = TextLoss("document", [30.0, 33.0, 27.0], [10, 11, 9], [40, 44, 36], "")
    grown = TextLoss("document", [24.0, 26.4, 21.6], [6, 7, 5], [40, 44, 36], "")
    better = TextLoss("document", [24.0, 26.4, 21.6], [10, 11, 9], [40, 44, 36], "")
    for after, verdicts in ((grown, ["better", "", ""]), (better, ["better", "better", "better"])):
        rows = list(comparison._rows([comparison.Measured({"ja": each}) for each in (base, after)], [], 0))
        assert [(row.measure.partition(",")[0], row.verdict) for row in rows] == list(
            zip(("bits per byte", "loss", "perplexity"), verdicts, strict=True)
        )
    assert rows[1].note == ""


def test_numbers_that_json_cannot_hold(whole: comparison.Report) -> None:
    assert page.finite({"a": [float("nan"), float("inf"), 1.5]}) == {"a": [None, None, 1.5]}
    assert report._number(None) == ""
    numbers = (0.0, 1.2345, 12.345, 1234.56, -0.0004321, 0.1 - 1e-9, 1e-15)
    shown = ["0.000", "1.234", "12.35", "1,234.6", "-0.00043", "0.100", "0.000000000"]
    assert list(map(report._number, numbers)) == shown


def killed_at(record: int, action: Callable[[], object]) -> int | None:
    """Run in a process of its own that is killed when the journal has kept so many records."""

    def job() -> None:
        kept = Journal.keep
        done = 0

        def keep(self: Journal, key: str, value: dict[str, Any]) -> None:
            nonlocal done
            kept(self, key, value)
            done += 1
            if done == record:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.keep = keep  # type: ignore[method-assign]
        action()

    process = FORK.Process(target=job)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("record", [1, 3, 7])
def test_a_killed_evaluation_goes_on(
    models: tuple[Path, Path], world: Path, prompts: Path, tmp_path: Path, whole: comparison.Report, record: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert killed_at(record, lambda: evaluated(models, world, prompts, tmp_path)) == -signal.SIGKILL
    journal = tmp_path / comparison.JOURNAL
    with journal.open("ab") as file:
        file.write(b'{"key": "torn')
    kept: list[str] = []
    keep = Journal.keep
    monkeypatch.setattr(Journal, "keep", lambda self, key, value: (kept.append(key), keep(self, key, value)))
    found = evaluated(models, world, prompts, tmp_path)
    assert len(kept) == 2 * (1 + len(QUESTIONS)) - record
    assert [(row.before, row.after, row.low) for row in found.rows if row.low is not None] == [
        (row.before, row.after, row.low) for row in whole.rows if row.low is not None
    ]


def test_a_finished_one_loads_nothing(
    models: tuple[Path, Path], world: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluated(models, world, prompts, tmp_path)
    monkeypatch.setattr("nemo_cpt.evaluation.candidates.open_engine", None)
    assert texts(evaluated(models, world, prompts, tmp_path)) == texts(first)


def test_what_changed_is_asked_again(
    models: tuple[Path, Path], world: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(models, world, prompts, tmp_path)
    changed = tmp_path / "ja.jsonl"
    changed.write_text(prompts.read_text("utf-8").replace("日本", "フランス"))
    kept: list[Any] = []
    keep = Journal.keep
    monkeypatch.setattr(Journal, "keep", lambda self, key, value: (kept.append(value), keep(self, key, value)))
    evaluated(models, world, changed, tmp_path)
    assert [value["prompt"] for value in kept] == ["フランスの首都は?"] * 2
    kept.clear()
    evaluated(models, world, changed, tmp_path, max_tokens=9)
    assert len(kept) == 2 * len(QUESTIONS)


def old_journal(path: Path) -> None:
    """As it was before records held in what they were computed."""
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    lines = [{**each, "key": each["asked"], "asked": None, "computed": None} for each in records]
    kept = [{name: value for name, value in line.items() if value is not None} for line in lines]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), "utf-8")


def test_what_was_computed_otherwise_is_measured_again_and_said(
    models: tuple[Path, Path], world: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    given = {"losses": [f"ja={world / 'ja_validation.jsonl'}"], "limit": 2, "max_tokens": 2, "say": said.append}
    first = evaluated(models, world, prompts, tmp_path, **given)
    assert {(each["device"], each["precision"]) for each in first.models} == {("cpu", "float32")}
    assert not any("measured again" in line for line in said)
    with monkeypatch.context() as patched:
        patched.setattr("nemo_cpt.evaluation.candidates.open_engine", None)
        assert evaluated(models, world, prompts, tmp_path, **given).rows == first.rows
        with pytest.raises(TypeError, match="not callable"):  # nothing of the CPU's is taken for a GPU's
            evaluated(models, world, prompts, tmp_path, **given | {"device": "cuda:0"})
    precision = json.loads((models[0] / "config.json").read_text())["dtype"]
    assert said[-2:] == [
        f"before was measured in float32 on cpu: it is measured again, in {precision} on cuda (--device cpu takes what "
        "is there)",
        f"opening before: {models[0]}",
    ]
    old_journal(tmp_path / comparison.JOURNAL)
    held_out, window = hash_file(str(world / "ja_validation.jsonl")), first.settings["window"]
    older = {key_of("loss", comparison.FORMAT, each["key"], held_out, (window, 2)) for each in first.models}
    lines = (tmp_path / comparison.JOURNAL).read_text("utf-8").splitlines()
    assert older <= {json.loads(line)["key"] for line in lines}
    said.clear()
    again = evaluated(models, world, prompts, tmp_path, **given)
    assert texts(again) == texts(first)
    told = [
        line
        for line in said
        if line.endswith("did not keep in which precision: it is measured again, in float32 on cpu")
    ]
    assert [line.split(",")[0] for line in told] == [
        f"an earlier version measured {each}" for each in ("before", "after")
    ]


def test_models_of_other_precisions_are_told(models: tuple[Path, Path], tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(models[1], half)
    config = json.loads((half / "config.json").read_text()) | {"dtype": "bfloat16"}
    (half / "config.json").write_text(json.dumps(config))
    for device, wanted in (("cuda:1", 1), ("cpu", 0)):
        candidates = [Candidate(each.name, str(each), {"device": device}) for each in (models[0], half)]
        found = [line for line in warnings_of(candidates) if "other precisions" in line]
        assert len(found) == wanted
        assert all(f"{models[0]} in float32 on cuda, {half} in bfloat16 on cuda" in line for line in found)
    assert str(TransformersEngine(half, device="cpu").arithmetic) == "float32 on cpu"
    with pytest.raises(CptError, match="device is 'gpu': give cpu, cuda"):
        Candidate("after", str(half), {"device": "gpu"}).arithmetic  # noqa: B018


def test_an_endpoint_is_asked_nothing_twice_and_that_is_said(prompts: Path, tmp_path: Path) -> None:
    said = list[str]()
    with ChatServer(answering("")) as server:
        for _ in range(2):
            evaluate(server.url, tmp_path, prompts=[str(prompts)], quiet=True, say=said.append)
        assert len(server.asked) == len(QUESTIONS)
    assert [line for line in said if "known by its name and address alone" in line] == [said[-1]]


def test_a_model_that_differs_in_one_number_is_another(tmp_path: Path) -> None:
    """A few trained rows of a large table: one model's numbers must not stand for the other's."""
    weights = bytearray(4 * 2**20)
    for name in ("one", "same", "other"):
        weights[2**21 + 2**18] = name == "other"
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    one, same, other = (Candidate("", str(tmp_path / name)).key for name in ("one", "same", "other"))
    assert one == same != other


def test_of_a_run_the_report_names_the_step_that_was_measured(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on, and its newest checkpoint is another when somebody reads that."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = tmp_path / "run/checkpoints/steps=4"
    shutil.copytree(world / "base", checkpoint)
    (checkpoint / "run.json").write_text('{"step": 4}')
    measured = Candidate("after", str(tmp_path / "run"))
    assert described(measured)["model"] == f"{tmp_path}/run at step 4"
    assert described(Candidate("after", str(checkpoint)))["model"] == str(checkpoint)
    checkpoint.rename(checkpoint.with_name("steps=5"))
    assert measured.name == f"{tmp_path}/run at step 4"


def test_two_at_once_are_refused(models: tuple[Path, Path], world: Path, prompts: Path, tmp_path: Path) -> None:
    with Journal(tmp_path / comparison.JOURNAL), pytest.raises(CptError, match="Another process"):
        evaluated(models, world, prompts, tmp_path)


def test_a_broken_export_shows(models: tuple[Path, Path], world: Path, prompts: Path, tmp_path: Path) -> None:
    """The chat template removed, another end token: the report says both."""
    paths = [_copied(model, tmp_path / model.name) for model in models]
    (paths[0] / "chat_template.jinja").write_text(TEMPLATE)
    settings = json.loads((paths[1] / "generation_config.json").read_text())
    (paths[1] / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [7]}))
    found = evaluated((paths[0], paths[1]), world, prompts, tmp_path / "out", losses=[])
    assert any("result has no chat template" in each for each in found.warnings)
    assert any("with [7]" in each for each in found.warnings)
    assert found.settings["wrappers"] == ["none"]


def test_messages_and_wrappers(models: tuple[Path, Path], world: Path, tmp_path: Path) -> None:
    paths = [_copied(model, tmp_path / model.name) for model in models]
    for path in paths:
        (path / "chat_template.jinja").write_text(TEMPLATE)
    prompts = tmp_path / "talk.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "hi"}], "language": "en"}\n{"prompt": "hello"}\n')
    given = {"losses": [], "wrappers": ["none", "system", "chat"], "language": "en", "max_tokens": 4}
    found = evaluated((paths[0], paths[1]), world, prompts, tmp_path / "out", **given)
    assert [(each["wrapper"], each["id"]) for each in found.replies] == [
        (wrapper, name) for wrapper in ("none", "system", "chat") for name in ("1", "2")
    ]
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "out" / comparison.JOURNAL).read_text().splitlines()]
    assert "hello" in asked
    assert [{"role": "user", "content": "hello"}] in asked
    assert any(isinstance(each, list) and each[0]["role"] == "system" for each in asked)


def _copied(source: Path, dest: Path) -> Path:
    return Path(shutil.copytree(source, dest))


def test_a_prompts_file_whose_path_has_an_equals_sign(tmp_path: Path) -> None:
    folder = tmp_path / "language=ja"
    folder.mkdir()
    (folder / "ja.jsonl").write_text('{"prompt": "京都とは?"}\n')
    alone, named = prompt_set(f"{folder}/ja.jsonl"), prompt_set(f"mine={folder}/ja.jsonl")
    assert (alone.name, named.name) == ("ja", "mine")
    assert alone.prompts[0].language == "ja"


def test_bad_prompts(models: tuple[Path, Path], world: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    for content, message in (
        ("", "bad.jsonl is empty"),
        ("\n\n", "bad.jsonl is empty"),
        ('{"prompt": "a"}\n{"text": "b"}\n', r"line 2: one of prompt, query, question, messages is wanted"),
        ('{"prompt": "a", "query": "b"}\n', r"line 1: one of .* it has 'prompt' and 'query'"),
        ('{"prompt": ""}\n', r"line 1: 'prompt' is '', not a text"),
        ('{"prompt": 3}\n', r"line 1: 'prompt' is 3, not a text"),
        ("nonsense\n", r"line 1: not JSON"),
        ('["a"]\n', r"line 1: a JSON list, not an object"),
        ('{"prompt": "a", "language": "tlh"}\n', r"line 1: language is 'tlh'; known are ja, "),
        ('{"prompt": "a", "language": ["ja"]}\n', r"line 1: language is \['ja'\]; known are ja, "),
        ('{"messages": [{"role": "user"}]}\n', r"line 1: messages\[0\] has content of type NoneType"),
        ('{"messages": "hi"}\n', r"line 1: 'messages' is no list"),
        ('{"prompt": "\\ud800"}\n', r"lone surrogate"),
    ):
        path.write_text(content)
        with pytest.raises(CptError, match=message):
            evaluated(models, world, path, tmp_path / "out", losses=[])


def refusals(world: Path, prompts: Path, tmp_path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    messages = tmp_path / "messages.jsonl"
    messages.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    yield {"prompts": [str(messages)]}, r"messages has messages, and .* has no chat template"
    yield {"wrappers": ["chat"]}, r"has no chat template: ask it with --wrapper none"
    yield {"wrappers": ["shout"]}, r"no wrapper 'shout'; there are none, system, chat"
    yield {"prompts": [f"any={prompts}"], "wrappers": ["system"]}, r"any does not say its language"
    yield {"language": "tlh"}, r"language is 'tlh'; known are ja"
    yield {"prompts": [str(prompts), str(prompts)]}, r"two sets are named 'ja'"
    yield {"prompts": [str(tmp_path / "no.jsonl")]}, r"no\.jsonl"
    yield {"losses": ["ja"]}, r"a set is given as NAME=PATH"
    yield {"losses": [f"ja={tmp_path}/no.jsonl"]}, r"there is no file .*no\.jsonl"
    yield {"losses": [f"ja={tmp_path}/no"]}, r"There is no .*no_text_document\.idx"
    yield {"losses": [f"ja={world}/ds/ja_validation"] * 2}, r"two sets are named 'ja'"
    yield {"max_tokens": 0}, r"max_tokens 0"
    yield {"limit": 0}, r"limit 0"
    yield {"seed": -1}, r"seed is -1"
    yield {"against": tmp_path / "nobody"}, r"there is no model at .*nobody"
    yield {"prompts": [], "wrappers": ["none"]}, r"wrapper is set, and nothing that is to be evaluated uses it"
    yield {"judge_key": "secret"}, r"judge_key is set, and nothing"
    yield {"api_key": "secret"}, r"api_key is set, and nothing"
    yield {"checkpoints_of": tmp_path}, r"name either a model to evaluate, or a run"


def test_refused_before_anything_is_loaded(
    models: tuple[Path, Path], world: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_cpt.evaluation.candidates.open_engine", None)
    for options, message in refusals(world, prompts, tmp_path):
        with pytest.raises(CptError, match=message):
            evaluated(models, world, prompts, tmp_path / "out", **options)


def test_what_is_no_run_has_no_checkpoints_to_evaluate(models: tuple[Path, Path], tmp_path: Path) -> None:
    for place, message in (
        (tmp_path / "nowhere", r"there is no run .*nowhere; `nemo-cpt ls` lists runs"),
        (models[0], r"is no run's folder: it has no folder checkpoints"),
    ):
        with pytest.raises(CptError, match=message):
            evaluate(None, tmp_path / "out", checkpoints_of=place)


def test_a_set_of_another_tokenizer_is_refused(
    models: tuple[Path, Path], world: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_cpt.evaluation.candidates.open_engine", None)
    other = _copied(models[1], tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(CptError, match=r"which is not the base's \(512 tokens against 513\)"):
        evaluated((models[0], other), world, prompts, tmp_path / "out", losses=[f"ja={world}/ds/ja_validation"])


def test_nothing_named_and_nothing_known(models: tuple[Path, Path], tmp_path: Path) -> None:
    said: list[str] = []
    found = evaluate(models[1], tmp_path, limit=2, max_tokens=4, device="cpu", quiet=True, say=said.append)
    assert any("nothing says which sets" in line for line in said)
    assert [each["set"] for each in found.replies] == ["ja", "ja"]
    assert all(row.before is None for row in found.rows)


def test_the_command(models: tuple[Path, Path], prompts: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nemo_cpt.cli", "evaluate", str(models[1]), "--prompts", str(prompts),
               "--max-tokens", "4", "--output", str(tmp_path), "--device", "cpu"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split("\t")[:4] == ["set", "measure", "before", "after"]
    assert "exact match" in done.stdout
    assert "written: " in done.stderr
    again = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert json.loads(again.stdout)["rows"][0]["group"] == "ja (none)"
    wrong = subprocess.run([*command[:5], "--prompts", "nowhere.jsonl"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "nowhere.jsonl" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def answering(name: str) -> Callable[[Body, int], str]:
    return lambda body, number: f"{name}{body['messages'][-1]['content']}"


def test_endpoints_and_a_judge(tmp_path: Path) -> None:
    """Two models behind endpoints, and a judge that likes what begins with GOOD; the questions are those that ship."""

    def judging(body: Body, number: int) -> str:
        shown = body["messages"][1]["content"]
        if "two AI assistants" in body["messages"][0]["content"]:
            return "[[A]]" if shown.index("GOOD") < shown.index("BAD") else "[[B]]"
        return "[[9]]" if "GOOD" in shown else "[[3]]"

    said = list[tuple[str, int]]()
    with ChatServer(answering("BAD ")) as before, ChatServer(answering("GOOD ")) as after, ChatServer(judging) as judge:
        found = evaluate(
            f"{after.url}#{NAME}", tmp_path, against=before.url, prompts=["ja"], judge=judge.url, limit=2, quiet=True,
            say=lambda line: said.append((line, sum(len(each.asked) for each in (before, after, judge)))),
        )  # fmt: skip
    ((cost, asked),) = [each for each in said if "if every answer is of full length" in each[0]]
    assert "8 answers and 16 verdicts to ask for; the judge reads about " in cost
    assert asked == 0, "it is said before anything is asked"
    rows = {(row.group, row.measure): row for row in found.rows}
    score = rows["judge", "score, of 10"]
    assert (score.before, score.after, score.verdict) == (3, 9, "better")
    assert found.judged is not None
    assert found.settings["wrappers"] == ["chat"]
    assert all(each["replies"]["after"]["text"].startswith("GOOD ") for each in found.replies)
    report.write(found, tmp_path)
    assert "The judge" in (tmp_path / "report.html").read_text("utf-8")


def test_an_endpoint_that_fails_loses_nothing(
    models: tuple[Path, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down_after_two(body: Body, number: int) -> str:
        if number > 2:
            raise FaultError("400")
        return "東京"

    defaults = inspect.unwrap(EndpointEngine.__init__).__kwdefaults__
    monkeypatch.setitem(defaults, "concurrency", 1)
    with ChatServer(down_after_two) as server, pytest.raises(CptError, match=r"answered 400: .*bad"):
        evaluate(server.url, tmp_path, prompts=[str(prompts)], quiet=True)
    kept = (tmp_path / comparison.JOURNAL).read_text().splitlines()
    assert len(kept) == 2


def test_an_endpoint_has_no_losses(world: Path, tmp_path: Path) -> None:
    with ChatServer(answering("")) as server, pytest.raises(CptError, match="is an endpoint, which gives no losses"):
        evaluate(server.url, tmp_path, losses=[f"ja={world}/ja_validation.jsonl"], quiet=True)
