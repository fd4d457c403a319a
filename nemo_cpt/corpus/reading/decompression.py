"""The bytes of a file as JSON lines: decompressed, and of a JSON array as lines of the same length."""

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, Protocol

PIECE = 1 << 16  # compressed bytes taken at once: at most some 64 MiB come out of them
_IN_A_STRING = re.compile(rb'["\\]')
_OUTSIDE = re.compile(rb'["\[\]{},\n]')


class DamagedError(Exception):
    """A file ends or breaks somewhere; what came before it is good."""


class Readable(Protocol):
    """A file read forward."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, none at the end."""

    def tell(self) -> int:
        """Return how many bytes were read."""


def unpack(file: Readable, kind: str, piece_bytes: int = PIECE) -> Iterator[bytes]:
    """Decompress a gzip or zstd file, also one of several members or frames, and notice a missing end.

    Args:
        file: What to read, from its beginning.
        kind: `gzip` or `zstd`; anything else is handed on as it is.
        piece_bytes: Bytes read at once.

    Raises:
        DamagedError: The compressed data break, or end too early.
    """
    if kind not in ("gzip", "zstd"):
        while piece := file.read(piece_bytes):
            yield piece
        return
    import zlib

    import zstandard
    from isal import igzip_lib

    stream = _decompressor(kind)
    rest, begun = b"", False  # `begun`: a member is open, and the file must not end here
    try:
        while piece := rest or file.read(piece_bytes):
            if kind == "gzip" and not begun and not (piece := piece.lstrip(b"\0")):
                rest = b""  # padding between members, or behind the last, which tapes had
                continue
            begun = True
            # One piece in, all of its bytes out: `PIECE` bounds what a bomb of zeros may take of the memory.
            yield stream.decompress(piece)
            # What follows a member or frame in the same piece is the beginning of the next one.
            rest = stream.unused_data
            if stream.eof:
                stream, begun = _decompressor(kind), False
    except (zlib.error, igzip_lib.IsalError, zstandard.ZstdError) as error:  # type: ignore[misc]
        raise DamagedError(f"the {kind} file breaks near its byte {file.tell()}: {error}") from error
    if begun:
        # Only here: a cut member raises nothing, its decompressor just waits for more.
        raise DamagedError(f"the {kind} file ends at byte {file.tell()}, before the end of its data")


def _decompressor(kind: str) -> Any:
    if kind == "gzip":
        from isal import isal_zlib

        return isal_zlib.decompressobj(wbits=31)
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def array_to_lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Turn a JSON array into JSON lines in which every element keeps its bytes and their places.

    The array's brackets and the line breaks between its tokens become spaces, the commas between its elements line
    breaks. What stands in strings is not touched, so that text which is no JSON stays none.

    Raises:
        DamagedError: The array has no end, or something follows it.
    """
    depth, in_string, place = 0, False, 0
    start = 0  # a backslash at the end of a piece takes the next one's first byte with it
    for piece in pieces:
        # Every byte keeps its place, so that a problem's offset is one of the user's file.
        lines, at = bytearray(piece), start
        # By regular expressions, which skip what matters to neither state in C; a loop over bytes would be the slowest
        # part of all.
        while token := (_IN_A_STRING if in_string else _OUTSIDE).search(piece, at):
            begin, at, kind = token.start(), token.end(), token.group()
            if kind == b'"':
                in_string = not in_string
            elif kind == b"\\":
                at += 1
            elif kind in b"[{":
                depth += 1
                lines[begin] = ord(" ") if depth == 1 else lines[begin]
            elif kind in b"]}":
                depth -= 1
                if depth == 0 and kind == b"}":
                    yield bytes(lines[:begin])
                    raise DamagedError(f"the JSON array breaks at byte {place + begin}: a brace ends it")
                if depth == 0:
                    lines[begin] = ord("\n")
                    break
            # Line breaks inside an element would cut it in two; in a string JSON does not allow them.
            elif kind == b"\n":
                lines[begin] = ord(" ")
            elif depth == 1:
                lines[begin] = ord("\n")
        if token:  # the closing bracket
            yield bytes(lines[:at])
            for rest in chain([piece[at:]], pieces):
                if more := rest.strip():
                    raise DamagedError(
                        f"the JSON array ends at byte {place + begin}, and more follows it: {more[:20]!r}"
                    )
            return
        yield bytes(lines)
        # Positive only after a backslash at the piece's end: the byte that it escapes is skipped in the next.
        start, place = max(at - len(piece), 0), place + len(piece)
    raise DamagedError(f"the JSON array ends at byte {place}, before its closing bracket")
