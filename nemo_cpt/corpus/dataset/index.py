"""Megatron's `.idx` files: read, written and diagnosed without Megatron.

Layout (`megatron/core/datasets/indexed_dataset.py`, v0.15.3), little-endian: `MMIDIDX\\0\\0`, version 1 (u64), dtype
code (u8), number of sequences (u64), number of documents + 1 (u64), then lengths (i32), byte offsets (i64) and document
boundaries (i64).
"""

import glob
import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cpt.arguments import checked
from nemo_cpt.corpus.atomic_files import sync
from nemo_cpt.errors import CptError

MAGIC = b"MMIDIDX\x00\x00"
# "<": without it struct would pad the dtype's byte to eight, and the sizes would be read from the wrong place.
HEADER = struct.Struct("<9sQBQQ")
SUFFIX = "_text_document"
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
CODES = {name: code for code, name in DTYPES.items()}
ITEMSIZE = {"uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "float64": 8, "float32": 4, "uint16": 2}
BLOCK = 1 << 20  # entries handled at once, so that memory does not grow with the corpus
SAMPLE_BYTES = 1 << 16  # of each end of a file, for its fingerprint
ANEW = "`nemo-cpt prepare` with --overwrite makes it anew"  # without it, `prepare` leaves what is there alone
SAMPLE_TOKENS, SAMPLE_PIECES = 1 << 22, 64  # what is looked at of a dataset of which nobody knows its largest id


def dtype_for(vocabulary_size: int) -> str:
    """Return the token type that Megatron's `DType.optimal_dtype` picks: uint16 below 65,500 ids, else int32."""
    return "uint16" if vocabulary_size < 65500 else "int32"


@checked
def full_prefix(prefix: str | os.PathLike[str]) -> str:
    """Return Megatron's prefix (a path without .bin or .idx) for that prefix or for `prepare`'s output prefix.

    `ds/ja` stands for itself where `ds/ja.idx` or `ds/ja.bin` exists; for `ds/ja_KEY_document` where `prepare` made no
    other dataset of it than that of the field KEY; else for `ds/ja_text_document`. It never stands for
    `ds/ja_validation_text_document`, which belongs to the output prefix `ds/ja_validation`.
    """
    text = str(prefix)
    # The shell's completion ends at a file's name; nobody should have to delete four characters.
    if text.endswith((".bin", ".idx")):
        text = text[:-4]
    # In this order: what is on the disk under the very name given goes before every guess.
    if text.endswith(SUFFIX) or _exists(text):
        return text
    others = [] if _exists(text + SUFFIX) else _of_other_keys(text)
    return others[0] if len(others) == 1 else text + SUFFIX


def _exists(full: str) -> bool:
    return any(os.path.exists(full + end) for end in (".idx", ".bin"))


def _of_other_keys(output_prefix: str) -> list[str]:
    """The datasets that `prepare` made for an output prefix, whatever the json_key, by what their manifests say."""
    found = sorted(path[:-4] for path in glob.glob(glob.escape(output_prefix) + "_*_document.idx"))
    # The glob alone also finds `ds/ja_validation_text_document` for `ds/ja`: only the manifest knows where prefix and
    # key meet.
    return [full for full in found if full == f"{output_prefix}_{_json_key(full)}_document"]


def _json_key(full: str) -> Any:
    try:
        return json.loads(Path(full + ".json").read_bytes())["options"]["json_key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Index:
    """What a `.idx` file says.

    Attributes:
        prefix: Megatron's prefix, without .bin or .idx.
        dtype: Name of the tokens' NumPy type, `int32` or `uint16`.
        lengths: Tokens of each sequence, an int32 array of shape [sequences].
        pointers: Byte offset of each sequence in the `.bin`, int64 of shape [sequences].
        document_indices: Sequences before each document's end, int64 of shape [documents + 1].
    """

    prefix: str
    dtype: str
    lengths: Any
    pointers: Any
    document_indices: Any

    @property
    def documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.document_indices) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens, end-of-document tokens included."""
        # int64 said: the lengths are int32, and NumPy would add them up in the platform's own type.
        return int(self.lengths.sum(dtype="int64"))

    @property
    def itemsize(self) -> int:
        """Bytes a token takes on disk."""
        return ITEMSIZE[self.dtype]


@checked
def read_index(prefix: str | os.PathLike[str]) -> Index:
    """Read the `.idx` of a Megatron dataset and check that it and its `.bin` are whole.

    Args:
        prefix: `ds/ja_text_document`, or `prepare`'s output prefix `ds/ja`.

    Raises:
        CptError: A file is missing, foreign, truncated, or the two do not belong together.
    """
    import numpy as np

    full = full_prefix(prefix)
    path = Path(full + ".idx")
    dtype, sequences, boundaries = _read_header(path)
    # A sequence takes 4 bytes for its length and 8 for its pointer, a boundary 8.
    need = HEADER.size + 12 * sequences + 8 * boundaries
    size = path.stat().st_size
    if size < need:
        raise CptError(f"{path} is truncated: {size} bytes, its header announces {need}; {ANEW}.")
    # Mapped, not read: the index of a trillion tokens has gigabytes, of which a blend's check looks at few pages.
    buffer = np.memmap(path, mode="r")

    def column(kind: str, count: int, offset: int) -> Any:
        return np.frombuffer(buffer, dtype=kind, count=count, offset=offset)

    index = Index(
        prefix=full,
        dtype=dtype,
        # The three columns follow one another without padding.
        lengths=column("<i4", sequences, HEADER.size),
        pointers=column("<i8", sequences, HEADER.size + 4 * sequences),
        document_indices=column("<i8", boundaries, HEADER.size + 12 * sequences),
    )
    _check_pair(index)
    return index


def _read_header(path: Path) -> tuple[str, int, int]:
    """Return dtype, number of sequences and number of document boundaries."""
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER.size)
    except FileNotFoundError:
        # The commonest mistakes of all: still being prepared, or another key. The message tells them apart.
        raise CptError(f"There is no {path}{_why_missing(str(path)[:-4])}") from None
    if not raw.startswith(MAGIC):
        raise CptError(f"{path} is not a Megatron index: it starts with {raw[:9]!r}, not {MAGIC!r}; {ANEW}.")
    if len(raw) < HEADER.size:
        raise CptError(f"{path} is truncated: {len(raw)} bytes, not even a header of {HEADER.size}; {ANEW}.")
    _, version, code, sequences, boundaries = HEADER.unpack(raw)
    if version != 1 or code not in DTYPES:
        raise CptError(f"{path} has version {version} and dtype code {code}; known are version 1 and codes 1 to 8.")
    return DTYPES[code], sequences, boundaries


def _why_missing(full: str) -> str:
    """The end of the sentence that begins "There is no PREFIX.idx"."""
    if os.path.exists(full + ".journal"):
        return ": `nemo-cpt prepare` has not finished it. Wait for it, or run the same command again: it resumes."
    if os.path.exists(full + ".bin"):
        return f", but {full}.bin: {ANEW}."
    if others := _of_other_keys(full.removesuffix(SUFFIX)):
        return f", but {' and '.join(others)}: name one of them in full."
    return ". Make it with `nemo-cpt prepare`, or correct the prefix."


def _check_pair(index: Index) -> None:
    """Raise if the `.bin` is missing or is not as long as the index says."""
    path = Path(index.prefix + ".bin")
    if not path.exists():
        raise CptError(f"There is {index.prefix}.idx but no {path}. Restore it; or {ANEW}.")
    # Sizes alone, which cost nothing: bytes are looked at by `inspect`.
    want, have = index.tokens * index.itemsize, path.stat().st_size
    if want != have:
        state = "truncated" if have < want else "longer than its index"
        raise CptError(
            f"{path} is {state}: {have} bytes, the index announces {want} ({index.tokens} tokens of "
            f"{index.itemsize} bytes). The two files do not belong together; {ANEW}."
        )
    if len(index.document_indices) == 0 or index.document_indices[-1] != len(index.lengths):
        raise CptError(f"{index.prefix}.idx is corrupt: its documents do not end at its last sequence; {ANEW}.")


def read_tokens(index: Index, document: int) -> Any:
    """Return the tokens of one document, an array of shape [tokens] in the file's own type."""
    import numpy as np

    first, last = (int(index.document_indices[i]) for i in (document, document + 1))
    count = int(index.lengths[first:last].sum(dtype="int64"))
    if count == 0:
        return np.empty(0, dtype=index.dtype)
    # Read, not mapped: one document a call, and a map of the whole file would stay open as long as the array lives.
    return np.fromfile(index.prefix + ".bin", dtype=index.dtype, count=count, offset=int(index.pointers[first]))


def document_lengths(index: Index) -> Any:
    """Return the tokens of each document, int64 of shape [documents]."""
    import numpy as np

    ends = np.concatenate(([0], np.cumsum(index.lengths, dtype=np.int64)))
    # A document may have several sequences, or none: lengths of sequences are not lengths of documents.
    return np.diff(ends[index.document_indices])


def fingerprint(prefix: str | os.PathLike[str]) -> str:
    """Return a digest by which copies of a dataset are known, of its files' sizes, beginnings and ends.

    Raises:
        CptError: A file is missing or cannot be read.
    """
    full = full_prefix(prefix)
    # Both: the lengths of two corpora may agree where their tokens do not.
    return sample_digest(Path(full + ".idx")) + sample_digest(Path(full + ".bin"))


def sample_digest(path: Path) -> str:
    """Return a digest of a file's size and of `SAMPLE_BYTES` at either end.

    Raises:
        CptError: It is missing or cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(b"%d\n" % size + file.read(SAMPLE_BYTES))
            # For a file shorter than two samples the two overlap, which does no harm.
            file.seek(max(size - SAMPLE_BYTES, 0))
            digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise CptError(f"{path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def largest_id_in_sample(prefix: str | os.PathLike[str]) -> int:
    """Return the largest token id of `SAMPLE_TOKENS` tokens that lie all over a dataset; -1 for one without tokens.

    Raises:
        CptError: As `read_index`.
    """
    import numpy as np

    index = read_index(prefix)
    if not index.tokens:
        return -1
    tokens: Any = np.memmap(index.prefix + ".bin", dtype=index.dtype, mode="r")
    # Negated twice: a division rounded up, so that small datasets are looked at whole.
    pieces = min(SAMPLE_PIECES, -(-len(tokens) // (SAMPLE_TOKENS // SAMPLE_PIECES)))
    size = min(SAMPLE_TOKENS // SAMPLE_PIECES, len(tokens))
    # Pieces all over the file, its beginning and its end among them.
    starts = np.linspace(0, len(tokens) - size, pieces, dtype=np.int64)
    return max(int(tokens[start : start + size].max()) for start in starts)


@checked
def max_token_id(prefix: str | os.PathLike[str]) -> int:
    """Return the largest token id of a dataset, -1 for one without tokens; reads the whole `.bin` (about 2 GB/s).

    An id at or above the model's vocabulary size means that the dataset was made with another tokenizer.

    Raises:
        CptError: As `read_index`.
    """
    import numpy as np

    index = read_index(prefix)
    highest = -1
    with open(index.prefix + ".bin", "rb") as file:
        while len(block := np.fromfile(file, dtype=index.dtype, count=BLOCK)):
            highest = max(highest, int(block.max()))
    return highest


def write_index(path: Path, lengths: Path, dtype: str) -> None:
    """Write a whole `.idx` at `path` (beside, fsync, rename) from a file of int32 document lengths.

    A length of 0 is an empty document: it has a document boundary and no sequence, as in Megatron's builder.
    """
    import numpy as np

    # Block by block, in several passes over the lengths: memory stays flat whatever the corpus' size.
    lens = np.memmap(lengths, dtype="<i4", mode="r") if lengths.stat().st_size else np.empty(0, "<i4")
    sequences = sum(int(np.count_nonzero(lens[i : i + BLOCK])) for i in range(0, len(lens), BLOCK))
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, CODES[dtype], sequences, len(lens) + 1))
        for i in range(0, len(lens), BLOCK):
            block = lens[i : i + BLOCK]
            file.write(block[block > 0].tobytes())
        _write_pointers(file, lens, ITEMSIZE[dtype])
        _write_boundaries(file, lens)
        file.flush()
        os.fsync(file.fileno())
    # The `.idx` comes last of a dataset's files: where it is, all are whole.
    partial.rename(path)
    sync(path.parent)


def _write_pointers(file: Any, lens: Any, itemsize: int) -> None:
    """Write each sequence's byte offset in the `.bin`."""
    import numpy as np

    start = 0
    for i in range(0, len(lens), BLOCK):
        block = lens[i : i + BLOCK]
        # int64 before the product: int32 byte offsets would overflow at 2 GiB.
        ends = np.cumsum(block[block > 0].astype("<i8") * itemsize)
        if len(ends):
            file.write((np.concatenate(([0], ends[:-1])) + start).astype("<i8").tobytes())
            start += int(ends[-1])


def _write_boundaries(file: Any, lens: Any) -> None:
    """Write the number of sequences before each document's end, starting with 0."""
    import numpy as np

    # One more boundary than documents: document i lies between boundaries i and i + 1.
    file.write(struct.pack("<q", 0))
    count = 0
    for i in range(0, len(lens), BLOCK):
        ends = np.cumsum(lens[i : i + BLOCK] > 0, dtype="<i8") + count
        file.write(ends.astype("<i8").tobytes())
        count = int(ends[-1])
