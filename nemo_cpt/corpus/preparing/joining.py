"""The parts that several tasks made of a dataset, joined: the bytes and the manifest are those of a single run."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from nemo_cpt.corpus.atomic_files import make_folder, read_at, write_at
from nemo_cpt.corpus.dataset.index import document_lengths, read_index
from nemo_cpt.corpus.dataset.manifest import changed_input, read_manifest
from nemo_cpt.corpus.preparing.journal import Journal, Progress, ReadInput
from nemo_cpt.corpus.preparing.output import Output
from nemo_cpt.corpus.progress import ProgressBar
from nemo_cpt.corpus.reading.chunks import hash_ranges
from nemo_cpt.corpus.reading.sources import InputChangedError, Source
from nemo_cpt.corpus.reading.tally import Policy, Tally
from nemo_cpt.errors import CptError

COPIED = 64 << 20  # bytes copied at once


def join_parts(
    output: Output, parts: Sequence[str], policy: Policy, overwrite: bool, patience: float, quiet: bool
) -> str:
    """Write a dataset out of its parts, or the rest of it: a journal of its own makes this resumable too.

    Args:
        output: The dataset to be; its journal is one of a join.
        parts: Full prefixes of its parts, in order.
        policy: What may be left out of the inputs, all of them together.
        overwrite: Replace an unfinished output of another job.
        patience: Seconds to wait for another process that writes this output.
        quiet: Show no progress.

    Returns:
        `written` or `resumed`.

    Raises:
        CptError: An input changed since its part was made, more was left out than may be, or the disk is full.
    """
    make_folder(output.idx.parent)
    manifests = [read_manifest(part) for part in parts]
    journal = output.journal
    resumed = journal.open(overwrite, patience)
    try:
        if not journal.progress.finished:
            # Beside the copying: neither waits for the processor.
            with ThreadPoolExecutor(1) as pool:
                inputs = pool.submit(_inputs, output.sources, manifests)
                _copy_parts(journal, output, parts, manifests, quiet)
                read = inputs.result()
            journal.progress.tally.check_ranges(output.sources, policy)
            journal.progress.tally.check(output.sources, policy.max_skipped)
            journal.progress.finished = True
            journal.checkpoint(b"", [], read)
        output.put_in_place()
    except BaseException:
        if not journal.saved.source:
            journal.remove()
        raise
    finally:
        journal.close()
    return "resumed" if resumed else "written"


def _copy_parts(
    journal: Journal, output: Output, parts: Sequence[str], manifests: list[dict[str, Any]], quiet: bool
) -> None:
    """Copy what no earlier run has copied; a checkpoint after each part."""
    sizes = [Path(part + ".bin").stat().st_size for part in parts]
    before = _lines_before(manifests)
    with ProgressBar(f"joining {Path(output.prefix).name}", sum(sizes), quiet) as bar:
        for number in range(journal.progress.source, len(parts)):
            _copy(Path(parts[number] + ".bin"), journal.outputs[0], journal.progress.nbytes)
            lengths = document_lengths(read_index(parts[number])).astype("<i4").tobytes()
            _count_in(journal.progress, manifests[number], sizes[number], output)
            journal.checkpoint(lengths, _problems(parts[number], before[number]), [])
            bar.update(sum(sizes[: number + 1]), journal.progress.entries, journal.progress.tokens)


def _copy(path: Path, descriptor: int, offset: int) -> None:
    """Copy a file to a place of an open one; file systems that can share or copy blocks by themselves do."""
    with path.open("rb") as file:
        size, done = os.fstat(file.fileno()).st_size, 0
        try:
            while done < size:
                with suppress(OSError):  # of a file system, or a pair of them, that cannot
                    if copied := os.copy_file_range(
                        file.fileno(), descriptor, min(size - done, COPIED), done, offset + done
                    ):
                        done += copied
                        continue
                piece = read_at(file.fileno(), min(size - done, COPIED), done)
                if not piece:
                    raise CptError(f"{path} became shorter while it was copied. Run the same command again.")
                write_at(descriptor, piece, offset + done)
                done += len(piece)
        except OSError as error:
            raise CptError(
                f"Cannot copy {path}: {error.strerror}. Make room and run the same command again."
            ) from error


def _count_in(progress: Progress, manifest: dict[str, Any], nbytes: int, output: Output) -> None:
    """Add what a part's manifest counts, as `Job` does with a task's."""
    progress.source += 1
    progress.nbytes += nbytes
    progress.entries += manifest["documents"]
    progress.tokens += manifest["tokens"]
    progress.longest = max(progress.longest, manifest["longest"])
    progress.largest = max(progress.largest, manifest["largest"])
    progress.empty += manifest["empty"]
    progress.compared += manifest["compared"]
    progress.seconds += manifest["seconds"]
    progress.probes = manifest["probes"]
    if manifest["encoder"].partition(":")[0] not in progress.encoder:
        progress.encoder = "; ".join(filter(None, (progress.encoder, manifest["encoder"])))
    for text, count in manifest["special_tokens"].items():
        number = str(output.tokenizer.special[text])
        progress.special[number] = progress.special.get(number, 0) + count
    progress.tally.include(Tally(**manifest["tally"]))


def _lines_before(manifests: list[dict[str, Any]]) -> list[dict[str, int]]:
    """For each part, how many lines of a file earlier parts have read, by its path."""
    found, lines = [], dict[str, int]()
    for manifest in manifests:
        found.append(dict(lines))
        for entry in manifest["tally"]["ranges"]:
            lines[entry["path"]] = lines.get(entry["path"], 0) + entry["lines"]
    return found


def _problems(part: str, before: dict[str, int]) -> list[dict[str, Any]]:
    """The lines that a part left out, with their numbers in the whole files."""
    path = Path(part + ".skipped.jsonl")
    problems = [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    return [problem | {"line": problem["line"] + before.get(problem["path"], 0)} for problem in problems]


def _inputs(sources: Sequence[Source], manifests: list[dict[str, Any]]) -> list[ReadInput]:
    """Return each input with its hash; what several tasks read is read once more, for theirs do not add up to it.

    Raises:
        InputChangedError: An input is not what its part was made of.
    """
    by_path: dict[str, list[dict[str, Any]]] = {}
    for entry in (entry for manifest in manifests for entry in manifest["inputs"]):
        by_path.setdefault(entry["path"], []).append(entry)
    found = []
    for source in sources:
        entries = by_path[source.path]
        if "start" not in entries[0]:
            if (change := changed_input([source], entries)) is not None:
                raise InputChangedError(change)
            found.append(ReadInput(source.stamp, entries[0]["hash"]))
            continue
        *ranges, whole = hash_ranges(source.path, [(entry["start"], entry["stop"]) for entry in entries])
        if source.size != entries[0]["size"] or ranges != [entry["hash"] for entry in entries]:
            raise InputChangedError(f"{source.path} changed after a part of it was read")
        found.append(ReadInput(source.stamp, whole))
    return found
