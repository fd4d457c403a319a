"""A dataset made in parts: byte for byte what one run makes, whatever the shares, wherever it is killed."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nemo_cpt.corpus
from nemo_cpt.corpus import prepare, read_manifest
from nemo_cpt.corpus.plan import Plan, remove_parts
from nemo_cpt.corpus.preparing import parts
from nemo_cpt.corpus.preparing.estimate import Sample, estimate, estimate_shares
from nemo_cpt.corpus.preparing.parts import join, make_plan, part_prefix, prepare_part, take_up
from nemo_cpt.corpus.reading.shares import cut
from nemo_cpt.corpus.reading.sources import Source, list_sources
from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer
from nemo_cpt.errors import CptError
from tests.support.corpus_helpers import error_of_a_full_disk, same_files, write_jsonl
from tests.support.crashes import killed_at, lines_of

TASKS = 5
CODE = Path(nemo_cpt.corpus.__file__).parent / "preparing"
OF_A_RUN = ("seconds", "compared", "encoder")  # what the manifests of two runs may differ in


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A large file, with bad, blank and empty lines in it, between a small and a compressed one."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", texts[:3])
    large = write_jsonl(folder / "b.jsonl", [*texts[:40], "", "<eos> in a text", *texts[40:]])
    lines = large.read_text("utf-8").splitlines(keepends=True)
    for number, bad in ((len(lines) - 2, "no JSON\n"), (30, "\n"), (8, '{"other": 1}\n')):
        lines.insert(number, bad)
    large.write_text("".join(lines), "utf-8")
    packed = gzip.compress(write_jsonl(folder / "c.jsonl", texts[-20:]).read_bytes())
    (folder / "c.jsonl").unlink()
    (folder / "c.jsonl.gz").write_bytes(packed)
    return folder


OPTIONS = {"on_error": "skip", "max_skipped": 0.1, "workers": 1, "quiet": True, "chunk_bytes": 20_000}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, corpus: Path, small: Path) -> str:
    """What one run makes of the corpus."""
    return prepare(corpus, tmp_path_factory.mktemp("one") / "ds", small, **OPTIONS).prefix


def planned(corpus: Path, folder: Path, tokenizer: Path, tasks: int = TASKS, **options: object) -> Plan:
    plan, loaded = make_plan(corpus, folder / "ds", tokenizer, tasks, **OPTIONS | options)
    take_up(plan, loaded)
    return plan


def made(corpus: Path, folder: Path, tokenizer: Path, tasks: int = TASKS, **options: object) -> Plan:
    plan = planned(corpus, folder, tokenizer, tasks, **options)
    for number in range(len(plan.shares)):
        prepare_part(plan.folder, number)
    return plan


def test_the_parts_together_are_what_one_run_makes(tmp_path: Path, corpus: Path, small: Path, one: str) -> None:
    plan = made(corpus, tmp_path, small)
    assert [len(share) for share in plan.shares] != [1] * TASKS  # some tasks read several files, some a range
    assert any(source.is_range for share in plan.shares for source in share)
    report = join(plan.folder)
    assert report.status == "written"
    assert same_files(report.prefix, one)
    manifests = [read_manifest(prefix) for prefix in (report.prefix, one)]
    for manifest in manifests:
        for name in OF_A_RUN:
            del manifest[name]
    assert manifests[0] == manifests[1]
    skipped = [Path(prefix + ".skipped.jsonl").read_bytes() for prefix in (report.prefix, one)]
    assert skipped[0] == skipped[1]
    assert not plan.folder.exists()
    # Both ways of asking again find it done.
    assert join(plan.folder).status == "unchanged"
    assert prepare(corpus, tmp_path / "ds", small, **OPTIONS).status == "unchanged"


def test_more_tasks_than_lines_are_not_made(corpus: Path) -> None:
    lines = sum(path.read_bytes().count(b"\n") for path in corpus.glob("*.jsonl"))
    assert lines // 2 < len(cut(list_sources(corpus), 10_000)) <= lines + 1  # and the compressed file as a whole


@pytest.mark.parametrize("tasks", [1, 12])
def test_any_number_of_tasks(tmp_path: Path, corpus: Path, small: Path, one: str, tasks: int) -> None:
    plan = made(corpus, tmp_path, small, tasks)
    assert len(plan.shares) <= tasks
    assert same_files(join(plan.folder).prefix, one)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_shares_are_whole_lines_and_miss_none(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], tasks: int, ends: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    content = b"\n".join(b"x" * length for length in lengths) + b"\n" * ends
    path.write_bytes(content)
    sources = [Source(str(path), "plain", len(content), 0), Source("packed", "gzip", 50, 0)]
    shares = cut(sources, tasks)
    assert len(shares) <= tasks
    assert all(shares)
    assert [source.path for share in shares for source in share].count("packed") == 1
    ranges = [(s.start, s.end) for share in shares for s in share if s.path == str(path)]
    assert b"".join(content[start:stop] for start, stop in ranges) == content
    assert all(content[start - 1 : start] == b"\n" for start, _ in ranges[1:])


def test_no_tasks_are_refused() -> None:
    with pytest.raises(CptError, match="tasks is 0; it must be at least 1"):
        cut([Source("a", "plain", 10, 0)], 0)


def test_a_bad_line_is_named_by_its_number_in_the_file(tmp_path: Path, corpus: Path, small: Path) -> None:
    plan = planned(corpus, tmp_path, small, on_error="stop", max_skipped=None)
    lines = (corpus / "b.jsonl").read_text("utf-8").splitlines()
    number = len(lines) - 2
    assert lines[number - 1] == "no JSON"
    offset = len("\n".join(lines[: number - 1]).encode()) + 1
    share = next(
        each for each, share in enumerate(plan.shares) for s in share if s.path.endswith("b.jsonl") and s.end > offset
    )
    with pytest.raises(CptError, match=rf"b\.jsonl, line {number}, byte offset {offset}: not JSON"):
        prepare_part(plan.folder, share)


def test_what_may_be_left_out_is_a_share_of_the_whole(tmp_path: Path, small: Path, texts: list[str]) -> None:
    """All bad lines lie in one task's range, of which they are more than half; of the file they are a tenth."""
    good = [json.dumps({"text": text[:200]}) for text in texts[:90]]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([*good, *[json.dumps({"other": "x" * 150}) for _ in range(10)]]) + "\n")
    one = prepare(path, tmp_path / "one", small, on_error="skip", max_skipped=0.2, quiet=True)
    plan = made(path, tmp_path / "many", small, 10, max_skipped=0.02)
    with pytest.raises(CptError, match=r"10 of 100 lines give no text.*--max-skipped 0.\d+"):
        join(plan.folder)
    with pytest.raises(CptError, match="it left out what gives no text"):
        take_up(
            *make_plan(path, tmp_path / "many" / "ds", small, 10, **OPTIONS | {"on_error": "stop", "max_skipped": None})
        )
    # The same command with more allowed makes no part again.
    assert take_up(*make_plan(path, tmp_path / "many" / "ds", small, 10, **OPTIONS | {"max_skipped": 0.2})) == []
    assert same_files(join(plan.folder).prefix, one.prefix)


def test_a_share_without_documents_is_an_empty_part(tmp_path: Path, small: Path, texts: list[str]) -> None:
    path = write_jsonl(tmp_path / "blanks.jsonl", texts[:20])
    path.write_bytes(path.read_bytes() + b"\n" * 60_000)
    one = prepare(path, tmp_path / "one", small, quiet=True)
    assert same_files(join(made(path, tmp_path / "many", small, 4).folder).prefix, one.prefix)
    path.write_bytes(b"\n" * 60_000)
    with pytest.raises(CptError, match="blank lines alone"):
        join(made(path, tmp_path / "blank", small, 4).folder)


def test_killed_joins_go_on(tmp_path_factory: pytest.TempPathFactory, corpus: Path, small: Path, one: str) -> None:
    def fresh() -> Plan:
        return made(corpus, tmp_path_factory.mktemp("killed"), small)

    counted = fresh()
    count = lines_of(lambda: join(counted.folder), CODE).count
    plan = fresh()
    for number in range(1, 10):
        killed_at(count * number // 10, lambda: join(plan.folder), CODE)
    # Whether or not it came to its end meanwhile: what is there then is whole.
    assert same_files(join(plan.folder).prefix, one)
    assert not plan.folder.exists()
    assert [path.name for path in plan.folder.parent.glob("*.part")] == []


def test_a_killed_task_goes_on(tmp_path: Path, corpus: Path, small: Path, one: str) -> None:
    plan = planned(corpus, tmp_path, small, 2, chunk_bytes=5_000, checkpoint_seconds=0)
    count = lines_of(lambda: prepare_part(plan.folder, 0), CODE).count
    remove_parts(plan.folder)
    plan.write()
    killed, _ = killed_at(count // 2, lambda: prepare_part(plan.folder, 0), CODE)
    assert killed
    assert Path(part_prefix(plan, 0) + ".journal").exists()
    assert parts.missing(plan, load_tokenizer(small)) == [0, 1]
    with pytest.raises(CptError, match=r"2 of the 2 parts .* are not there, or not done"):
        join(plan.folder)
    for number in (0, 1):
        prepare_part(plan.folder, number)
    assert same_files(join(plan.folder).prefix, one)


def test_parts_of_another_job_are_refused(tmp_path: Path, corpus: Path, small: Path, one: str) -> None:
    plan = planned(corpus, tmp_path, small)
    prepare_part(plan.folder, 0)
    for options, says in (
        ({"tasks": 3}, "tasks is 5, not 3"),
        ({"prepend_bos": True}, "bos is None, not 0"),
        ({"fast": False}, "fast is True, not False"),
    ):
        other = make_plan(corpus, tmp_path / "ds", small, **{"tasks": TASKS} | OPTIONS | options)
        with pytest.raises(CptError, match=f"holds parts of another job: {says}"):
            take_up(*other)
    fewer = make_plan(corpus / "b.jsonl", tmp_path / "ds", small, TASKS, **OPTIONS)
    with pytest.raises(CptError, match="their inputs are others"):
        take_up(*fewer)
    other, loaded = make_plan(corpus, tmp_path / "ds", small, 3, overwrite=True, **OPTIONS)
    assert take_up(other, loaded) == [0, 1, 2]
    for number in range(3):
        prepare_part(other.folder, number)
    assert same_files(join(other.folder).prefix, one)


def test_changed_inputs_are_noticed(tmp_path: Path, small: Path, texts: list[str]) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    plan = planned(path, tmp_path, small, 3)
    prepare_part(plan.folder, 0)
    before = path.read_bytes()
    # Between two tasks: longer, then of the same size but with another content.
    path.write_bytes(before + b"\n")
    with pytest.raises(CptError, match=r"in\.jsonl changed since the tasks were planned"):
        prepare_part(plan.folder, 1)
    path.write_bytes(before)
    os.utime(path, ns=(plan.sources[0].mtime_ns, plan.sources[0].mtime_ns))
    for number in (1, 2):
        prepare_part(plan.folder, number)
    changed = before.replace(b"the", b"teh", 1)
    path.write_bytes(changed)
    with pytest.raises(CptError, match=r"content of .*in\.jsonl changed"):
        join(plan.folder)
    with pytest.raises(CptError, match=r"content of .*in\.jsonl changed.*--overwrite"):
        take_up(*make_plan(path, tmp_path / "ds", small, 3, **OPTIONS))
    os.utime(path, ns=(plan.sources[0].mtime_ns, plan.sources[0].mtime_ns))
    with pytest.raises(CptError, match=r"in\.jsonl changed after a part of it was read"):
        join(plan.folder)  # its time says nothing; that it is hashed once more does
    path.write_bytes(before)  # only touched in the end
    assert take_up(*make_plan(path, tmp_path / "ds", small, 3, **OPTIONS)) == []
    one = prepare(path, tmp_path / "one", small, quiet=True)
    assert same_files(join(plan.folder).prefix, one.prefix)


def test_an_input_that_changed_its_size_is_named_with_the_way_out(
    tmp_path: Path, small: Path, texts: list[str]
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [*texts, "one more"])
    plan = planned(path, tmp_path, small, 3)
    prepare_part(plan.folder, 0)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(
        CptError,
        match=r"in\.jsonl changed since the tasks were planned \(it had .*Its shares were cut from what was there "
        "before; take another output, or discard the parts with overwrite=True",
    ):
        take_up(*make_plan(path, tmp_path / "ds", small, 3, **OPTIONS))
    # Of the size that it had, with its lines elsewhere.
    path.write_bytes(b"".join([lines[-1], *lines[:-1]]))
    with pytest.raises(CptError, match=r"content of their inputs changed since the tasks were planned\. Its shares"):
        take_up(*make_plan(path, tmp_path / "ds", small, 3, **OPTIONS))
    # What one run makes does not need them, and says so until somebody removes them.
    for status in ("written", "unchanged"):
        report = prepare(path, tmp_path / "ds", small, quiet=True)
        assert report.status == status
        assert f"{plan.folder} holds parts of an earlier command with --tasks" in report.warnings[-1]
    remove_parts(plan.folder)
    assert prepare(path, tmp_path / "ds", small, quiet=True).warnings == []


def test_the_manifest_names_the_tokenizer_as_it_was_given(
    tmp_path: Path, corpus: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small.parent)
    plan = planned(corpus, tmp_path, Path(small.name))
    monkeypatch.chdir(tmp_path)  # tasks run elsewhere
    for number in range(len(plan.shares)):
        prepare_part(plan.folder, number)
    joined = join(plan.folder)
    monkeypatch.chdir(small.parent)
    one = prepare(corpus, tmp_path / "one", Path(small.name), **OPTIONS)
    assert joined.tokenizer == one.tokenizer
    assert joined.tokenizer["name"] == small.name


def test_what_the_join_does_not_see_is_said(tmp_path: Path, corpus: Path, small: Path) -> None:
    plan = made(corpus, tmp_path, small)
    elsewhere = Path(part_prefix(plan, 2) + ".idx")
    elsewhere.unlink()
    with pytest.raises(CptError, match=r"1 of the 5 parts .* as \S+ sees it: 2\. .*share"):
        join(plan.folder)
    with pytest.raises(CptError, match=r"plan\.json cannot be read on .*every task's machine"):
        prepare_part(tmp_path / "other_text_document.parts", 0)
    with pytest.raises(CptError, match="has the tasks 0 to 4, not 5"):
        prepare_part(plan.folder, 5)


def test_a_full_disk_loses_nothing(tmp_path: Path, corpus: Path, small: Path, one: str) -> None:
    plan = made(corpus, tmp_path, small)
    size = Path(one + ".bin").stat().st_size
    assert "Make room" in error_of_a_full_disk(lambda: join(plan.folder), size // 2)
    assert same_files(join(plan.folder).prefix, one)


def test_one_machines_run_does_not_take_up_a_join(tmp_path: Path, corpus: Path, small: Path) -> None:
    plan = made(corpus, tmp_path, small)
    count = lines_of(lambda: join(made(corpus, tmp_path / "counted", small).folder), CODE / "joining.py").count
    killed, _ = killed_at(count // 2, lambda: join(plan.folder), CODE / "joining.py")
    assert killed
    with pytest.raises(CptError, match="unfinished job that differs in joined"):
        prepare(corpus, tmp_path / "ds", small, **OPTIONS)
    # Nor the other way round, and that is known before the tasks begin.
    lines = lines_of(lambda: prepare(corpus, tmp_path / "alone", small, **OPTIONS), CODE)
    middle = sum(lines.with_workers) // 2
    killed, _ = killed_at(middle, lambda: prepare(corpus, tmp_path / "one", small, **OPTIONS), CODE)
    assert killed
    with pytest.raises(CptError, match="unfinished job that differs in joined"):
        take_up(*make_plan(corpus, tmp_path / "one", small, TASKS, **OPTIONS))


def test_estimates(tmp_path: Path, corpus: Path, small: Path, one: str) -> None:
    plan, loaded = make_plan(corpus, tmp_path / "ds", small, TASKS, **OPTIONS)
    assert not plan.folder.exists()
    found = estimate(plan, loaded, cpus=2)
    assert found.tasks == len(plan.shares)
    assert found.stored == sum(path.stat().st_size for path in corpus.iterdir())
    tokens = read_manifest(one)["tokens"]
    assert 0.7 * tokens < found.tokens < 1.4 * tokens
    # 64 shares of 100 MB at 50 MB a CPU second and task.
    by_hand = estimate_shares([10**8] * 64, 0, Sample(1.0, 0.25, 1e-3), 4, cpus=1)
    assert round(by_hand.task_seconds - 15, 6) == 2.0
    assert by_hand.dataset == 64 * 10**8 * (0.25 * 4 + 1e-3 * 20)
    assert by_hand.disk == 2 * by_hand.dataset


@pytest.mark.parametrize(
    ("tasks", "cpus", "minutes", "rate"), [(8, 16, 2.9, 5.8), (64, 1, 5.5, 3.1), (64, 16, 0.6, 29.0)]
)
def test_the_plan_for_a_terabyte(tasks: int, cpus: int, minutes: float, rate: float) -> None:
    """The table of docs/corpus.md."""
    plan = estimate_shares([10**12 // tasks] * tasks, 0, Sample(1.0, 0.2625, 3e-4), 4, cpus)
    assert round(plan.task_seconds / 60, 1) == minutes
    assert round(plan.stored / plan.task_seconds / 1e9, 1) == rate
    assert (round(plan.join_seconds / 60), round(plan.disk / 1e11), round(plan.network / 1e11)) == (35, 21, 42)
    one_file = estimate_shares([10**12 // tasks] * tasks, 10**12, Sample(1.0, 0.2625, 3e-4), 4, cpus)
    assert round(one_file.join_seconds / 60) == 52
    row = (
        f"| {tasks} x {cpus} | {1000 / tasks:.1f} GB | {minutes} minutes | {rate} GB/s | 35 minutes | 2.1 TB | 4.2 TB |"
    )
    assert row in (Path(__file__).parents[2] / "docs" / "corpus.md").read_text()
