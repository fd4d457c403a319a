"""The parts that several tasks made of a dataset, joined: the bytes and the manifest are those of a single run."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from nemo_cpt.corpus.atomic_files import copy_to, make_folder
from nemo_cpt.corpus.dataset.index import document_lengths, read_index
from nemo_cpt.corpus.dataset.manifest import changed_input, read_manifest
from nemo_cpt.corpus.preparing.journal import Journal, Progress, ReadInput
from nemo_cpt.corpus.preparing.output import Output
from nemo_cpt.corpus.progress import ProgressBar
from nemo_cpt.corpus.reading.chunks import hash_ranges
from nemo_cpt.corpus.reading.sources import InputChangedError, Source
from nemo_cpt.corpus.reading.tally import Policy, Tally


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
                inputs = pool.submit(inputs_of_parts, output.sources, [manifest["inputs"] for manifest in manifests])
                _copy_parts(journal, output, parts, manifests, quiet)
                read = inputs.result()
            journal.progress.tally.check_ranges(output.sources, policy)
            journal.progress.tally.check(output.sources, policy.max_skipped)
            journal.progress.finished = True
            journal.checkpoint(b"", [], read)
        output.put_in_place()
    except BaseException:
        # Nothing was kept as yet that the next run could go on from.
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
        # Of a join the journal counts parts where that of a preparation counts inputs.
        for number in range(journal.progress.source, len(parts)):
            copy_to(Path(parts[number] + ".bin"), journal.outputs[0], journal.progress.nbytes)
            lengths = document_lengths(read_index(parts[number])).astype("<i4").tobytes()
            _count_in(journal.progress, manifests[number], sizes[number], output)
            journal.checkpoint(lengths, _problems(parts[number], before[number]), [])
            bar.update(sum(sizes[: number + 1]), journal.progress.entries, journal.progress.tokens)


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
    # Of the tokenizer, which all parts have in common.
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


def inputs_of_parts(sources: Sequence[Source], parts: Iterable[list[dict[str, Any]]]) -> list[ReadInput]:
    """Return each input with its hash; what several tasks read is read once more, for theirs do not add up to it.

    Args:
        sources: The inputs as they are now.
        parts: What each part says of the inputs that it was made of, as `describe_inputs` gives it.

    Raises:
        InputChangedError: An input is not what its part was made of.
    """
    by_path: dict[str, list[dict[str, Any]]] = {}
    for entry in chain.from_iterable(parts):
        by_path.setdefault(entry["path"], []).append(entry)
    found = []
    for source in sources:
        entries = by_path[source.path]
        # One task read all of it: its hash is the file's.
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
