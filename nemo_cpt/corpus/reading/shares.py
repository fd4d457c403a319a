"""The inputs of a corpus cut into shares of about the same size, for several tasks."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from nemo_cpt.corpus.reading.sources import Source
from nemo_cpt.errors import CptError

BLOCK = 1 << 20  # bytes looked through at once for the end of a line


def cut(sources: Sequence[Source], tasks: int) -> list[list[Source]]:
    """Cut the inputs, in their order, into `tasks` shares: fewer where there are not as many lines or files.

    Only plain lines are cut within a file; what is compressed, an array or in columns goes to one task as a whole.

    Raises:
        CptError: There is not at least one task, or an input cannot be read.
    """
    if tasks < 1:
        raise CptError(f"tasks is {tasks}; it must be at least 1.")
    # One byte at least of each: a dataset of the hub has no size here, and an empty file is somebody's to report.
    ends = list(accumulate(max(source.size, 1) for source in sources))
    places = [ends[-1] * number // tasks for number in range(1, tasks)]
    cuts = sorted({0, ends[-1], *(_nearest_cut(sources, ends, place) for place in places)})
    return [_between(sources, ends, first, last) for first, last in pairwise(cuts)]


def _nearest_cut(sources: Sequence[Source], ends: list[int], place: int) -> int:
    """Return where to cut near a place, both as bytes of all the inputs one behind the other."""
    number = bisect_right(ends, place)
    source, begin = sources[number], ends[number] - max(sources[number].size, 1)
    if source.divisible and place > begin:
        return begin + _next_line(source, place - begin)
    return begin if place - begin <= ends[number] - place else ends[number]


def _next_line(source: Source, offset: int) -> int:
    """Return where the first line begins at or behind a byte of a file; its size behind the last line."""
    try:
        with open(source.path, "rb", buffering=0) as file:
            file.seek(position := offset - 1)  # a line also begins at `offset` itself, if one ends before it
            while block := file.read(BLOCK):
                if (at := block.find(b"\n")) >= 0:
                    return min(position + at + 1, source.size)
                position += len(block)
    except OSError as error:
        raise CptError(f"Cannot read the input {source.path}: {error.strerror}.") from error
    return source.size


def _between(sources: Sequence[Source], ends: list[int], first: int, last: int) -> list[Source]:
    """Return what lies between two cuts."""
    found, at = list[Source](), first
    for number in range(bisect_right(ends, first), len(sources)):
        begin, end = ends[number] - max(sources[number].size, 1), min(ends[number], last)
        if at == last:
            break
        # A whole input stays no range: it is hashed and compared as one.
        is_whole = (at, end) == (begin, ends[number])
        found.append(sources[number] if is_whole else replace(sources[number], start=at - begin, stop=end - begin))
        at = end
    return found
