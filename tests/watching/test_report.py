"""`nemo-cpt report`: one page that opens offline, and what it says."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nemo_cpt import page as page_parts
from nemo_cpt.training.metrics import append_metrics
from nemo_cpt.watching.plots import pictures
from nemo_cpt.watching.record import record
from nemo_cpt.watching.report import as_dict, write_report
from tests.support import browser, run_folders

VOID = {"meta", "img", "br", "input"}
PICTURES = {"loss", "validation", "forgetting", "learning_rate", "gradient_norm", "throughput", "memory"}


def nemo_cpt(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemo_cpt.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL)


class Page(HTMLParser):
    """A page's tags, which must close in order, its texts, and what it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text("utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in VOID else [tag]
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert "style" in self.open or "url(" not in data
        self.texts.append(data.strip())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`results/one` and `results/two`, with the report of each and of both."""
    folder = tmp_path_factory.mktemp("world")
    for name, forgetting in (("one", 0.002), ("two", 0.0)):
        run = folder / "results" / name
        run_folders.describe(run, configuration={"optim": {"config": {"lr": 1e-4 if name == "one" else 3e-4}}})
        run_folders.measure(run, 60, forgetting=forgetting, seed=len(name))
    run_folders.reply(folder / "results/one", 0, "Tokyo <b>is</b>")
    run_folders.reply(folder / "results/one", 60, "東京です。")
    run_folders.warn(folder / "results/one", 40, "en has got worse")
    for arguments in (["one"], ["one", "two", "--json"]):
        done = nemo_cpt("report", *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
    (folder / "printed.json").write_text(done.stdout)
    return folder


def test_the_page_is_one_whole_file_that_fetches_nothing(world: Path) -> None:
    for folder in ("report", "report_against_two"):
        path = world / "results/one" / folder / "report.html"
        page = Page(path)
        assert all(each.startswith("data:image/png;base64,") for each in page.fetched)
        assert {each.stem for each in path.parent.glob("*.png")} == PICTURES
        assert len(page.fetched) == len(PICTURES)
        assert path.stat().st_size < 2_000_000


def test_the_page_says_what_the_run_was_and_what_came(world: Path) -> None:
    texts = Page(world / "results/one/report/report.html").texts
    for text in (
        "60 of 100",
        "983,040 (16,384 a step)",
        "8,192 (planned 9,000, -9 %)",
        "19.0 (planned 20.0, -5 %)",
        "en has got worse",
        "1.20",  # Japanese was seen so often by now
        "Tokyo <b>is</b>",  # as text
        "東京です。",
        "0.0001",
        "0.0003",  # the recipe's default
        "bits per byte",
    ):
        assert text in texts, text


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_shows_the_page_without_a_complaint(world: Path, tmp_path: Path, width: int) -> None:
    seen = browser.see(world / "results/one/report_against_two/report.html", width, tmp_path)
    assert (seen.errors, seen.overflows, seen.images) == ([], False, True)


def test_what_was_forgotten_is_worse_and_what_was_learned_better(world: Path) -> None:
    (run,) = as_dict([record(world / "results/one")])["runs"]
    ja, en = run["changes"]
    assert (ja["set"], ja["better"], en["set"], en["worse"]) == ("ja", True, "en", True)
    assert en["percent"] == pytest.approx(4.0, abs=0.3)  # 0.12 of 3 nats
    assert en["first"] == pytest.approx(3 / 4 / 0.6931, rel=0.01)  # bits a byte, at 4 bytes a token


def test_two_runs_are_told_apart(world: Path) -> None:
    printed = json.loads((world / "printed.json").read_text())
    assert printed["different"] == [["optim.config.lr", "0.0001", "0.0003"]]
    assert [run["changes"][1]["worse"] for run in printed["runs"]] == [True, False]
    texts = Page(world / "results/one/report_against_two/report.html").texts
    assert "What differs between them (1)" in texts
    assert "one: en has got worse" in texts  # whose warning it is


@pytest.mark.filterwarnings("error")
def test_a_run_may_have_any_name(tmp_path: Path) -> None:
    """`$` begins a formula of matplotlib's, `_` hides a line from its legend, and its font has no Japanese."""
    runs = [tmp_path / "a$b^_{$", tmp_path / "_日本語 <b>"]
    for run in runs:
        run_folders.describe(run)
        run_folders.measure(run, 20)
    page, *_ = write_report([record(run) for run in runs], tmp_path / "report")
    assert "_日本語 <b>" in Page(page).texts
    with page_parts.drawing() as pyplot:
        _, axis = pyplot.subplots()
        axis.plot([1], [2], label=page_parts.legend_name("_hidden"))
        assert axis.get_legend_handles_labels()[1] == [" _hidden"]


def test_a_run_that_diverged_does_not_show_its_last_good_loss(tmp_path: Path) -> None:
    run_folders.describe(tmp_path)
    run_folders.measure(tmp_path, 5)
    append_metrics(tmp_path, {"step": 6, "reduced_train_loss": None, "train_step_timing in s": 0.0})  # None was NaN
    (run,) = as_dict([record(tmp_path)])["runs"]
    assert run["summary"]["training loss"] == "nan"
    assert "throughput" in pictures([record(tmp_path)])


def test_a_run_of_an_older_version_has_a_report_too(tmp_path: Path) -> None:
    """With nothing but its losses, in nats, and without a plan."""
    run_folders.measure(tmp_path, 20)
    page, *others = write_report([record(tmp_path)], tmp_path / "report")
    texts = Page(page).texts
    assert "nats per token" in texts
    assert "throughput.png" not in {each.name for each in others}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["onne"], "there is no run 'onne' in results; near: one"),
        (["one", "one"], "would be compared with itself"),
        (["empty"], "has no metrics/steps.jsonl"),
        (["results"], "it is a folder of runs: name one of"),
        (["one", "-d", "nowhere"], "there is no folder nowhere with runs"),
    ],
)
def test_bad_input(world: Path, arguments: list[str], says: str) -> None:
    (world / "results/empty/checkpoints").mkdir(parents=True, exist_ok=True)
    done = nemo_cpt("report", *arguments, cwd=world)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
