"""Conversations prepared from every kind of file, and what happens with those that cannot be used."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_cpt.conversations import inspect_conversations, open_conversations, prepare
from nemo_cpt.corpus import read_manifest
from nemo_cpt.errors import CptError
from tests.conversations.helpers import pairs, same_sets, turns, write_lines
from tests.support.tokenizers import write_config


def make(inputs: Any, folder: Path, tokenizer: Path, **options: Any) -> Any:
    return prepare(inputs, folder / "set", tokenizer, **({"template": "chatml", "quiet": True, "workers": 2} | options))


def as_plain(folder: Path, values: list[Any]) -> Path:
    return write_lines(folder / "chats.jsonl", values)


def as_gzip(folder: Path, values: list[Any]) -> Path:
    path = folder / "chats.jsonl.gz"
    path.write_bytes(gzip.compress(as_plain(folder, values).read_bytes()))
    return path


def as_zstd(folder: Path, values: list[Any]) -> Path:
    import zstandard

    path = folder / "chats.jsonl.zst"
    path.write_bytes(zstandard.compress(as_plain(folder, values).read_bytes()))
    return path


def as_array(folder: Path, values: list[Any]) -> Path:
    path = folder / "chats.json"
    path.write_text(json.dumps(values, indent=1))
    return path


def as_parquet(folder: Path, values: list[Any]) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    path = folder / "chats.parquet"
    parquet.write_table(pa.Table.from_pylist(values), path)
    return path


def as_dataset(folder: Path, values: list[Any]) -> Path:
    import datasets

    datasets.Dataset.from_list(values).save_to_disk(str(folder / "saved"))
    return folder / "saved"


CHATS: list[dict[str, Any]] = [{"messages": turns(f"質問{i}", f"答え{i}", "続き", "はい")} for i in range(300)]
CHATS[7]["messages"][1]["train"] = False
CHATS[8]["messages"][3]["weight"] = 0


class TestInputs:
    @pytest.fixture(scope="class")
    def expected(self, tmp_path_factory: pytest.TempPathFactory, small: Path) -> str:
        folder = tmp_path_factory.mktemp("expected")
        return make(as_plain(folder, CHATS), folder, small).prefix

    @pytest.mark.parametrize("write", [as_gzip, as_zstd, as_array, as_parquet, as_dataset])
    def test_every_kind_of_file_gives_the_same(
        self, write: Callable[[Path, list[Any]], Path], expected: str, tmp_path: Path, small: Path
    ) -> None:
        report = make(write(tmp_path, CHATS), tmp_path, small)
        assert same_sets(report.prefix, expected)
        assert (report.conversations, report.answers, report.forms) == (300, 598, {"messages": 300})

    @pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 3, "chunk_bytes": 500}, {"fast": False}])
    def test_workers_and_portions_change_nothing(
        self, options: dict[str, Any], expected: str, tmp_path: Path, small: Path
    ) -> None:
        assert same_sets(make(as_plain(tmp_path, CHATS), tmp_path, small, **options).prefix, expected)


def test_forms_may_be_mixed_and_are_counted(tmp_path: Path, small: Path) -> None:
    values = [*pairs(3), {"instruction": "q", "output": "a"}, {"messages": turns("q", "a")}]
    report = make(write_lines(tmp_path / "chats.jsonl", values), tmp_path, small)
    assert report.forms == {"query/answer": 3, "alpaca": 1, "messages": 1}


def test_a_named_form_is_held_to(tmp_path: Path, small: Path) -> None:
    chats = write_lines(tmp_path / "chats.jsonl", [{"query": "q", "answer": "a", "messages": turns("m", "n")}])
    with pytest.raises(CptError, match="fits the forms messages and query/answer; name the one that you mean"):
        make(chats, tmp_path, small)
    assert make(chats, tmp_path, small, form="query/answer").forms == {"query/answer": 1}


def test_the_manifest_says_what_it_was_made_of(tmp_path: Path, small: Path) -> None:
    make(as_plain(tmp_path, pairs(5)), tmp_path, small, system="簡潔に。", template="alpaca-ja")
    manifest = read_manifest(tmp_path / "set_conversations")
    assert manifest["kind"] == "conversations"
    assert manifest["options"]["system"] == "簡潔に。"
    template = manifest["template"]
    assert template["name"] == "alpaca-ja"
    assert template["stop"][0] == "<|endoftext|>"
    assert template["tokens"] == {"<|endoftext|>": template["stop"][1]}
    assert "以下に、あるタスクを説明する指示があります。" in template["text"]  # no mojibake
    assert manifest["inputs"][0]["hash"]
    assert manifest["tokenizer"]["sha256"]


class TestBadInput:
    LINES: dict[str, tuple[str, str, str]] = {  # noqa: RUF012
        "not JSON": ('{"query": "q", "answer"', "not_json", "not JSON"),
        "an unknown form": ('{"text": "t"}', "unknown_form", "no form of conversation that is known: it has 'text'"),
        "an empty answer": ('{"query": "q", "answer": ""}', "empty_answer", "'answer' is empty"),
        "roles out of order": (
            json.dumps({"messages": [*turns("q"), *turns("q", "a")]}),
            "roles",
            "message 1 is user's where assistant's turn is",
        ),
        "a tool": ('{"messages": [{"role": "tool", "content": "x"}]}', "tools", "conversations with tools are not"),
        "nothing to train on": (
            json.dumps({"messages": [*turns("q"), {"role": "assistant", "content": "a", "train": False}]}),
            "nothing_to_train",
            "no answer in it is to be trained on",
        ),
        "a special token": ('{"query": "q<|im_end|>", "answer": "a"}', "special_token", r"special token <\|im_end\|>"),
        "a number": ('{"query": 7, "answer": "a"}', "not_a_string", "'query' is a int"),
        "a surrogate": (r'{"query": "q", "answer": "\ud800"}', "lone_surrogate", r"U\+D800"),
    }

    @pytest.mark.parametrize("case", LINES)
    def test_file_line_and_reason_and_nothing_half_written(self, case: str, tmp_path: Path, small: Path) -> None:
        line, _, detail = self.LINES[case]
        chats = as_plain(tmp_path, pairs(2))
        chats.write_text(chats.read_text("utf-8") + line + "\n", "utf-8")
        with pytest.raises(CptError, match=rf"chats.jsonl, line 3, byte offset \d+: .*{detail}"):
            make(chats, tmp_path / "out", small)
        assert not (tmp_path / "out").exists()

    def test_what_is_skipped_is_counted_and_listed(self, tmp_path: Path, small: Path) -> None:
        chats = as_plain(tmp_path, pairs(20))
        bad = [line for line, _, _ in self.LINES.values()]
        chats.write_text(chats.read_text("utf-8") + "\n".join(bad) + "\n", "utf-8")
        with pytest.raises(CptError, match=r"9 of 29 lines"):
            make(chats, tmp_path, small, on_error="skip")
        report = make(chats, tmp_path, small, on_error="skip", max_skipped=0.8, overwrite=True)
        assert report.conversations == 20
        assert report.skipped == {reason: 1 for _, reason, _ in self.LINES.values()}
        skipped = [json.loads(line) for line in Path(report.prefix + ".skipped.jsonl").read_text("utf-8").splitlines()]
        assert [(entry["line"], entry["reason"]) for entry in skipped] == [
            (21 + i, reason) for i, (_, reason, _) in enumerate(self.LINES.values())
        ]
        assert "9 lines were left out" in report.warnings[0]

    def test_rows_have_numbers_too(self, tmp_path: Path, small: Path) -> None:
        chats = as_parquet(tmp_path, [*pairs(3), {"query": "q", "answer": None}])
        with pytest.raises(CptError, match="line 4, row 3: 'answer' is missing or null, not a string"):
            make(chats, tmp_path, small)

    def test_a_file_without_conversations(self, tmp_path: Path, small: Path) -> None:
        (tmp_path / "chats.jsonl").write_text("\n\n")
        with pytest.raises(CptError, match=r"chats.jsonl"):
            make(tmp_path / "chats.jsonl", tmp_path / "out", small)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"form": "vicuna"}, "no form 'vicuna'"),
            ({"train_on": "user"}, "train_on is 'user'; it can be assistant, last, all"),
            ({"template": "vicuna"}, "no template 'vicuna'"),
            ({"template": "llama3"}, "Take a template of plain text"),
            ({"template": "tokenizer"}, "has no chat template"),
            ({"seq_length": 0}, "seq_length is 0"),
            ({"too_long": "split"}, "too_long is 'split'; it can be drop or cut"),
            ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ],
    )
    def test_options_that_cannot_be_used(
        self, options: dict[str, Any], message: str, tmp_path: Path, small: Path
    ) -> None:
        with pytest.raises(CptError, match=message):
            make(as_plain(tmp_path, pairs(2)), tmp_path / "out", small, **options)
        assert not (tmp_path / "out").exists()


class TestNothingStale:
    def test_the_same_job_is_left_alone(self, tmp_path: Path, small: Path) -> None:
        chats = as_plain(tmp_path, pairs(5))
        first = make(chats, tmp_path, small)
        again = make(chats, tmp_path, small)
        assert (first.status, again.status) == ("written", "unchanged")
        assert again.conversations == 5
        assert again.rates == {}

    def test_another_length_is_the_same_set(self, tmp_path: Path, small: Path) -> None:
        chats = as_plain(tmp_path, pairs(20))
        assert make(chats, tmp_path, small, seq_length=4096).fitting.sequences == 1
        again = make(chats, tmp_path, small, seq_length=128)
        assert again.status == "unchanged"
        assert again.fitting.sequences > 5

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            ({"template": "alpaca-ja"}, "template_sha256"),
            ({"train_on": "last"}, "train_on"),
            ({"system": "s"}, "system"),
            ({"form": "query/answer"}, "form"),
        ],
    )
    def test_another_job_is_refused(self, change: dict[str, Any], what: str, tmp_path: Path, small: Path) -> None:
        chats = as_plain(tmp_path, pairs(5))
        make(chats, tmp_path, small)
        with pytest.raises(CptError, match=rf"is not what this job would write: its {what} is"):
            make(chats, tmp_path, small, **change)
        assert make(chats, tmp_path, small, **change, overwrite=True).status == "written"

    def test_changed_data_and_a_changed_template_are_noticed(self, tmp_path: Path, small: Path) -> None:
        template = tmp_path / "mine.jinja"
        text = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        template.write_text(text)
        chats = as_plain(tmp_path, pairs(5))
        make(chats, tmp_path, small, template=str(template))
        template.write_text(text + "\n")
        with pytest.raises(CptError, match="its template_sha256 is"):
            make(chats, tmp_path, small, template=str(template))
        template.write_text(text)
        write_lines(chats, pairs(5, start=1))
        with pytest.raises(CptError, match=r"chats.jsonl"):
            make(chats, tmp_path, small, template=str(template))

    def test_another_end_of_answers_in_the_tokenizers_settings_is_noticed(self, tmp_path: Path, small: Path) -> None:
        tokenizer = shutil.copytree(small, tmp_path / "tokenizer")
        chats, broken = as_plain(tmp_path, pairs(20)), tmp_path / "broken.jsonl"
        make(chats, tmp_path, tokenizer, template="alpaca-ja")
        broken.write_text(chats.read_text("utf-8") + "no JSON\n", "utf-8")
        for _ in range(2):  # the second run goes on with what the first one began
            with pytest.raises(CptError, match=r"line 21, .*The next run goes on after"):
                make(broken, tmp_path / "begun", tokenizer, template="alpaca-ja", chunk_bytes=500)
        write_config(tokenizer, eos_token="<|im_end|>")
        with pytest.raises(CptError, match="is not what this job would write: its template's stop is"):
            make(chats, tmp_path, tokenizer, template="alpaca-ja")
        with pytest.raises(CptError, match="belongs to an unfinished job that differs in stop, tokens"):
            make(broken, tmp_path / "begun", tokenizer, template="alpaca-ja", chunk_bytes=500)
        # A template that does not use it gives the same tokens as before.
        write_config(tokenizer, eos_token="<|endoftext|>")
        (tmp_path / "other").mkdir()
        make(chats, tmp_path / "other", tokenizer)
        write_config(tokenizer, eos_token="<|im_end|>")
        assert make(chats, tmp_path / "other", tokenizer).status == "unchanged"

    def test_a_mask_that_is_gone_is_noticed(self, tmp_path: Path, small: Path) -> None:
        chats = as_plain(tmp_path, pairs(5))
        make(chats, tmp_path, small)
        (tmp_path / "set_conversations.mask").unlink()
        with pytest.raises(
            CptError, match=r"There is no .*\.mask\. Restore it; or `nemo-cpt prepare` with --overwrite"
        ):
            make(chats, tmp_path, small)


def test_thoughts_beside_the_content_are_warned_of(tmp_path: Path, small: Path) -> None:
    thought = [turns("q")[0], {"role": "assistant", "content": "a", "reasoning_content": "Hm."}]
    chats = as_plain(tmp_path, [{"messages": each} for each in (thought, turns("q", "b"), turns("q", "c"))])
    for report in (make(chats, tmp_path, small), make(chats, tmp_path, small)):  # written, and there already
        assert [warning[:48] for warning in report.warnings] == ["1 conversations have 'reasoning_content' beside "]


def test_training_on_everything_is_warned_about(tmp_path: Path, small: Path) -> None:
    report = make(as_plain(tmp_path, pairs(5)), tmp_path, small, train_on="all")
    assert report.trained == report.tokens
    assert report.answers == inspect_conversations(report.prefix).answers == 5  # not what lies between them, too
    assert "100.0 % of the tokens are trained on: the questions seem to be among them" in report.warnings[0]


def test_what_is_too_long_is_counted(tmp_path: Path, small: Path) -> None:
    chats = as_plain(
        tmp_path, [*pairs(5), {"query": "長い" * 500, "answer": "a"}, {"query": "q", "answer": "長" * 500}]
    )
    dropped = make(chats, tmp_path, small, seq_length=400)
    assert (dropped.fitting.too_long, dropped.fitting.left_out) == (2, 2)
    assert (
        "2 conversations do not fit into 400 positions; in a training of that seq_length they are left out"
        in (dropped.warnings[0])
    )
    cut = make(chats, tmp_path, small, seq_length=400, too_long="cut")
    assert (cut.fitting.too_long, cut.fitting.left_out) == (2, 1)  # of one, no answer begins in time
    assert cut.status == "unchanged"
    assert len(open_conversations(tmp_path / "set")) == 7
