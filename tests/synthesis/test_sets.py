"""Questions made from a corpus, by rules and by a model behind a server of OpenAI's protocol."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from nemo_cpt.conversations.forms import read_conversation
from nemo_cpt.corpus.reading.sources import list_sources
from nemo_cpt.errors import CptError
from nemo_cpt.synthesis.grounded import Filter, pairs_of
from nemo_cpt.synthesis.questions import Question
from nemo_cpt.synthesis.sets import synthesize
from tests.support.chat_server import Body, ChatServer, FaultError
from tests.support.corpus_helpers import write_jsonl

CORPUS = [str(files("nemo_cpt.demo") / "corpus" / f"{name}.jsonl") for name in ("ja", "en")]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def both_sets(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return lines(folder / "train.jsonl"), lines(folder / "validation.jsonl")


MODEL = {"endpoint": "http://localhost:1/v1", "model": "m", "licence": "x"}


class TestRules:
    def test_150_and_50_in_one_call(self, tmp_path: Path) -> None:
        report = synthesize(CORPUS, tmp_path / "chats")
        train, validation = both_sets(tmp_path / "chats")
        assert (len(train), len(validation)) == (150, 50)
        assert report.questions == {"train": 150, "validation": 50}
        assert report.generator == {"name": "rules"}
        assert sum(report.kinds.values()) == 200
        assert len({line["query"] for line in train + validation}) == 200
        assert not {line["document"] for line in train} & {line["document"] for line in validation}
        assert all(read_conversation(line).form == "query/answer" for line in train + validation)
        assert sorted(path.name for path in (tmp_path / "chats").iterdir()) == [
            "synthesis.json",
            "train.jsonl",
            "validation.jsonl",
        ]

    def test_the_folder_is_no_corpus_as_one_of_its_sets_is_held_out(self, tmp_path: Path) -> None:
        synthesize(CORPUS, tmp_path, train=3, validation=1)
        with pytest.raises(CptError, match=r"holds the sets of a synthesis.* Name the one that you mean"):
            list_sources(tmp_path)
        (tmp_path / "validation.jsonl").unlink()
        (tmp_path / "replies.jsonl").write_text('{"key": "1"}\n')  # as a model's are kept
        assert [Path(source.path).name for source in list_sources(tmp_path)] == ["train.jsonl"]

    def test_copies_of_a_document_give_questions_to_one_set(self, tmp_path: Path) -> None:
        texts = [line["text"] for line in lines(Path(CORPUS[0]))[:60]]
        texts += [text.replace("、", "､ ") for text in texts]
        corpus = write_jsonl(tmp_path / "twice.jsonl", texts)
        synthesize(corpus, tmp_path / "chats", train=40, validation=20)
        train, validation = both_sets(tmp_path / "chats")
        assert not {line["document"] % 60 for line in train} & {line["document"] % 60 for line in validation}

    def test_a_seed_makes_one_set_and_another_seed_another(self, tmp_path: Path) -> None:
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            synthesize(CORPUS, tmp_path / name, train=20, validation=5, seed=seed)
        one, same, other = (both_sets(tmp_path / name) for name in "abc")
        assert one == same != other

    def test_a_second_run_leaves_what_is_there_alone(self, tmp_path: Path) -> None:
        assert synthesize(CORPUS, tmp_path, train=9, validation=1).status == "written"
        before = (tmp_path / "train.jsonl").stat().st_mtime_ns
        again = synthesize(CORPUS, tmp_path, train=9, validation=1)
        assert again.status == "unchanged"
        assert again.questions == {"train": 9, "validation": 1}
        assert (tmp_path / "train.jsonl").stat().st_mtime_ns == before

    def test_a_job_that_failed_at_once_is_in_nobodys_way(self, tmp_path: Path) -> None:
        with pytest.raises(CptError, match="no key 'txt'"):
            synthesize(CORPUS, tmp_path / "chats", train=4, validation=2, json_key="txt", quiet=True)
        report = synthesize(CORPUS, tmp_path / "chats", train=4, validation=2, quiet=True)
        assert report.status == "written"

    def test_another_job_is_refused_and_replaced_when_asked(self, tmp_path: Path) -> None:
        synthesize(CORPUS, tmp_path, train=9, validation=1)
        with pytest.raises(CptError, match="made with another sets, seed"):
            synthesize(CORPUS, tmp_path, train=8, validation=1, seed=4)
        with pytest.raises(CptError, match="there were 2 inputs, now there are 1"):
            synthesize(CORPUS[0], tmp_path, train=9, validation=1)
        assert synthesize(CORPUS[0], tmp_path, train=8, validation=1, overwrite=True).questions["train"] == 8

    def test_what_is_not_its_own_is_not_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "train.jsonl").write_text("mine\n")
        with pytest.raises(CptError, match=r"train.jsonl is not of its making"):
            synthesize(CORPUS, tmp_path, train=9, validation=1)
        assert (tmp_path / "train.jsonl").read_text() == "mine\n"

    def test_a_set_that_was_edited_is_not_replaced(self, tmp_path: Path) -> None:
        synthesize(CORPUS, tmp_path, train=9, validation=1)
        with (tmp_path / "train.jsonl").open("a") as file:
            file.write('{"query": "q", "answer": "a"}\n')
        with pytest.raises(CptError, match=r"train.jsonl was changed since"):
            synthesize(CORPUS, tmp_path, train=9, validation=1)

    def test_templates_alone_need_no_corpus(self, tmp_path: Path) -> None:
        slots = tmp_path / "slots.json"
        slots.write_text(
            json.dumps(
                {
                    "templates": [{"query": "{city[name]}の人口は？", "answer": "約{city[people]}万人です。"}],
                    "slots": {"city": [{"name": f"町{i}", "people": i} for i in range(30)]},
                }
            )
        )
        report = synthesize(None, tmp_path / "chats", slots=slots, train=20, validation=10)
        train, validation = both_sets(tmp_path / "chats")
        assert report.kinds == {"slots": 30}
        assert not {line["query"] for line in train} & {line["query"] for line in validation}
        with pytest.raises(CptError, match="only 23 of the 25 questions for train, out of the slots' values"):
            synthesize(None, tmp_path / "more", slots=slots, train=25, validation=7)
        assert not (tmp_path / "more" / "train.jsonl").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"train": -1}, "train is -1"),
            ({"train": 0, "validation": 0}, "not all of them 0"),
            ({"kinds": ["riddle"]}, "kinds are riddle; they can be title"),
            ({"language": "tlh"}, "language is 'tlh'"),
            ({"train": 10_000}, "There are only .* out of 2 documents. Ask for fewer"),
            ({"model": "m"}, "no endpoint to ask"),
            ({"endpoint": "http://localhost:1/v1"}, "needs the model's name .* and the licence"),
            (MODEL | {"slots": "no.json"}, "slots are for questions that rules make, .* make two sets"),
            (MODEL | {"kinds": ["title"]}, "kinds are for questions that rules make, .* make two sets"),
            ({"slots": "no.json"}, "Cannot read no.json: No such file"),
            ({"json_key": "body"}, "no key 'body'"),
        ],
    )
    def test_what_cannot_be_done_is_said(self, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(CptError, match=message):
            synthesize(CORPUS, tmp_path / "chats", **options)
        assert not list(tmp_path.rglob("*.jsonl"))

    def test_nothing_to_make_them_of(self, tmp_path: Path) -> None:
        with pytest.raises(CptError, match="give a corpus, or templates"):
            synthesize(None, tmp_path)


def good_pairs(body: Body, number: int) -> str:
    """Two pairs of the passage's language, in a code fence as chatty models give them."""
    passage = body["messages"][-1]["content"]
    ja = "。" in passage
    tag = f"{hash(passage) % 10**9:09d}"
    pairs = [
        {
            "question": f"{tag}番の{what}とはどういうものですか。" if ja else f"What is {what} of number {tag}?",
            "answer": f"{what}とは{tag}に関することです。" if ja else f"It is what {tag} has to do with {what}.",
        }
        for what in (("理由", "仕組み") if ja else ("the reason", "the mechanism"))
    ]
    return f"Sure!\n```json\n{json.dumps(pairs, ensure_ascii=False)}\n```"


@pytest.fixture
def serve() -> Iterator[Callable[..., ChatServer]]:
    with ExitStack() as stack:
        yield lambda answer: stack.enter_context(ChatServer(answer))


def grounded(server: ChatServer, output: Path, **options: Any) -> Any:
    settings = {"model": "stand-in-8b", "licence": "Apache-2.0", "pairs": 2, "concurrency": 2, "quiet": True}
    return synthesize(CORPUS, output, endpoint=server.url, **(settings | {"train": 12, "validation": 4} | options))


class TestModel:
    def test_pairs_about_passages(
        self, serve: Callable[..., ChatServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NEMO_CPT_API_KEY", "a-key")
        server = serve(good_pairs)
        report = grounded(server, tmp_path / "chats")
        train, validation = both_sets(tmp_path / "chats")
        assert (len(train), len(validation)) == (12, 4)
        assert report.kinds == {"grounded": 16}
        assert report.generator == {"name": "stand-in-8b", "endpoint": server.url, "licence": "Apache-2.0"}
        assert not {line["document"] for line in train} & {line["document"] for line in validation}
        assert len(server.asked) == 8
        assert set(server.keys) == {"Bearer a-key"}
        assert {body["max_tokens"] for body in server.asked} == {None}  # the server's own limit holds
        assert "in Japanese" in str(server.asked)
        assert "in English" in str(server.asked)
        assert "a-key" not in "".join(path.read_text("utf-8") for path in (tmp_path / "chats").iterdir())

    def test_an_interrupted_run_asks_only_for_the_rest(
        self, serve: Callable[..., ChatServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reference = serve(good_pairs)
        grounded(reference, tmp_path / "undisturbed")

        def until_the_quota_ends(body: Body, number: int) -> str:
            if number > 4:
                raise FaultError("403")
            return good_pairs(body, number)

        failing = serve(until_the_quota_ends)
        with pytest.raises(CptError, match=r"answered 403: .*a key is taken from NEMO_CPT_API_KEY or OPENAI_API_KEY"):
            grounded(failing, tmp_path / "chats")
        assert not (tmp_path / "chats" / "train.jsonl").exists()
        kept = (tmp_path / "chats" / "replies.jsonl").read_bytes()
        assert kept.count(b"\n") == 4
        (tmp_path / "chats" / "replies.jsonl").write_bytes(kept + b'{"key": "torn')

        server = serve(good_pairs)
        monkeypatch.setattr("nemo_cpt.synthesis.sets.hide_credentials", lambda url: failing.url)
        grounded(server, tmp_path / "chats")
        assert len(server.asked) == len(reference.asked) - 4
        assert both_sets(tmp_path / "chats") == both_sets(tmp_path / "undisturbed")

    def test_another_models_replies_are_not_taken(self, serve: Callable[..., ChatServer], tmp_path: Path) -> None:
        server = serve(good_pairs)
        grounded(server, tmp_path)
        grounded(server, tmp_path, model="other", overwrite=True)
        assert len(server.asked) == 16
        grounded(server, tmp_path, overwrite=True)
        assert len(server.asked) == 16

    def test_a_busy_server_is_asked_again(
        self, serve: Callable[..., ChatServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("openai._base_client.time.sleep", lambda seconds: None)

        def busy(body: Body, number: int) -> str:
            if number % 2:
                raise FaultError("429")
            return good_pairs(body, number)

        server = serve(busy)
        assert grounded(server, tmp_path, concurrency=1).questions["train"] == 12
        assert len(server.asked) == 16

    def test_an_address_where_nobody_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("openai._base_client.time.sleep", lambda seconds: None)
        with pytest.raises(CptError, match=r"127.0.0.1:9/v1 does not answer"):
            synthesize(CORPUS, tmp_path, endpoint="http://127.0.0.1:9/v1", model="m", licence="x", quiet=True)

    def test_terms_of_known_models_are_warned_about(self, serve: Callable[..., ChatServer], tmp_path: Path) -> None:
        report = grounded(serve(good_pairs), tmp_path, model="meta-llama/Llama-3.3-70B-Instruct", licence="llama3.3")
        assert 'has "Llama" at the beginning' in report.warnings[0]

    def test_what_is_rejected_is_counted(self, serve: Callable[..., ChatServer], tmp_path: Path) -> None:
        def answer(body: Body, number: int) -> str:
            if number == 1:
                return "I cannot do that."
            content = good_pairs(body, number)
            return content.replace("に関することです", "、申し訳ありません") if number == 2 else content

        report = grounded(serve(answer), tmp_path, concurrency=1, language="ja", train=4, validation=0)
        assert report.rejected["no_pairs"] == 1
        assert report.rejected["language"] > 0
        assert set(report.rejected) <= {"no_pairs", "language", "refusal"}


PASSAGE = (
    "京都市は京都府の南部にある市である。平安京が置かれた年から長く日本の都であった。"
    "寺と神社が多い町としても知られ、古い喫茶店が今も多く残っている。"
)


@pytest.mark.parametrize(
    ("query", "answer", "fault"),
    [
        ("京都市はどこにありますか。", "京都府の南部です。", ""),
        ("京都市はどこにありますか。", PASSAGE[:70], "copied"),
        ("京都市はどこにありますか。", "申し訳ありませんが、お答えできません。", "refusal"),
        ("この文章によると、京都市はどこですか。", "京都府の南部です。", "mentions_the_passage"),
        ("Where is Kyoto city?", "京都府の南部です。", "language"),
        ("京都市はどこにありますか。", "It is in the south.", "language"),
        ("京都市の建都は何年ですか。", "794", ""),
        ("京", "京都府の南部です。", "length"),
        ("京都市はどこにありますか。", "", "length"),
        ("京都市はどこにありますか。", "長" * 700, "length"),
    ],
)
def test_what_a_pair_must_pass(query: str, answer: str, fault: str) -> None:
    assert Filter().fault(Question(query, answer, "grounded", 0), PASSAGE, "ja") == fault


def test_the_same_question_twice() -> None:
    checks = Filter()
    question = Question("京都市はどこにありますか。", "京都府の南部です。", "grounded", 0)
    near = Question("京都市はどこにありますか？", "南部です。", "grounded", 1)
    assert [checks.fault(q, PASSAGE, "ja") for q in (question, question, near)] == ["", "duplicate", "duplicate"]


@pytest.mark.parametrize(
    "reply", ["", "[", "[]", "[1, 2]", '[{"question": "q"}]', '[{"question": 1, "answer": 2}]', "no"]
)
def test_a_reply_without_pairs(reply: str) -> None:
    assert pairs_of(reply, 0) == []
