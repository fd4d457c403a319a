"""Megatron's .idx files."""

from pathlib import Path

import numpy as np
import pytest
from corpus_helpers import same_files
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_cpt.corpus import full_prefix, max_token_id, read_index
from nemo_cpt.corpus.index import dtype_for, read_tokens, write_index
from nemo_cpt.errors import CptError


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


def test_prefixes_resolve(tmp_path: Path) -> None:
    assert full_prefix("ds/ja") == full_prefix("ds/ja_text_document") == "ds/ja_text_document"
    write_pair(tmp_path / "plain", [[1]], "int32")
    assert full_prefix(tmp_path / "plain") == str(tmp_path / "plain") == full_prefix(tmp_path / "plain.idx")
    write_pair(tmp_path / "en_content_document", [[1]], "int32")
    assert full_prefix(tmp_path / "en") == str(tmp_path / "en_content_document")


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
