"""Held-out sets: stable under more data, free of duplicates where asked."""

import datetime
import json
import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import nemo_cpt.corpus
from nemo_cpt.corpus import prepare, split
from nemo_cpt.corpus.hashing import segment_hashes, symbols, window_hashes
from nemo_cpt.corpus.splitting.duplicates import compatible, fingerprint, plain_codes, sketches
from nemo_cpt.errors import CptError
from tests.support.corpus_helpers import error_of_a_full_disk, write_jsonl
from tests.support.crashes import go_on, lines_of, paused_at

CODE = Path(nemo_cpt.corpus.__file__).parent


@pytest.fixture(scope="module")
def documents(texts: list[str]) -> list[str]:
    """2,000 documents, no two alike."""
    noise = random.Random(5)
    return ["".join(chr(noise.randrange(0x4E00, 0x9FA0)) for _ in range(120)) for _ in range(2000)]


def read(path: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text("utf-8").splitlines()]


def test_more_data_moves_no_document(tmp_path: Path, documents: list[str]) -> None:
    few = split(
        write_jsonl(tmp_path / "few.jsonl", documents[:1000]), tmp_path / "few", validation=0.05, test=0.03, quiet=True
    )
    shuffled = random.Random(1).sample(documents, len(documents))
    many = split(
        write_jsonl(tmp_path / "many.jsonl", shuffled), tmp_path / "many", validation=0.05, test=0.03, quiet=True
    )
    for name in ("train", "validation", "test"):
        assert set(read(few.files[name])) <= set(read(many.files[name]))
    everything = [text for name in many.files for text in read(many.files[name])]
    assert sorted(everything) == sorted(documents)
    assert 60 <= many.documents["validation"] <= 140  # 100 expected, 4 standard deviations
    assert 31 <= many.documents["test"] <= 89


def test_lines_keep_their_other_fields(tmp_path: Path, documents: list[str]) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", documents[:200])
    report = split(source, tmp_path / "out", validation=0.1, quiet=True)
    lines = [line for path in report.files.values() for line in Path(path).read_bytes().splitlines()]
    assert sorted(lines) == sorted(source.read_bytes().splitlines())


def test_conversations_are_told_apart_by_what_was_asked(tmp_path: Path, documents: list[str]) -> None:
    """In OpenAI's form, ShareGPT's, and with a message of parts; the system's words and the answers tell nothing."""
    held_out = []
    for key, role, user, content in (
        ("messages", "role", "user", "content"),
        ("conversations", "from", "human", "value"),
    ):
        turns = [
            [{role: "system", content: "S" * 300}, {role: user, content: text}, {role: "assistant", content: key}]
            for text in documents[:200]
        ]
        turns[7][1][content] = [{"type": "text", "text": documents[7]}]
        chats = tmp_path / f"{key}.jsonl"
        chats.write_text("".join(json.dumps({key: each, "id": at}) + "\n" for at, each in enumerate(turns)))
        report = split(chats, tmp_path / key, validation=0.1, json_key=key, drop="near", quiet=True)
        assert (report.exact, report.near, sum(report.documents.values())) == (0, 0, 200)
        lines = Path(report.files["validation"]).read_text().splitlines()
        held_out.append([json.loads(line)["id"] for line in lines])
    assert held_out[0] == held_out[1]
    (tmp_path / "answers.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n')
    with pytest.raises(CptError, match="'messages' is a list without a message of a user's"):
        split(tmp_path / "answers.jsonl", tmp_path / "none", validation=0.1, json_key="messages", quiet=True)


def test_rows_keep_their_other_columns(tmp_path: Path, documents: list[str]) -> None:
    day = datetime.date(2026, 11, 27)
    rows = [{"id": at, "text": text, "seen": day, "meta": {"tags": ["a", None]}} for at, text in enumerate(documents)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet")
    report = split(tmp_path / "all.parquet", tmp_path / "out", validation=0.1, quiet=True)
    made = [json.loads(line) for path in report.files.values() for line in Path(path).read_bytes().splitlines()]
    assert sorted(made, key=lambda row: row["id"]) == [row | {"seen": "2026-11-27"} for row in rows]
    # The same documents are held out, whatever form they come in.
    lines = split(write_jsonl(tmp_path / "all.jsonl", documents), tmp_path / "lines", validation=0.1, quiet=True)
    assert read(lines.files["validation"]) == read(report.files["validation"])


def test_a_byte_order_mark_is_of_the_file_and_no_document_s(tmp_path: Path, documents: list[str]) -> None:
    lines = write_jsonl(tmp_path / "all.jsonl", documents[:200]).read_bytes()
    (tmp_path / "all.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    report = split(tmp_path / "all.jsonl", tmp_path / "out", validation=0.1, quiet=True)
    made = [line for path in report.files.values() for line in Path(path).read_bytes().splitlines()]
    assert sorted(made) == sorted(lines.splitlines())


def test_near_duplicates_are_counted_and_dropped(tmp_path: Path, documents: list[str]) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", documents)
    held = read(split(source, tmp_path / "first", validation=0.05, quiet=True).files["validation"])
    kin = [text[:-4] + "後日追記" for text in held]
    extended = write_jsonl(tmp_path / "extended.jsonl", documents + kin)
    kept = split(extended, tmp_path / "kept", validation=0.05, quiet=True)
    in_training = sum(text in set(read(kept.files["train"])) for text in kin)
    assert in_training * 0.95 <= kept.near <= in_training  # MinHash estimates
    assert (kept.exact, kept.dropped) == (0, 0)
    assert f"{kept.near} of the training documents kept are duplicates" in kept.warnings[0]
    dropped = split(extended, tmp_path / "dropped", validation=0.05, drop="near", quiet=True)
    assert dropped.dropped == kept.near == dropped.near
    assert dropped.documents["train"] == kept.documents["train"] - kept.near
    assert dropped.warnings == []


def test_equal_documents_stay_together(tmp_path: Path, documents: list[str]) -> None:
    variants = [text + tail for text in documents[:300] for tail in ("", " \n", "\u3000")]
    report = split(write_jsonl(tmp_path / "all.jsonl", variants), tmp_path / "out", validation=0.1, quiet=True)
    assert report.exact == 0
    assert report.repeated == 2 * report.documents["validation"]
    assert fingerprint("ＡＢＣ  d\n") == fingerprint("abcD") != fingerprint("abce")


def test_given_validation_sets(tmp_path: Path, documents: list[str]) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", documents[:500])
    held = write_jsonl(tmp_path / "held.jsonl", documents[490:520])
    report = split([train, held], tmp_path / "out", validation=held, drop="exact", quiet=True)
    assert (report.exact, report.near, report.dropped) == (10, 0, 10)
    assert read(report.files["train"]) == documents[:490]
    assert list(report.files) == ["train"]


def test_a_set_that_lies_among_the_inputs_by_another_name_is_not_trained_on(
    tmp_path: Path, documents: list[str]
) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "a.jsonl", documents[:100])
    held = write_jsonl(tmp_path / "data" / "b.jsonl", documents[100:120])
    (tmp_path / "link").symlink_to(tmp_path / "data")
    report = split(tmp_path / "data", tmp_path / "out", validation=tmp_path / "link" / "b.jsonl", quiet=True)
    assert read(report.files["train"]) == documents[:100]
    with pytest.raises(CptError, match="have a file in common"):
        split(tmp_path / "data", tmp_path / "both", validation=held, test=tmp_path / "link" / "b.jsonl", quiet=True)


def test_the_same_files_of_which_others_are_held_out_are_another_split(tmp_path: Path, documents: list[str]) -> None:
    a, b, c = (
        write_jsonl(tmp_path / f"{name}.jsonl", documents[at : at + 50])
        for at, name in ((0, "a"), (50, "b"), (100, "c"))
    )
    split([a, b], tmp_path / "out", validation=c, quiet=True)
    assert split([a, b], tmp_path / "out", validation=c, quiet=True).status == "unchanged"
    with pytest.raises(CptError, match="holds another split: of these inputs"):
        split(a, tmp_path / "out", validation=[str(b), str(c)], quiet=True)
    split(a, tmp_path / "both", validation=b, test=c, quiet=True)
    assert split(a, tmp_path / "both", validation=b, test=c, quiet=True).status == "unchanged"
    # Of a split of before, nobody knows which were which.
    report = tmp_path / "out" / "split.json"
    recorded = json.loads(report.read_bytes())
    del recorded["given"]
    report.write_text(json.dumps(recorded))
    assert split([a, b], tmp_path / "out", validation=c, quiet=True).status == "unchanged"


def test_inputs_without_a_document_are_called_that(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(CptError, match="The inputs hold no document"):
        split(tmp_path / "blank.jsonl", tmp_path / "out", on_error="skip", quiet=True)


def test_a_finished_split_is_not_repeated(tmp_path: Path, documents: list[str]) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", documents[:300])
    first = split(source, tmp_path / "out", validation=0.1, quiet=True)
    again = split(source, tmp_path / "out", validation=0.1, quiet=True)
    assert (again.status, again.documents, again.files) == ("unchanged", first.documents, first.files)
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = split(source, tmp_path / "moved", validation=0.1, quiet=True)
    assert moved.files == {name: str(tmp_path / "moved" / f"{name}.jsonl") for name in first.files}
    (tmp_path / "moved").rename(tmp_path / "out")
    (tmp_path / "out" / "train.jsonl").rename(tmp_path / "gone")
    with pytest.raises(CptError, match=r"train\.jsonl is not there any more"):
        split(source, tmp_path / "out", validation=0.1, quiet=True)
    (tmp_path / "gone").rename(tmp_path / "out" / "train.jsonl")
    os.utime(source)  # touched, but the same bytes
    assert split(source, tmp_path / "out", validation=0.1, quiet=True).status == "unchanged"
    with pytest.raises(CptError, match="holds another split"):
        split(source, tmp_path / "out", validation=0.2, quiet=True)
    write_jsonl(source, documents[:301])
    with pytest.raises(CptError, match="holds another split"):
        split(source, tmp_path / "out", validation=0.1, quiet=True)
    assert split(source, tmp_path / "out", validation=0.1, overwrite=True, quiet=True).status == "written"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "split.json",
        "train.jsonl",
        "validation.jsonl",
    ]


def test_bad_lines(tmp_path: Path, documents: list[str]) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", documents[:300])
    with source.open("a") as file:
        file.write('{"txt": 1}\n')
    with pytest.raises(CptError, match=r"all.jsonl, line 301, .*no key 'text'"):
        split(source, tmp_path / "out", validation=0.1, quiet=True)
    assert not (tmp_path / "out").exists()
    report = split(source, tmp_path / "out", validation=0.1, on_error="skip", quiet=True)
    assert report.skipped == {"missing_key": 1}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl", "split.json", ".part/train.jsonl"])
def test_an_input_where_a_set_would_go_is_refused(
    tmp_path: Path, documents: list[str], name: str, overwrite: bool
) -> None:
    (tmp_path / "data" / ".part").mkdir(parents=True)
    source = write_jsonl(tmp_path / "data" / name, documents[:300])
    (tmp_path / "alias").symlink_to(tmp_path / "data")
    before = source.read_bytes()
    with pytest.raises(CptError, match=rf"{name} lies where the split puts its own files. Take another folder"):
        split(source, tmp_path / "alias", validation=0.3, overwrite=overwrite, quiet=True)
    assert source.read_bytes() == before


def test_a_given_validation_set_is_not_deleted(tmp_path: Path, documents: list[str]) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", documents[:300])
    held = write_jsonl(tmp_path / "validation.jsonl", documents[300:320])
    with pytest.raises(CptError, match=r"validation.jsonl lies where the split"):
        split(source, tmp_path, validation=held, overwrite=True, quiet=True)
    assert len(read(str(held))) == 20


def test_foreign_files_are_neither_replaced_nor_deleted(tmp_path: Path, documents: list[str]) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", documents[:300])
    foreign = write_jsonl(tmp_path / "test.jsonl", documents[300:310])
    with pytest.raises(CptError, match=r"holds test.jsonl without a split.json.*overwrite=True"):
        split(source, tmp_path, validation=0.3, quiet=True)
    assert len(read(str(foreign))) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "test.jsonl"]
    split(source, tmp_path, validation=0.3, overwrite=True, quiet=True)
    names = ["all.jsonl", "split.json", "train.jsonl", "validation.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("content", ["{torn", "[1]", '{"train": 1}'])
def test_a_foreign_report_is_refused(tmp_path: Path, documents: list[str], content: str) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", documents[:300])
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(CptError, match=r"split.json is (damaged|not the report of a split)"):
        split(source, tmp_path, validation=0.3, quiet=True)


def test_a_split_killed_while_it_moved_its_sets_is_completed(
    tmp_path: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", documents[:300])
    whole = split(source, tmp_path / "whole", validation=0.2, test=0.1, quiet=True)
    replace = Path.replace

    def stop_at_the_second(path: Path, target: Path) -> Path:
        if path.name == "validation.jsonl":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            split(source, tmp_path / "out", validation=0.2, test=0.1, quiet=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".part", "train.jsonl"]
    (tmp_path / "out" / ".split.lock").touch()  # of the killed process
    report = split(source, tmp_path / "out", validation=0.2, test=0.1, quiet=True)
    assert report.documents == whole.documents
    names = ["split.json", "test.jsonl", "train.jsonl", "validation.jsonl"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all(read(report.files[name]) == read(whole.files[name]) for name in whole.files)


def test_two_splits_into_one_folder_do_not_meet(tmp_path: Path, documents: list[str]) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", documents * 5)

    def first_split(folder: Path) -> None:
        split(source, folder, validation=0.3, workers=1, quiet=True)

    lines = lines_of(lambda: first_split(tmp_path / "counted"), CODE)
    first = paused_at(lines.count // 2, lambda: first_split(tmp_path / "out"), CODE)
    assert (tmp_path / "out" / ".part").exists()
    with pytest.raises(CptError, match=r"Another process is writing this output: it holds .*\.split\.lock"):
        split(source, tmp_path / "out", validation=0.3, workers=1, quiet=True, patience=0)
    go_on(first)
    waited = split(source, tmp_path / "out", validation=0.3, workers=1, quiet=True, patience=60)
    first.join()
    assert (first.exitcode, waited.status) == (0, "unchanged")
    assert sum(len(read(path)) for path in waited.files.values()) + waited.repeated == 5 * len(documents)
    names = ["split.json", "train.jsonl", "validation.jsonl"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_a_full_disk_is_reported(tmp_path: Path, documents: list[str]) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", documents)
    error = error_of_a_full_disk(lambda: split(source, tmp_path / "out", validation=0.1, quiet=True), 100_000)
    assert "Cannot split into" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["file", "file/ja"])
def test_a_file_in_the_way_of_the_folder(tmp_path: Path, documents: list[str], output: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CptError, match=rf"Cannot make the folder .*{output}: (File exists|Not a directory)"):
        split(write_jsonl(tmp_path / "all.jsonl", documents[:300]), tmp_path / output, validation=0.3, quiet=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers is 0; it must be at least 1"),
        ({"workers": -1}, "workers is -1; it must be at least 1"),
        ({"validation": 1.5}, "shares lie between 0 and 1"),
        ({"validation": 0.6, "test": 0.4}, "together below 1"),
        ({"validation": 0}, "Nothing is held out"),
        ({"similarity": 0}, "similarity is 0"),
        ({"similarity": 0.3}, r"similarity is 0.3; it must lie between 0.5 and 1: .* most would not be found"),
        ({"drop": "all"}, "drop is 'all'"),
        ({"validation": 1e-9}, "validation set is empty"),
    ],
)
def test_bad_options(tmp_path: Path, documents: list[str], options: dict, message: str) -> None:
    with pytest.raises(CptError, match=message):
        split(write_jsonl(tmp_path / "all.jsonl", documents[:50]), tmp_path / "out", quiet=True, **options)


def test_minhash_estimates_jaccard(documents: list[str]) -> None:
    one, other = documents[0], documents[0][:80] + documents[1][:40]
    grams = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (one, other)]
    exact = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
    rows = sketches([plain_codes(text) for text in (one, other, one + " ")])
    assert (rows[0] == rows[1]).mean() == pytest.approx(exact, abs=0.15)
    assert (rows[0] == rows[2]).all()


AWKWARD = "がｶﾞカ\u3099e\u0301\u0323\u1112\u1161\u11abÅﬁ①（Ａ\u09c7\u09be\U0001d15e"


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.characters(), st.sampled_from(AWKWARD))))
def test_normalizing_by_pieces_is_normalizing_the_whole(text: str) -> None:
    assert compatible(text) == unicodedata.normalize("NFKC", text)


@given(st.text(max_size=40), st.integers(1, 30))
def test_windows_are_segments_of_one_size(text: str, size: int) -> None:
    mixed = symbols(plain_codes(text))
    starts = np.arange(max(len(mixed) - size + 1, 0))
    assert window_hashes(mixed, size).tolist() == segment_hashes(mixed, starts, starts + size).tolist()


def test_the_sets_of_a_split_are_no_corpus(tmp_path: Path, jsonl: Path, small: Path) -> None:
    report = split(jsonl, tmp_path / "sets", validation=0.1, quiet=True)
    for folder in (tmp_path / "sets", tmp_path):
        with pytest.raises(
            CptError, match=r"what is held out would be trained on.* /.*/train\.jsonl, /.*/validation\.jsonl"
        ):
            prepare(folder, tmp_path / "ds", small, quiet=True)
    assert prepare(report.files["train"], tmp_path / "ds", small, quiet=True).documents == report.documents["train"]
    # Where the held-out set was given, the folder holds the training set alone.
    split(jsonl, tmp_path / "given", validation=report.files["validation"], quiet=True)
    assert prepare(tmp_path / "given", tmp_path / "given_ds", small, quiet=True).documents


def test_what_cannot_be_read_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty.jsonl").touch()
    for inputs, says in (("hf:nobody/nothing", "Cannot open the dataset"), (tmp_path / "empty.jsonl", "is empty")):
        with pytest.raises(CptError, match=says):
            split(inputs, tmp_path / "sets", validation=0.1, quiet=True, workers=1)
        assert not (tmp_path / "sets").exists()
