"""Megatron's .idx files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_cpt.corpus import full_prefix, max_token_id, read_index
from nemo_cpt.corpus.dataset.index import (
    SAMPLE_TOKENS,
    dtype_for,
    fingerprint,
    largest_id_in_sample,
    read_tokens,
    write_index,
)
from nemo_cpt.errors import CptError
from tests.support.corpus_helpers import same_files


def write_pair(prefix: Path, documents: list[list[int]], dtype: str) -> Path:
    lengths = prefix.with_name("lens")
    lengths.write_bytes(np.array([len(ids) for ids in documents], "<i4").tobytes())
    Path(f"{prefix}.bin").write_bytes(np.array([i for ids in documents for i in ids], dtype).tobytes())
    write_index(Path(f"{prefix}.idx"), lengths, dtype)
    return prefix


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_equals_megatrons_builder(tmp_path: Path, dtype: str) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = [[1, 2, 3], [], [40000], [5] * 1000, []]
    ours = write_pair(tmp_path / "ours", documents, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for ids in documents:
        builder.add_document(torch.IntTensor(ids), [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert same_files(ours, tmp_path / "theirs")

    index = read_index(ours)
    theirs = IndexedDataset(str(ours))
    assert (index.dtype, index.documents, index.tokens) == (dtype, 5, 1004)
    assert index.lengths.tolist() == theirs.sequence_lengths.tolist()
    assert [read_tokens(index, number).tolist() for number in range(5)] == documents
    assert max_token_id(ours) == 40000


def test_dtype_is_megatrons() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (1, 49152, 65499, 65500, 128256):
        assert dtype_for(size) == DType.optimal_dtype(size).__name__


def made_of(prefix: Path, json_key: str) -> Path:
    """A dataset with the part of a manifest that names its field."""
    Path(f"{prefix}.json").write_text(json.dumps({"options": {"json_key": json_key}}))
    return write_pair(prefix, [[1]], "int32")


def test_prefixes_resolve(tmp_path: Path) -> None:
    assert full_prefix("ds/ja") == full_prefix("ds/ja_text_document") == "ds/ja_text_document"
    write_pair(tmp_path / "plain", [[1]], "int32")
    assert full_prefix(tmp_path / "plain") == str(tmp_path / "plain") == full_prefix(tmp_path / "plain.idx")
    made_of(tmp_path / "en_content_document", "content")
    assert full_prefix(tmp_path / "en") == str(tmp_path / "en_content_document")
    made_of(tmp_path / "de_first_body_document", "first_body")
    assert full_prefix(tmp_path / "de") == str(tmp_path / "de_first_body_document")


def test_a_prefix_is_never_another_dataset(tmp_path: Path) -> None:
    for name in ("ja_validation", "ja_wiki"):
        made_of(tmp_path / f"{name}_text_document", "text")
        assert full_prefix(tmp_path / "ja") == str(tmp_path / "ja_text_document")
    write_pair(tmp_path / "en_content_document", [[1]], "int32")  # by another program: it may be `en_content`'s, too
    assert full_prefix(tmp_path / "en") == str(tmp_path / "en_text_document")
    made_of(tmp_path / "en_content_document", "content")
    made_of(tmp_path / "en_text_document", "text")
    assert full_prefix(tmp_path / "en") == str(tmp_path / "en_text_document")


def test_a_dataset_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CptError, match=r"no .*ja_text_document\.idx\. Make it with `nemo-cpt prepare`"):
        read_index(tmp_path / "ja")
    (tmp_path / "ja_text_document.journal").touch()
    with pytest.raises(CptError, match=r"ja_text_document\.idx: `nemo-cpt prepare` has not finished it"):
        read_index(tmp_path / "ja")
    for key in ("content", "title"):
        made_of(tmp_path / f"en_{key}_document", key)
    with pytest.raises(CptError, match=r"but .*en_content_document and .*en_title_document: name one of them in full"):
        read_index(tmp_path / "en")


def test_copies_and_links_have_one_fingerprint(tmp_path: Path) -> None:
    documents = [[number % 50_000, 1] for number in range(40_000)]
    one = write_pair(tmp_path / "one", documents, "int32")
    for end in (".idx", ".bin"):
        shutil.copy(f"{one}{end}", tmp_path / f"copy{end}")
        (tmp_path / f"link{end}").symlink_to(f"{one}{end}")
    assert fingerprint(one) == fingerprint(tmp_path / "copy") == fingerprint(tmp_path / "link")
    for number in (0, len(documents) - 1):  # the same lengths, another token
        other = write_pair(tmp_path / "other", [*documents[:number], [7, 1], *documents[number + 1 :]], "int32")
        assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("size", [1, 65_536, 100_000, SAMPLE_TOKENS])
def test_a_sample_of_a_small_dataset_is_all_of_it(tmp_path: Path, size: int) -> None:
    for place in (0, size // 2, size - 1):
        tokens = np.zeros(size, "uint16")
        tokens[place] = 9
        tokens.tofile(tmp_path / "x.bin")
        np.array([size], "<i4").tofile(tmp_path / "lens")
        write_index(tmp_path / "x.idx", tmp_path / "lens", "uint16")
        assert largest_id_in_sample(tmp_path / "x") == 9


def damage(kind: str, prefix: Path) -> None:
    idx, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    actions = {
        "no idx": idx.unlink,
        "no bin": tokens.unlink,
        "short idx": lambda: idx.write_bytes(idx.read_bytes()[:-3]),
        "no header": lambda: idx.write_bytes(idx.read_bytes()[:20]),
        "foreign": lambda: idx.write_bytes(b"PK\x03\x04" + bytes(100)),
        "version": lambda: idx.write_bytes(idx.read_bytes().replace(b"\x01", b"\x02", 1)),
        "short bin": lambda: tokens.write_bytes(tokens.read_bytes()[:-4]),
        "long bin": lambda: tokens.write_bytes(tokens.read_bytes() + b"1234"),
    }
    actions[kind]()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no idx", "There is no .*x_text_document.idx"),
        ("no bin", "no .*x_text_document.bin"),
        ("short idx", r"truncated: \d+ bytes, its header announces"),
        ("no header", "truncated: 20 bytes"),
        ("foreign", "not a Megatron index"),
        ("version", "version 2"),
        ("short bin", "truncated: 12 bytes, the index announces 16"),
        ("long bin", "longer than its index"),
    ],
)
def test_damage_is_diagnosed(tmp_path: Path, kind: str, message: str) -> None:
    prefix = write_pair(tmp_path / "x_text_document", [[1, 2], [3, 4]], "int32")
    assert read_index(prefix).tokens == 4
    damage(kind, prefix)
    with pytest.raises(CptError, match=message):
        read_index(tmp_path / "x")
