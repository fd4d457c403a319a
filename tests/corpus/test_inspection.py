"""Inspection of datasets, sound and damaged."""

import struct
from pathlib import Path

import pytest

from nemo_cpt.corpus import inspect, prepare
from nemo_cpt.corpus.dataset.index import HEADER
from nemo_cpt.errors import CptError


@pytest.fixture
def dataset(tmp_path: Path, jsonl: Path, small: Path) -> Path:
    prepare(jsonl, tmp_path / "ds", small, quiet=True)
    return tmp_path / "ds"


def test_numbers_and_samples(dataset: Path, small: Path, texts: list[str]) -> None:
    report = inspect(dataset, small, samples=len(texts))
    assert report.documents == len(texts) == sum(entry[2] for entry in report.histogram)
    assert report.tokens == sum(entry[3] for entry in report.histogram) == report.nbytes // 2
    assert report.percentiles[0] <= report.percentiles[50] <= report.percentiles[100] < report.histogram[-1][1] + 1
    assert report.end == {"id": 1, "text": "<eos>", "share": 1.0}
    assert (report.vocabulary_size, report.dtype, report.empty, report.warnings) == (600, "uint16", 0, [])
    for sample in report.samples:  # a cut after 64 tokens may end within a character
        assert texts[sample["document"]].startswith(sample["text"].removesuffix("<eos>").rstrip("\ufffd"))
    assert "probes" in report.manifest
    assert "probes" not in repr(report)


def test_another_tokenizer_is_noticed(dataset: Path, llama3: Path, tmp_path: Path, jsonl: Path, small: Path) -> None:
    assert "vocabulary files differ" in inspect(dataset, llama3, samples=0).warnings[0]
    large = prepare(jsonl, tmp_path / "large", llama3, quiet=True)
    with pytest.raises(CptError, match=r"token id 12\d+, but .* has a vocabulary of 600"):
        inspect(large.prefix, small)


def test_a_negative_number_of_samples_is_refused(dataset: Path) -> None:
    with pytest.raises(CptError, match="samples is -1"):
        inspect(dataset, samples=-1)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("lengths", "truncated|longer"),
        ("pointers", "sequence 2 does not begin"),
        ("boundaries", "boundaries|do not end"),
    ],
)
def test_a_corrupt_index_is_diagnosed(dataset: Path, texts: list[str], place: str, message: str) -> None:
    path = Path(f"{dataset}_text_document.idx")
    content = bytearray(path.read_bytes())
    offset = {"lengths": 8, "pointers": 4 * len(texts) + 16, "boundaries": 12 * len(texts) + 16}[place]
    struct.pack_into("<i", content, HEADER.size + offset, 99_999_999)
    path.write_bytes(content)
    with pytest.raises(CptError, match=message):
        inspect(dataset)
