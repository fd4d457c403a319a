"""Text to Megatron datasets: the same bytes as the reference, whatever the format, the workers and the chunks."""

import gc
import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from nemo_cpt.corpus import prepare, read_index, read_manifest
from nemo_cpt.corpus.dataset.index import read_tokens
from nemo_cpt.errors import CptError
from tests.support.corpus_helpers import same_files, write_jsonl, write_reference


@pytest.fixture(scope="module")
def odd(texts: list[str]) -> list[str]:
    """The texts among odder ones: empty, long, special tokens' names, all kinds of characters."""
    characters = "aé語ｶ゛\u3099👍🏽\u200d \u3000\t\n\r\x00\u0301𠮷ﬁ1٣"
    noise = random.Random(7)
    made = ["".join(noise.choices(characters, k=noise.randrange(80))) for _ in range(300)]
    return [*texts[:40], "", " ", "a" * 5000, "<|end_of_text|> <eos> </s>", *made, "", "語" * 3000, *texts[40:]]


@pytest.fixture(scope="module")
def references(
    tmp_path_factory: pytest.TempPathFactory, odd: list[str], llama3: Path, small: Path, sentencepiece: Path, byt5: Path
) -> dict[str, tuple[Path, Path]]:
    """Folder and reference dataset of each tokenizer."""
    folder = tmp_path_factory.mktemp("references")
    tokenizers = {"llama3": llama3, "small": small, "sentencepiece": sentencepiece, "byt5": byt5}
    return {name: (path, write_reference(folder / name, odd, path)) for name, path in tokenizers.items()}


@pytest.mark.parametrize("name", ["llama3", "small", "sentencepiece", "byt5"])
@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_are_the_references(
    tmp_path: Path, odd: list[str], references: dict[str, tuple[Path, Path]], name: str, workers: int
) -> None:
    tokenizer, reference = references[name]
    source = write_jsonl(tmp_path / "odd.jsonl", odd)
    report = prepare(
        source, tmp_path / "ds" / "odd", tokenizer, workers=workers, chunk_bytes=10_000, quiet=True, verify=40
    )
    assert same_files(report.prefix, reference)
    assert (report.status, report.verified) == ("written", 40)
    assert report.empty == len(odd) - read_index(reference).documents >= 2
    assert report.dtype == ("int32" if name == "llama3" else "uint16")
    assert ("fastokens" in report.encoder.split(":")[0]) == (name in ("llama3", "small"))
    assert not list((tmp_path / "ds").glob("*.part")) + list((tmp_path / "ds").glob("*.journal"))


def test_reference_encoder_and_any_chunk_size_give_the_same_bytes(
    tmp_path: Path, odd: list[str], references: dict[str, tuple[Path, Path]]
) -> None:
    tokenizer, reference = references["small"]
    source = write_jsonl(tmp_path / "odd.jsonl", odd)
    for number, chunk_bytes in enumerate([64, 4096, 1 << 22]):
        report = prepare(
            source, tmp_path / str(number), tokenizer, fast=number > 0, chunk_bytes=chunk_bytes, workers=2, quiet=True
        )
        assert same_files(report.prefix, reference)


def test_empty_documents_can_be_kept_as_megatron_does(tmp_path: Path, odd: list[str], small: Path) -> None:
    reference = write_reference(tmp_path / "reference", odd, small, keep_empty=True)
    source = write_jsonl(tmp_path / "odd.jsonl", odd)
    report = prepare(
        source, tmp_path / "odd", small, keep_empty_documents=True, chunk_bytes=5000, quiet=True, verify=999
    )
    assert same_files(report.prefix, reference)
    assert report.documents == len(odd) == report.verified


def as_gzip(path: Path, content: bytes) -> Path:
    half = content.index(b"\n", len(content) // 2) - 5  # two members, cut within a line
    path.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    return path


def as_zstd(path: Path, content: bytes) -> Path:
    half = len(content) // 2
    path.write_bytes(b"".join(zstandard.compress(part) for part in (content[:half], content[half:])))
    return path


def as_parquet(path: Path, content: bytes) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(
        pa.Table.from_pylist([json.loads(line) for line in content.splitlines()]), path, row_group_size=70
    )
    return path


def as_dataset(path: Path, content: bytes) -> Path:
    import datasets

    rows = [json.loads(line) for line in content.splitlines()]
    datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=2)
    return path


@pytest.mark.parametrize("write", [as_gzip, as_zstd, as_parquet, as_dataset])
def test_formats_give_the_same_bytes(
    tmp_path: Path, odd: list[str], references: dict[str, tuple[Path, Path]], write: Callable[[Path, bytes], Path]
) -> None:
    tokenizer, reference = references["small"]
    plain = write_jsonl(tmp_path / "odd.jsonl", odd).read_bytes()
    source = write(tmp_path / "packed", plain)
    report = prepare(source, tmp_path / "ds", tokenizer, chunk_bytes=9_000, quiet=True, verify=20)
    assert same_files(report.prefix, reference)
    assert prepare(source, tmp_path / "ds", tokenizer, quiet=True).status == "unchanged"


def test_folders_globs_and_lists_keep_a_fixed_order(tmp_path: Path, texts: list[str], small: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", texts[10:20])
    write_jsonl(folder / "deeper" / "c.jsonl", texts[20:30])
    as_gzip(folder / "a.jsonl.gz", write_jsonl(tmp_path / "a", texts[:10]).read_bytes())
    (folder / "README.md").write_text("not data")
    reference = write_reference(tmp_path / "reference", texts[:30], small)
    forms = [folder, [folder / "a.jsonl.gz", str(folder / "b.jsonl"), folder / "deeper"], f"{folder}/**/*.jsonl*"]
    for number, inputs in enumerate(forms):
        report = prepare(inputs, tmp_path / f"out{number}", small, quiet=True)
        assert same_files(report.prefix, reference)


def test_special_tokens_in_the_text(tmp_path: Path, llama3: Path) -> None:
    texts = ["one <|end_of_text|> two<|end_of_text|>", "three <|eot_id|>", "four"]
    source = write_jsonl(tmp_path / "special.jsonl", texts)
    report = prepare(source, tmp_path / "a", llama3, quiet=True)
    assert report.special_tokens == {"<|end_of_text|>": 2, "<|eot_id|>": 1}
    assert "<|end_of_text|> 2 times" in report.warnings[0]
    assert report.markers == {"eod": ["<|end_of_text|>", 128001], "bos": None}

    split = prepare(source, tmp_path / "b", llama3, split_special_tokens=True, verify=3, quiet=True)
    assert (split.special_tokens, split.warnings, split.verified) == ({}, [], 3)
    assert split.tokens > report.tokens


def test_markers(tmp_path: Path, small: Path) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", ["one", "two"])
    usual = prepare(source, tmp_path / "a", small, quiet=True)
    assert usual.markers == {"eod": ["<eos>", 1], "bos": None}
    marked = prepare(source, tmp_path / "b", small, prepend_bos=True, eod_token="<bos>", quiet=True, verify=2)
    tokens = read_tokens(read_index(marked.prefix), 1).tolist()
    assert (tokens[0], tokens[-1], marked.tokens) == (0, 0, usual.tokens + 2)
    assert marked.markers == {"eod": ["<bos>", 0], "bos": ["<bos>", 0]}
    bare = prepare(source, tmp_path / "c", small, append_eod=False, quiet=True)
    assert bare.tokens == usual.tokens - 2


def test_a_long_document_stays_whole_and_is_mentioned_once(tmp_path: Path, llama3: Path) -> None:
    source = write_jsonl(tmp_path / "long.jsonl", ["い、" * 140_000, "short", "ろ、" * 140_000])
    report = prepare(source, tmp_path / "long", llama3, quiet=True)
    assert report.documents == 3
    assert report.longest > 131072
    assert sum("stays whole" in warning for warning in report.warnings) == 1


def test_a_finished_job_is_not_repeated(tmp_path: Path, jsonl: Path, small: Path) -> None:
    first = prepare(jsonl, tmp_path / "ds", small, quiet=True)
    stamp = os.stat(f"{first.prefix}.bin").st_mtime_ns
    again = prepare(jsonl, tmp_path / "ds", small, quiet=True, workers=1)
    assert (again.status, again.tokens) == ("unchanged", first.tokens)
    os.utime(jsonl)  # touched, but the same bytes
    moved = jsonl.rename(tmp_path / "moved.jsonl")
    assert prepare(moved, tmp_path / "ds", small, quiet=True).status == "unchanged"
    assert os.stat(f"{first.prefix}.bin").st_mtime_ns == stamp

    manifest = read_manifest(tmp_path / "ds")
    assert manifest["tokenizer"]["vocabulary_size"] == 600
    assert len(manifest["tokenizer"]["sha256"]) == 64
    assert manifest["inputs"][0]["size"] == moved.stat().st_size


def test_another_job_is_refused_and_overwrite_replaces(tmp_path: Path, jsonl: Path, small: Path, llama3: Path) -> None:
    first = prepare(jsonl, tmp_path / "ds", small, quiet=True)
    with pytest.raises(CptError, match="tokenizer_sha256"):
        prepare(jsonl, tmp_path / "ds", llama3, quiet=True)
    with pytest.raises(CptError, match=r"eod is \d+, not None"):
        prepare(jsonl, tmp_path / "ds", small, append_eod=False, quiet=True)
    with jsonl.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(CptError, match=r"is not the .* bytes that it was made of"):
        prepare(jsonl, tmp_path / "ds", small, quiet=True)
    second = prepare(jsonl, tmp_path / "ds", small, overwrite=True, quiet=True)
    assert (second.status, second.documents) == ("written", first.documents + 1)


def test_a_foreign_dataset_is_not_replaced(tmp_path: Path, jsonl: Path, small: Path) -> None:
    write_reference(tmp_path / "ds_text_document", ["a"], small)
    with pytest.raises(CptError, match="has no manifest"):
        prepare(jsonl, tmp_path / "ds", small, quiet=True)


def test_verify_notices_a_wrong_token(tmp_path: Path, jsonl: Path, small: Path) -> None:
    report = prepare(jsonl, tmp_path / "ds", small, quiet=True)
    with open(f"{report.prefix}.bin", "r+b") as file:
        file.seek(report.tokens)  # somewhere in the middle: two bytes a token
        file.write(b"\x07\x00")
    with pytest.raises(CptError, match=r"is not what transformers .* gives for its text"):
        prepare(jsonl, tmp_path / "ds", small, verify=report.documents, quiet=True)


@pytest.mark.parametrize("end", [".bin", ".idx", "truncated"])
def test_a_dataset_that_lost_a_file_is_made_again_as_the_message_says(
    tmp_path: Path, small: Path, texts: list[str], end: str
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts[:5])
    prefix = prepare(source, tmp_path / "ds", small, workers=1, quiet=True).prefix
    whole = Path(f"{prefix}.bin").read_bytes()
    if end == "truncated":
        Path(f"{prefix}.bin").write_bytes(whole[:8])
    else:
        Path(prefix + end).unlink()
    with pytest.raises(CptError, match="`nemo-cpt prepare` with --overwrite makes it anew"):
        prepare(source, tmp_path / "ds", small, workers=1, quiet=True)
    assert prepare(source, tmp_path / "ds", small, workers=1, quiet=True, overwrite=True).status == "written"
    assert Path(f"{prefix}.bin").read_bytes() == whole
    read_index(prefix)


def test_a_failed_preparation_leaves_no_empty_folder(tmp_path: Path, small: Path) -> None:
    (tmp_path / "a.jsonl").write_text("no JSON\n")
    with pytest.raises(CptError, match="line 1"):
        prepare(tmp_path / "a.jsonl", tmp_path / "new" / "ds", small, workers=1, quiet=True)
    assert not (tmp_path / "new").exists()


def test_what_the_caller_has_frozen_stays_frozen(tmp_path: Path, jsonl: Path, small: Path) -> None:
    """As a server does before it forks: nothing here unfreezes it."""
    gc.freeze()
    frozen = gc.get_freeze_count()
    prepare(jsonl, tmp_path / "ds", small, workers=2, quiet=True)
    assert 0 < gc.get_freeze_count() <= frozen  # some of it has gone meanwhile
