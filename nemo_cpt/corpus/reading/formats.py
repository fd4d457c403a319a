"""What a file is, told by its bytes: names lie more often than contents."""

import os
import re
import shlex
import stat
from contextlib import suppress

from nemo_cpt.corpus.reading.decompression import DamagedError, unpack
from nemo_cpt.errors import CptError

HEAD = 4096
BOM = b"\xef\xbb\xbf"
_SKIPPABLE_FRAMES = tuple(bytes([number]) + b"\x2a\x4d\x18" for number in range(0x50, 0x60))  # pzstd begins with one
_READ = {"gzip": (b"\x1f\x8b",), "zstd": (b"\x28\xb5\x2f\xfd", *_SKIPPABLE_FRAMES), "parquet": (b"PAR1",)}
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*[{\]]")
_BY_NAME = {".txt": "text", ".text": "text", ".md": "text", ".markdown": "text", ".csv": "csv", ".tsv": "csv"}
_UNPACK = "Unpack it first"
_CONVERT = "Write its texts to JSON lines or Parquet first"
# In this order: UTF-32's mark begins with UTF-16's, and would be taken for it.
_FOREIGN = (  # what it begins with, what it is, what to do
    (b"\xfd7zXZ\x00", "xz", f"{_UNPACK}: xz -dk FILE"),
    (b"BZh", "bzip2", f"{_UNPACK}: bzip2 -dk FILE (a dump of Wikipedia: nemo-cpt fetch FILE)"),
    (b"PK\x03\x04", "a zip archive", f"{_UNPACK}: unzip FILE"),
    (b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", f"{_UNPACK}: 7z x FILE"),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "lz4", f"{_UNPACK}: lz4 -dk FILE"),
    (b"\xff\x06\x00\x00sNaPpY", "snappy", _UNPACK),
    (b"\x1f\x9d", "compress (.Z)", f"{_UNPACK}: uncompress -k FILE"),
    (b"\x5d\x00\x00", "lzma", f"{_UNPACK}: xz -dk --format=lzma FILE"),
    (b"PARE", "an encrypted Parquet file", "Decrypt it first"),
    (b"ARROW1", "an Arrow file", "Name the folder that `datasets` saved it in, or convert it to Parquet"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "Name the folder that `datasets` saved it in, or convert it to Parquet"),
    (b"ORC", "an ORC file", _CONVERT),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"\x89HDF", "an HDF5 file", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"SQLite format 3", "an SQLite database", _CONVERT),
    (b"%PDF-", "a PDF", "Write its text to a file first: pdftotext FILE"),
    (b"MMIDIDX", "the index of a dataset that is prepared already", "Name the text that it was made of"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "Get them with `git lfs pull`"),
    (b"\xff\xfe\x00\x00", "UTF-32", "Convert it: iconv -f UTF-32 -t UTF-8 FILE"),
    (b"\x00\x00\xfe\xff", "UTF-32", "Convert it: iconv -f UTF-32 -t UTF-8 FILE"),
    (b"\xff\xfe", "UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8 FILE"),
    (b"\xfe\xff", "UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8 FILE"),
)


def recognise(path: str) -> tuple[str, bool]:
    """Say how a file is read: its kind, and whether its text is a JSON array.

    The kind is `plain` (JSON lines), `gzip`, `zstd`, `parquet`; of what is no JSON by its first byte, `text` or `csv`
    where the name says so, because nothing else tells them from JSON lines gone wrong.

    Raises:
        CptError: It is of a format that is not read, or no file that can be read twice.
        OSError: It cannot be read.
    """
    # Hashing, sampling, encoding and a resumed run each read from the beginning; a pipe has only one.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CptError(f"{path} is a pipe or a device, and inputs are read more than once. Write it to a file first.")
    if path.endswith(".part") and os.path.exists(path + ".json"):
        raise CptError(f"{path} is an unfinished download; the same `nemo-cpt fetch` continues it.")
    with open(path, "rb") as file:
        head = file.read(HEAD)
    kind = _kind(head)
    if kind == "parquet":
        return kind, False
    if kind != "plain":
        head = first_bytes(path, kind)
        # Packed twice: the outer layer would be taken off, and the inner one encoded as text.
        if (inner := _kind(head)) != "plain":
            raise CptError(f"{path} is a {inner} file inside a {kind} file. {_UNPACK}.")
    if foreign := _foreign(head):
        what, cure = foreign
        where = "is" if kind == "plain" else f"is a {kind} file that holds"
        raise CptError(f"{path} {where} {what}, which is not read. {cure.replace('FILE', shlex.quote(path))}.")
    array = bool(_ARRAY.match(head))
    # The name decides last: a .txt that holds JSON lines is JSON lines.
    if kind == "plain" and not (array or head.removeprefix(BOM).lstrip().startswith(b"{")):
        kind = _BY_NAME.get(os.path.splitext(path)[1].lower(), kind)
    return kind, array


def _kind(head: bytes) -> str:
    return next((kind for kind, magics in _READ.items() if head.startswith(magics)), "plain")


def _foreign(head: bytes) -> tuple[str, str] | None:
    """Return what a file is that is neither text nor read, and what to do; None for text."""
    for magic, what, cure in _FOREIGN:
        if head.startswith(magic):
            return what, cure
    if head[257:262] == b"ustar":
        return "a tar archive", f"{_UNPACK}: tar -xf FILE"
    # No text of UTF-8 has one, and a file that a crash tore often ends in a block of them.
    if b"\0" in head:
        return "binary, or UTF-16 without a byte order mark, or was torn by a crash (it holds NUL bytes)", _CONVERT
    return None


def first_bytes(path: str, kind: str) -> bytes:
    """Return the beginning of a file's content, decompressed; what there is of it where that fails."""
    head = b""
    with open(path, "rb") as file, suppress(DamagedError):
        for piece in unpack(file, kind, HEAD):
            head += piece
            if len(head) >= HEAD:
                break
    return head[:HEAD]


def resemblance(head: bytes) -> str:
    """Return what a text seems to be that is no JSON lines, and what to do, as sentences; "" where it is not known."""
    # "replace": the head may end inside a character.
    text = head.removeprefix(BOM).decode("utf-8", "replace").lstrip()
    first, _, rest = text.partition("\n")
    second = rest.partition("\n")[0]
    if text.startswith("<"):
        return "It seems to be XML or HTML; of a dump of Wikipedia, as .xml.bz2, `nemo-cpt fetch` makes JSON lines. "
    if "\r" in first.rstrip("\r"):
        return "Its lines end in CR alone: convert them with `tr '\\r' '\\n'`. "
    if re.match(r"\{\s*$", first) or (first.startswith("{") and re.match(r"[\s\]},]", rest)):
        return "It seems to be one JSON value over several lines: `jq -c .` writes one on each line. "
    if re.search(r"\}\s*\{", first):
        return "Its first line seems to hold several JSON objects: `jq -c .` writes one on each line. "
    for delimiter, name in ((",", "CSV"), ("\t", "TSV"), (";", "CSV with semicolons")):
        columns, others = (line.rstrip("\r").split(delimiter) for line in (first, second))
        if len(columns) == len(others) > 1 and all(len(column) < 30 for column in columns) and first[0] not in "{[":
            return (
                f"It seems to be {name} with the columns {', '.join(columns[:8])}: under a name that ends in .csv or "
                ".tsv, and not compressed, it is read as such. "
            )
    if first and first[0] not in "{[":
        return "It seems to be plain text: under a name that ends in .txt, and not compressed, it is one document. "
    return ""
