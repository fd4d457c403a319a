"""A judge behind a real HTTP endpoint: known verdicts, slow ones, nonsense, failures, and what survives them."""

import json
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.journal import Journal, key_of
from nemo_cpt.evaluation.judge import ATTEMPTS, TRIAL, expected_cost, run_judge
from nemo_cpt.evaluation.judge_prompts import VERSION, ask_for_preference, ask_for_score, read_preference, read_score
from nemo_cpt.evaluation.judge_questions import JudgeQuestion, judge_questions
from nemo_cpt.evaluation.judge_report import JudgeReport
from nemo_cpt.evaluation.language import judge_language
from nemo_cpt.inference.endpoint import EndpointEngine
from nemo_cpt.inference.engine import Prompt, Reply, Sampling
from tests.support.chat_server import NAME, Body, ChatServer, FaultError

CHECKOUT = Path(__file__).parents[2]
QUESTIONS = [
    JudgeQuestion("1", "math", ("2+3は？", "その二倍は？"), ("5", "10")),
    JudgeQuestion("2", "writing", ("春の俳句を作って。", "秋にして。")),
    JudgeQuestion("3", "stem", ("虹とは？", "なぜ七色？")),
]


class Answers:
    """An engine whose answers are `NAME: what was asked`; it remembers the prompts."""

    def __init__(self, name: str, has_chat_template: bool = True) -> None:
        self.name, self.has_chat_template = name, has_chat_template
        self.prompts: list[Prompt] = []

    def room(self, prompt: Prompt) -> None:
        return None

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[Any]:
        raise NotImplementedError

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[tuple[int, Reply]]:
        for index, prompt in enumerate(prompts):
            self.prompts.append(prompt)
            asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            yield index, Reply(f"{self.name}: {asked}", "stop", 1, 1, 0.1, 0.2)

    def close(self) -> None:
        pass


def is_pair(body: Body) -> bool:
    return "two AI assistants" in body["messages"][0]["content"]


def answers_shown(body: Body) -> list[str]:
    return re.findall(r"<answer number=\d>\n(.*?)\n</answer>", body["messages"][1]["content"], re.DOTALL)


def prefers_after(body: Body, number: int) -> str:
    """Verdicts of a judge that knows: answers of `after` are worth 8, others 4, and `after` wins in both orders."""
    shown = answers_shown(body)
    if is_pair(body):
        return f"After is better. [[{'A' if shown[0].startswith('after') else 'B'}]]"
    return f"Not [[10]], but\n[[{8 if shown[-1].startswith('after') else 4}]]"


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., JudgeReport]:
    """A run with both models by default; its folder is the test's, so that a second one goes on."""

    def run(
        server: ChatServer, *, models: Sequence[str] = ("before", "after"), retries: int = 0, **options: Any
    ) -> JudgeReport:
        judge = EndpointEngine(server.url, retries=retries, concurrency=4)
        return run_judge({name: Answers(name) for name in models}, judge, QUESTIONS, tmp_path, **options)

    return run


class TestVerdicts:
    def test_that_are_known_come_to_known_figures(self, judged: Callable[..., JudgeReport]) -> None:
        said = list[str]()
        with ChatServer(prefers_after) as server:
            report = judged(server, say=said.append)
        assert len(server.asked) == 3 * 2 * (2 + 2)
        assert (report.mean_score("before"), report.mean_score("after")) == (4, 8)
        assert report.scores("after") == {"1": 8, "2": 8, "3": 8}
        assert report.mean_score("after", category="math", turn=1) == 8
        assert report.mean_score("after", category="roleplay") is None
        preferences = report.preferences()
        assert preferences is not None
        assert (preferences.wins, preferences.ties, preferences.share) == ({"before": 0, "after": 3}, 0, 1.0)
        assert preferences.interval == (pytest.approx(0.4385, abs=1e-4), 1.0)
        assert (report.order_agreement(), report.first_preferred()) == (1.0, 0.5)
        assert (report.calls, report.prompt_tokens, report.completion_tokens) == (24, 2400, 240)
        assert report.unreadable == 0
        (line,) = said
        assert line.startswith(f"{NAME} at {server.url}: 24 verdicts to ask for; the judge reads about ")
        assert line.endswith(f"writes at most {24 * 1024:,}")

    def test_of_a_judge_that_likes_what_comes_first_are_ties(self, judged: Callable[..., JudgeReport]) -> None:
        with ChatServer(lambda body, number: "[[A]]" if is_pair(body) else "[[5]]") as server:
            report = judged(server)
        preferences = report.preferences("writing")
        assert preferences is not None
        assert (preferences.wins, preferences.ties, preferences.share) == ({"before": 0, "after": 0}, 1, None)
        assert (report.order_agreement(), report.first_preferred()) == (0.0, 1.0)

    def test_that_are_repeated_say_how_far_they_agree(self, judged: Callable[..., JudgeReport]) -> None:
        def by_seed(body: Body, number: int) -> str:
            if is_pair(body):
                return "[[C]]" if body["seed"] == 2 * ATTEMPTS else prefers_after(body, number)
            return f"[[{[6, 6, 7][body['seed'] // ATTEMPTS]}]]"

        with ChatServer(by_seed) as server:
            report = judged(server, repeats=3)
        assert {body["temperature"] for body in server.asked} == {0.7}
        assert report.repeat_agreement() == {
            "scores": pytest.approx(1 / 3),
            "scores_within_1": 1.0,
            "preferences": pytest.approx(1 / 3),
        }
        preferences = report.preferences()
        assert preferences is not None
        assert preferences.wins == {"before": 0, "after": 3}
        assert any("33.3% of the scores are equal" in line for line in report.lines())

    def test_of_one_model_are_scores_at_temperature_0(self, judged: Callable[..., JudgeReport]) -> None:
        with ChatServer(prefers_after) as server:
            report = judged(server, models=["after"])
        assert len(server.asked) == 6
        assert {body["temperature"] for body in server.asked} == {0}
        assert report.preferences() is None
        assert report.order_agreement() is None
        assert report.lines()[0] == "after: 8.00 of 10 on 3 questions"

    def test_on_equal_answers_are_asked_for_once(self, tmp_path: Path) -> None:
        with ChatServer(lambda body, number: "[[A]]" if is_pair(body) else "[[5]]") as server:
            models = {"before": Answers("same"), "after": Answers("same")}
            report = run_judge(models, EndpointEngine(server.url), QUESTIONS, tmp_path)
        assert len(server.asked) == 6 * 2
        assert report.preferences().ties == 3  # type: ignore[union-attr]
        assert report.calls == 12

    def test_are_written_with_what_they_are_made_of(self, judged: Callable[..., JudgeReport]) -> None:
        with ChatServer(prefers_after) as server:
            content = json.loads(json.dumps(judged(server).as_dict(), ensure_ascii=False))
        assert content["scores"]["after"]["categories"] == {"math": 8, "writing": 8, "stem": 8}
        assert content["scores"]["before"]["turns"] == [4, 4]
        assert content["prompt_version"] == VERSION
        assert "from 1 (useless) to 10" in content["prompts"]["score"]
        assert content["answers"]["after"]["2"] == ["after: 春の俳句を作って。", "after: 秋にして。"]
        assert len(content["verdicts"]) == 24
        assert content["preferences"]["wins"] == {"before": 0, "after": 3}


class TestModels:
    def test_hear_their_own_answers_in_the_second_turn(self, tmp_path: Path) -> None:
        model = Answers("after")
        with ChatServer(prefers_after) as server:
            run_judge({"after": model}, EndpointEngine(server.url), QUESTIONS[:1], tmp_path)
        assert model.prompts == [
            [{"role": "user", "content": "2+3は？"}],
            [
                {"role": "user", "content": "2+3は？"},
                {"role": "assistant", "content": "after: 2+3は？"},
                {"role": "user", "content": "その二倍は？"},
            ],
        ]

    def test_behind_endpoints_are_asked_at_mt_benchs_temperatures(self, tmp_path: Path) -> None:
        with ChatServer(lambda body, number: "はい。") as server, ChatServer(prefers_after) as judge:
            model = EndpointEngine(server.url)
            report = run_judge(
                {"after": model}, EndpointEngine(judge.url), QUESTIONS, tmp_path, answer_tokens=99, seed=5
            )
        temperatures = {body["messages"][0]["content"]: body["temperature"] for body in server.asked}
        assert temperatures == {"2+3は？": 0, "春の俳句を作って。": 0.7, "虹とは？": 0.1}
        assert {(body["max_tokens"], body["seed"]) for body in server.asked} == {(99, 5)}
        assert [len(body["messages"]) for body in server.asked].count(3) == 3
        assert report.answers == {"after": {each.id: ["はい。", "はい。"] for each in QUESTIONS}}

    def test_with_other_weights_under_the_same_name_are_asked_again(self, tmp_path: Path) -> None:
        asked = list[int]()
        with ChatServer(prefers_after) as server:
            for identity in ("first", "first", "second"):
                model, judge = Answers("after"), EndpointEngine(server.url)
                run_judge({"after": model}, judge, QUESTIONS, tmp_path, identities={"after": identity})
                asked.append(len(model.prompts))
        assert asked == [6, 0, 6]

    def test_without_a_chat_template_are_asked_in_text(self, tmp_path: Path) -> None:
        model = Answers("after", has_chat_template=False)
        with ChatServer(prefers_after) as server:
            run_judge({"after": model}, EndpointEngine(server.url), QUESTIONS[:1], tmp_path)
        assert model.prompts[0] == "2+3は？\n\n"
        assert str(model.prompts[1]).startswith("2+3は？\n\nafter: 2+3は？")
        assert str(model.prompts[1]).endswith("\n\nその二倍は？\n\n")

    @pytest.mark.parametrize(
        ("models", "options", "message"),
        [
            ([], {}, "there are 0"),
            (["a", "b", "c"], {}, "there are 3: a, b, c"),
            (["a"], {"compare": True}, "there is only a, and nothing to compare it with"),
            (["a"], {"repeats": 0}, "repeats is 0"),
        ],
    )
    def test_that_cannot_be_judged(
        self, models: list[str], options: Body, message: str, judged: Callable[..., JudgeReport], tmp_path: Path
    ) -> None:
        with ChatServer(prefers_after) as server, pytest.raises(CptError, match=message):
            judged(server, models=models, **options)
        assert not server.asked
        assert not list(tmp_path.iterdir())


class TestFailures:
    def test_a_run_that_was_stopped_goes_on(self, judged: Callable[..., JudgeReport], tmp_path: Path) -> None:
        def down_after_ten(body: Body, number: int) -> str:
            if number > 10:
                raise FaultError("503")
            return prefers_after(body, number)

        with ChatServer(down_after_ten) as server, pytest.raises(CptError, match=r"answered 503: .*try later"):
            judged(server)
        kept = [json.loads(line)["kind"] for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
        assert (kept.count("answer"), kept.count("verdict")) == (12, 10)
        with ChatServer(prefers_after) as server:
            report = judged(server)
        assert len(server.asked) == 24 - 10
        assert (report.calls, report.mean_score("after")) == (24, 8)
        with ChatServer(prefers_after) as server:
            again = judged(server)
        assert not server.asked
        assert again == report

    def test_a_run_that_was_killed_goes_on(self, tmp_path: Path) -> None:
        code = (
            "import sys; from tests.evaluation.test_judge import *\n"
            "judge = EndpointEngine(sys.argv[1], concurrency=1)\n"
            "run_judge({name: Answers(name) for name in ('before', 'after')}, judge, QUESTIONS, sys.argv[2])"
        )
        started = threading.Event()

        def kill_at_ten(body: Body, number: int) -> str:
            started.wait()
            if number == 10:
                process.kill()
            return prefers_after(body, number)

        with ChatServer(kill_at_ten) as server:
            process = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)], cwd=CHECKOUT)
            started.set()
            assert process.wait() == -signal.SIGKILL
        with ChatServer(prefers_after) as server:
            report = run_judge(
                {name: Answers(name) for name in ("before", "after")}, EndpointEngine(server.url), QUESTIONS, tmp_path
            )
        assert len(server.asked) <= 24 - 8  # the ninth may have come without being kept
        assert report.scores("after") == {"1": 8, "2": 8, "3": 8}

    def test_a_torn_line_is_asked_for_again(self, judged: Callable[..., JudgeReport], tmp_path: Path) -> None:
        with ChatServer(prefers_after) as server:
            report = judged(server)
        path = tmp_path / "judge.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        with ChatServer(prefers_after) as server:
            assert judged(server).as_dict()["scores"] == report.as_dict()["scores"]
        assert len(server.asked) == 1

    def test_nonsense_stops_it_before_all_is_paid_for(self, judged: Callable[..., JudgeReport], tmp_path: Path) -> None:
        with ChatServer(lambda body, number: "I like both.") as server:
            with pytest.raises(CptError, match=r"8 of 8 verdicts of .* cannot be read after 3 attempts .*I like both"):
                judged(server)
            assert len(server.asked) == TRIAL * ATTEMPTS
        assert (tmp_path / "judge.jsonl").read_text().count("I like both") == TRIAL * ATTEMPTS

    def test_nonsense_now_and_then_is_asked_for_again_and_counted(self, judged: Callable[..., JudgeReport]) -> None:
        def shy(body: Body, number: int) -> str:
            about = body["messages"][1]["content"]
            if not is_pair(body) and "なぜ七色" in about and "after: " in about:
                return "[[100]]"  # always
            return "Let me think ..." if body["seed"] == 0 else prefers_after(body, number)

        with ChatServer(shy) as server:
            report = judged(server)
        assert len(server.asked) == 24 + 24 + 1
        assert (report.unreadable, report.calls) == (1, 49)
        assert report.scores("after", turn=1) == {"1": 8, "2": 8}

    def test_more_nonsense_than_a_tenth_is_an_error(self, judged: Callable[..., JudgeReport]) -> None:
        def half(body: Body, number: int) -> str:
            return "I like both." if is_pair(body) else "[[5]]"

        with ChatServer(half) as server, pytest.raises(CptError, match=r"12 of 24 verdicts .* cannot be read"):
            judged(server)

    def test_a_slow_judge_is_waited_for(self, judged: Callable[..., JudgeReport]) -> None:
        together = threading.Barrier(4)

        def slow(body: Body, number: int) -> str:
            together.wait()  # answers nobody before four are waiting
            return prefers_after(body, number)

        with ChatServer(slow) as server:
            assert judged(server).mean_score("after") == 8

    def test_two_runs_do_not_write_one_journal(self, judged: Callable[..., JudgeReport], tmp_path: Path) -> None:
        with (
            ChatServer(prefers_after) as server,
            Journal(tmp_path / "judge.jsonl"),
            pytest.raises(CptError, match=r"Another process .* holds .*judge.jsonl"),
        ):
            judged(server)


class TestCost:
    def test_is_counted_beforehand(self) -> None:
        cost = expected_cost(judge_questions(), 2)
        assert (cost.answers, cost.verdicts) == (320, 640)
        assert cost.completion_tokens == 640 * 1024
        # A score shows one answer of 1,024 tokens in the first turn and two in the second, a pair twice as many.
        assert cost.prompt_tokens > 80 * 2 * ((1 + 2) + (2 + 4)) * 1024
        assert str(cost).startswith("320 answers and 640 verdicts to ask for; the judge reads about ")
        assert expected_cost(judge_questions(), 1, repeats=5).verdicts == 800
        assert expected_cost(judge_questions(), 2, compare=False).verdicts == 320

    def test_is_not_below_what_is_asked(self, tmp_path: Path) -> None:
        with ChatServer(prefers_after) as server:
            engine = EndpointEngine(server.url)
            run_judge({"a": Answers("a"), "b": Answers("b")}, engine, QUESTIONS, tmp_path)
        sent = sum(len(each["content"].encode()) for body in server.asked for each in body["messages"])
        cost = expected_cost(QUESTIONS, 2)
        assert cost.verdicts == len(server.asked)
        assert cost.prompt_tokens * 3 > sent


class TestPrompts:
    def test_show_the_turns_up_to_the_one_judged(self) -> None:
        system, user = ask_for_score(QUESTIONS[0], ["ANSWER1", "ANSWER2"], 0)
        assert "question number 1" in system["content"]
        assert "ANSWER1" in user["content"]
        assert "ANSWER2" not in user["content"]
        assert user["content"].endswith("<reference_answer number=1>\n5\n</reference_answer>")
        system, user = ask_for_preference(QUESTIONS[1], ["A1", "A2"], ["B1", "B2"], 1)
        assert "question number 2" in system["content"]
        assert re.findall(r"\b[AB][12]\b", user["content"]) == ["A1", "A2", "B1", "B2"]
        assert "reference" not in user["content"]

    @pytest.mark.parametrize(
        ("reply", "score"),
        [
            ("Good.\n[[7]]", 7),
            ("[[Rating: 8.5]]", 8.5),
            ("［［９］］", 9),
            ("[[ 6/10 ]]", 6),
            ("First I thought [[3]], then [[4]].", 4),
            ("[[0]]", None),
            ("[[11]]", None),
            ("7", None),
            ("", None),
        ],
    )
    def test_scores_are_read(self, reply: str, score: float | None) -> None:
        assert read_score(reply) == score

    @pytest.mark.parametrize(
        ("reply", "preference"),
        [
            ("[[A]]", "first"),
            ("Not [[A]] but [[ b ]]", "second"),
            ("[[C]]", "tie"),
            ("[[tie]]", "tie"),
            ("A", None),
            ("[[D]]", None),
        ],
    )
    def test_preferences_are_read(self, reply: str, preference: str | None) -> None:
        assert read_preference(reply) == preference

    @settings(deadline=None)
    @given(st.text() | st.text("[]0123456789./ABCtie: "))
    def test_any_reply_can_be_read(self, reply: str) -> None:
        score = read_score(reply)
        assert score is None or 1 <= score <= 10
        assert read_preference(reply) in (None, "first", "second", "tie")


class TestQuestions:
    def test_that_ship(self) -> None:
        questions = judge_questions()
        categories = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
        assert {each.category for each in questions} == categories
        assert all(sum(each.category == category for each in questions) == 10 for category in categories)
        assert len({turn for each in questions for turn in each.turns}) == 160
        with_references = {each.category for each in questions if each.references}
        assert with_references == {"reasoning", "math", "coding"}
        assert sum(len(each.references) for each in questions) == 60
        prose = [turn for each in questions for turn in each.turns if each.category != "coding"]
        assert {judge_language(turn, "ja").language for turn in prose} == {"ja"}

    def test_of_the_users_own(self, tmp_path: Path) -> None:
        path = tmp_path / "questions.jsonl"
        path.write_text(
            '\ufeff{"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": null}\n\n'
            '{"question_id": "x", "category": "own", "turns": ["c"], "reference": ["d"]}\n'
        )
        assert judge_questions(path) == [
            JudgeQuestion("81", "writing", ("a", "b")),
            JudgeQuestion("x", "own", ("c",), ("d",)),
        ]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "has no questions"),
            ("nonsense", "line 1 is no question"),
            ("[1]", "it is no object"),
            ('{"question_id": 1, "category": "a"}', "turns are not a list of texts"),
            ('{"question_id": 1, "category": "a", "turns": [" "]}', "turns are not a list of texts"),
            ('{"question_id": 1, "category": "a", "turns": "b"}', "turns are not a list of texts"),
            ('{"question_id": 1, "turns": ["b"]}', "question_id or category is missing"),
            ('{"question_id": 1, "category": "a", "turns": ["b"], "reference": ["c", "d"]}', "2 references to 1 turns"),
            ('{"question_id": 1, "category": "a", "turns": ["b"]}\n' * 2, "question_id 1 is there twice"),
        ],
    )
    def test_that_cannot_be_used(self, content: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "questions.jsonl"
        path.write_text(content)
        with pytest.raises(CptError, match=message):
            judge_questions(path)

    def test_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(CptError, match=r"cannot read .*none.jsonl: No such file"):
            judge_questions(tmp_path / "none.jsonl")
        with pytest.raises(CptError, match="no questions for a judge are shipped in 'ko', only in ja"):
            judge_questions(language="ko")


class TestJournal:
    def test_keeps_what_is_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "folder" / "journal.jsonl"
        with Journal(path) as journal:
            journal.keep(key_of("a", Sampling()), {"text": "はい"})
        path.write_bytes(path.read_bytes() + b'{"key": "torn')
        with Journal(path) as journal:
            assert journal.get(key_of("a", Sampling())) == {"text": "はい"}
            assert journal.get(key_of("a", Sampling(seed=1))) is None
            journal.keep("b", {"text": "いいえ"})
        assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["はい", "いいえ"]

    def test_a_full_disk_leaves_what_is_whole(self, tmp_path: Path) -> None:
        path, limit = tmp_path / "journal.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            with Journal(path) as journal:
                journal.keep("a", {"text": "b"})
                # Room for a part of the next line: what is left of it must not come behind the first one later.
                resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 4096, limit[1]))
                with pytest.raises(CptError, match="Make room and run it again"):
                    journal.keep("c", {"text": "d" * 6000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        with Journal(path) as journal:
            assert journal.get("a") == {"text": "b"}
            assert len(journal) == 1

    def test_does_not_pass_over_damage(self, tmp_path: Path) -> None:
        path = tmp_path / "journal.jsonl"
        path.write_text('{"key": "a", "text": "b"}\n{"key": "c"\n{"key": "d"}\n')
        with pytest.raises(CptError, match="line 2 is not a record"):
            Journal(path)
        assert len(path.read_text().splitlines()) == 3
