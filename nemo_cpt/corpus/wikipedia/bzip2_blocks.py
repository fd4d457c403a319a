"""A bzip2 file as blocks that can be unpacked each by itself, by any process, from any of them on.

A bzip2 stream is a row of blocks of up to 900 kB, each with its own checksum, which begin and end at any *bit*. A block
begins with the first six bytes of pi, a stream ends with those of its square root. So the blocks of a file are found
without unpacking it, be it one stream or thousands, as in the dumps that are called multistream; their index is not
needed.
"""

import bz2
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nemo_cpt.corpus.atomic_files import read_at
from nemo_cpt.errors import CptError

BLOCK, END = 0x314159265359, 0x177245385090
_MARK_BITS, _CHECKSUM_BITS = 48, 32
_PIECE = 8 << 20
_OVERLAP = 8  # bytes: a mark at a piece's end, shifted by up to 7 bits


class DamagedDumpError(CptError):
    """A dump is cut short or damaged: nothing that is made of it is to be kept."""


class Block(NamedTuple):
    """One block: its first bit in the file, and the one after its last."""

    start: int
    stop: int


def _needles(mark: int) -> list[tuple[int, bytes]]:
    """Return for each shift in bits the bytes that lie wholly within the mark then."""
    shifted = [(shift, (mark << (8 - shift)).to_bytes(7, "big")) for shift in range(8)]
    return [(shift, whole[:6] if not shift else whole[1:6]) for shift, whole in shifted]


_NEEDLES = [(mark, *needle) for mark in (BLOCK, END) for needle in _needles(mark)]


def find_blocks(path: Path, start: int = 0) -> Iterator[Block]:
    """Yield the blocks of a file in order.

    Args:
        path: The file.
        start: Bit at which a block begins, from which on they are wanted; 0 for all.

    Raises:
        DamagedDumpError: The file ends within a stream.
    """
    begun = -1
    # Places are bits, and a file is read by bytes: what stands before `start` in its byte is passed over.
    for place, mark in _marks(path, start >> 3):
        if place < start:
            continue
        if begun >= 0:
            yield Block(begun, place)
        begun = place if mark == BLOCK else -1
    if begun >= 0:
        raise DamagedDumpError(f"{path} is cut short: its last bzip2 block has no end. Get it again.")


def ends_whole(path: Path) -> bool:
    """Say whether a file ends as a bzip2 stream does: the first look at one that may be cut short."""
    size = path.stat().st_size
    last = max(size - (_MARK_BITS + _CHECKSUM_BITS) // 8 - 1, 0)
    return any(mark == END for _, mark in _marks(path, last))


def _marks(path: Path, start: int) -> Iterator[tuple[int, int]]:
    """Yield (bit, mark) for every mark in a file from a byte on."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for begin in range(start, size, _PIECE):
            piece = read_at(file.fileno(), _PIECE + _OVERLAP, begin)
            found = []
            for mark, shift, needle in _NEEDLES:
                at = piece.find(needle)
                while at >= 0:
                    # With a shift, the needle is the mark's second byte to its sixth: it begins one byte earlier.
                    first = at - bool(shift)
                    whole = int.from_bytes(piece[max(first, 0) : first + 7].ljust(7, b"\0"), "big")
                    if 0 <= first < _PIECE and (whole >> (8 - shift)) & ((1 << _MARK_BITS) - 1) == mark:
                        found.append((8 * (begin + first) + shift, mark))
                    at = piece.find(needle, at + 1)
            yield from sorted(found)


def unpack(descriptor: int, blocks: list[Block]) -> bytes:
    """Return the bytes that blocks which follow each other hold.

    Raises:
        DamagedDumpError: A block is damaged.
    """
    pieces, number = [], 0
    while number < len(blocks):
        start, stop = blocks[number]
        number += 1
        while True:
            try:
                pieces.append(bz2.decompress(_as_stream(descriptor, start, stop)))
                break
            except (OSError, ValueError, EOFError):
                # Packed data may look like a mark by chance, once in 17 TB: then the block goes on behind it.
                if number == len(blocks):
                    raise DamagedDumpError(f"the bzip2 block at byte {start >> 3:,} is damaged") from None
                after = blocks[number]
                number += after.start == stop
                stop = after.stop if after.start == stop else after.start
    return b"".join(pieces)


def _as_stream(descriptor: int, start: int, stop: int) -> bytes:
    """Return a block as a bzip2 stream of its own: shifted to whole bytes, between a beginning and an end."""
    first, last = start >> 3, (stop + 7) >> 3
    size = stop - start
    bits = int.from_bytes(read_at(descriptor, last - first, first), "big") >> (8 * last - stop)
    bits &= (1 << size) - 1
    # The checksum of a stream of one block is the block's own, which follows its mark.
    checksum = (bits >> (size - _MARK_BITS - _CHECKSUM_BITS)) & 0xFFFFFFFF
    bits = (((bits << _MARK_BITS) | END) << _CHECKSUM_BITS) | checksum
    size += _MARK_BITS + _CHECKSUM_BITS
    return b"BZh9" + (bits << (-size % 8)).to_bytes((size + 7) // 8, "big")
