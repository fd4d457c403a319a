"""A dump to JSON lines: workers unpack and clean, the parent writes in order, and a killed run goes on."""

import base64
import bz2
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson

from nemo_cpt.checksums import hash_of
from nemo_cpt.corpus.atomic_files import folder_to_fill, locked, sync, write_whole
from nemo_cpt.corpus.preparing.workers import count_processes
from nemo_cpt.corpus.processes import in_order
from nemo_cpt.corpus.progress import ProgressBar
from nemo_cpt.corpus.reading.sources import EXTRACTED
from nemo_cpt.corpus.wikipedia.bzip2_blocks import Block, DamagedDumpError, ends_whole, find_blocks, unpack
from nemo_cpt.corpus.wikipedia.pages import CLOSE, OPEN, Page, Site, address, pages_in, read_page, read_site
from nemo_cpt.corpus.wikipedia.wikitext import Cleaner
from nemo_cpt.errors import CptError

FORMAT = 1  # of the manifest and of the texts: another one begins anew
_HEAD = 64 << 10
_TASK = 8  # blocks: some 7 MB of XML
_JOURNAL_BYTES = 64 << 20  # of text between two notes from which a killed run goes on


@dataclass
class Extraction:
    """What `extract` made.

    Attributes:
        path: The JSON lines.
        status: `extracted`, `resumed` or `unchanged`.
        pages: How many were kept (`articles`), and how many not, by reason.
        size: Bytes of the JSON lines.
        sha256: Their checksum.
    """

    path: str
    status: str
    pages: dict[str, int]
    size: int
    sha256: str


class _Part(NamedTuple):
    """What a worker makes of a few blocks: lines, counts, and the pieces of pages that go beyond them.

    `lines` is None where no page begins in the blocks: then all of them are `before`.
    """

    before: bytes
    lines: bytes | None
    after: bytes
    counts: Counter[str]


@dataclass
class _Progress:
    """Where a run is: the next block's bit, the bytes written, the piece of a page that is still open."""

    bit: int = 0
    written: int = 0
    carry: bytes = b""
    counts: Counter[str] = field(default_factory=Counter)


def extract(
    dump: Path,
    folder: Path,
    *,
    url: str = "",
    sha256: str = "",
    workers: int | None = None,
    quiet: bool = False,
    patience: float = 2.0,
) -> Extraction:
    """Write the articles of a dump as JSON lines: `title`, `id`, `revision`, `url`, `license`, `text`.

    Args:
        dump: A MediaWiki export, packed by bzip2, multistream or not.
        folder: Where the lines go, under the dump's name, with a manifest beside them.
        url: Where the dump came from, for the manifest.
        sha256: The dump's checksum; computed where it is not given.
        workers: Processes; all CPUs that this process may use by default.
        quiet: Show no progress.
        patience: Seconds to wait for another process that extracts the same.

    Raises:
        CptError: The file is no dump, cut short or damaged; the folder holds the text of another dump of that name; it
            cannot be written.
    """
    processes = count_processes(workers)
    output = folder / text_name(dump.name)
    site = read_head(dump)
    job = _Job(dump, output, site, url, sha256 or hash_of(dump))
    # Without the lock, which a folder that may only be read does not allow
    if (there := job.finished()) is not None:
        return there
    with folder_to_fill(folder), locked(folder / f".{output.name}.lock", patience):
        return job.finished() or job.run(processes, quiet)


def text_name(name: str) -> str:
    """Return the name of the text of a dump."""
    for end in (".bz2", ".xml"):
        name = name.removesuffix(end)
    return f"{name}.jsonl"


def existing(folder: Path, url: str) -> Extraction | None:
    """Return the text of the dump of an address, None where it is not there.

    Raises:
        CptError: It is damaged.
    """
    output = folder / text_name(Path(urlsplit(url).path).name)
    manifest = _manifest(output)
    return _described(output, manifest, "unchanged") if manifest and manifest["dump"]["url"] == url else None


def _manifest(output: Path) -> dict[str, Any] | None:
    """Return what is noted of text that is there, None where there is none, or no note of it.

    Raises:
        CptError: The text is not what is noted of it.
    """
    try:
        manifest = orjson.loads(_beside(output).read_bytes())
        known = manifest["format"] == FORMAT and output.exists()
        size, sha256 = manifest["size"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if known and (output.stat().st_size != size or hash_of(output) != sha256):
        raise CptError(f"{output} is not what {_beside(output).name} says; delete both to make it again.")
    return manifest if known else None


def _beside(output: Path) -> Path:
    return output.with_name(output.name.removesuffix(".jsonl") + EXTRACTED)


def _described(output: Path, manifest: dict[str, Any], status: str) -> Extraction:
    return Extraction(str(output), status, manifest["pages"], manifest["size"], manifest["sha256"])


class _Job:
    def __init__(self, dump: Path, output: Path, site: Site, url: str, sha256: str) -> None:
        self.dump, self.output, self.site = dump, output, site
        self.part = output.with_name(f"{output.name}.part")
        self.journal = output.with_name(f"{output.name}.journal")
        self.source: dict[str, Any] = {"file": dump.name, "url": url, "size": dump.stat().st_size, "sha256": sha256}
        self.cleaner = Cleaner(site.language, site.namespaces)

    def finished(self) -> Extraction | None:
        """Return what an earlier run made of this dump.

        Raises:
            CptError: Other text has that name.
        """
        if not self.output.exists():
            return None
        manifest = _manifest(self.output)
        if manifest is None:
            raise CptError(f"{self.output} is there, and no dump was its source. Move it away, or take another folder.")
        if manifest["dump"]["sha256"] != self.source["sha256"]:
            raise CptError(f"{self.output} is the text of another {self.dump.name}. Delete it, or take another folder.")
        return _described(self.output, manifest, "unchanged")

    def run(self, workers: int, quiet: bool) -> Extraction:
        """Write the text, from the beginning or from where an earlier run was.

        Raises:
            CptError: As `extract`.
        """
        progress = self._noted()
        resumed = progress.bit > 0
        try:
            with self.part.open("r+b" if resumed else "wb") as file:
                # What lies behind the last note is made again.
                file.truncate(progress.written)
                file.seek(progress.written)
                self._write(file, progress, workers, quiet)
                file.flush()
                os.fsync(file.fileno())
        except DamagedDumpError:
            # Nothing that could be gone on with: another file of this name begins anew.
            self.part.unlink(missing_ok=True)
            self.journal.unlink(missing_ok=True)
            raise
        except OSError as error:
            raise CptError(
                f"Cannot write {self.part}, or read {self.dump}: {error.strerror}. A rerun goes on."
            ) from error
        manifest = {
            "format": FORMAT,
            "dump": self.source,
            "wiki": self.site.database,
            "language": self.site.language,
            "license": self.site.license,
            "pages": dict(progress.counts.most_common()),
            "size": progress.written,
            "sha256": hash_of(self.part),
        }
        # The manifest first: text without one would be taken for somebody else's.
        write_whole(_beside(self.output), orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")
        self.part.rename(self.output)
        sync(self.output.parent)
        self.journal.unlink(missing_ok=True)
        return _described(self.output, manifest, "resumed" if resumed else "extracted")

    def _write(self, file: Any, progress: _Progress, workers: int, quiet: bool) -> None:
        noted = progress.written
        with self.dump.open("rb") as opened, ProgressBar(self.output.name, self.source["size"], quiet) as bar:

            def work(blocks: list[Block]) -> _Part:
                try:
                    return self._part(unpack(opened.fileno(), blocks))
                except DamagedDumpError as error:
                    raise DamagedDumpError(f"{self.dump} is damaged: {error}. Get it again.") from None

            for blocks, part in in_order(work, _tasks(self.dump, progress.bit), workers):
                # What the blocks before left open goes on here, perhaps over several tasks.
                progress.carry += part.before
                if part.lines is not None:
                    joined = self._part(progress.carry)
                    lines = (joined.lines or b"") + part.lines
                    file.write(lines)
                    progress.written += len(lines)
                    progress.counts += joined.counts + part.counts
                    progress.carry = part.after
                progress.bit = blocks[-1].stop
                bar.update(progress.bit >> 3, progress.counts["articles"])
                if progress.written - noted >= _JOURNAL_BYTES:
                    file.flush()
                    os.fsync(file.fileno())
                    self._note(progress)
                    noted = progress.written
        # A file that was cut between two streams is a whole bzip2 file.
        if b"</mediawiki>" not in progress.carry:
            raise DamagedDumpError(f"{self.dump} ends before the dump does, without </mediawiki>. Get it again.")
        if not progress.counts["articles"]:
            told = ", ".join(f"{count:,} {reason}" for reason, count in progress.counts.items())
            raise DamagedDumpError(f"{self.dump} holds no article, of {told or 'no pages'}.")

    def _part(self, piece: bytes) -> _Part:
        """Make lines of the whole pages in a piece of the dump."""
        counts = Counter[str]()
        begin = piece.find(OPEN)
        if begin < 0:
            return _Part(piece, None, b"", counts)
        # A page that ends in later blocks stays open, also where it is the only one.
        end = max(piece.rfind(CLOSE) + len(CLOSE), begin)
        lines = [line for xml in pages_in(piece[begin:end]) if (line := self._line(xml, counts))]
        return _Part(piece[:begin], b"".join(lines), piece[end:], counts)

    def _line(self, xml: str, counts: Counter[str]) -> bytes:
        page = read_page(xml, self.site)
        text = self.cleaner.text(page.wikitext, page.title) if isinstance(page, Page) else ""
        if isinstance(page, str) or not text:
            counts[page if isinstance(page, str) else "empty"] += 1
            return b""
        counts["articles"] += 1
        row = {"title": page.title, "id": page.id, "revision": page.revision}
        row |= {"url": address(page.title, self.site), "license": self.site.license, "text": text}
        return orjson.dumps(
            {name: value for name, value in row.items() if value != ""}, option=orjson.OPT_APPEND_NEWLINE
        )

    def _note(self, progress: _Progress) -> None:
        """Note where the run is; what is noted must be on the disk."""
        noted = vars(progress) | {"carry": base64.b64encode(progress.carry).decode(), "dump": self.source["sha256"]}
        noted["format"] = FORMAT
        write_whole(self.journal, orjson.dumps(noted))

    def _noted(self) -> _Progress:
        """Return where an earlier run was, the beginning where there is none of this dump."""
        try:
            noted = orjson.loads(self.journal.read_bytes())
            of_this = (noted.pop("format"), noted.pop("dump")) == (FORMAT, self.source["sha256"])
            if of_this and self.part.stat().st_size >= noted["written"]:
                noted["carry"], noted["counts"] = base64.b64decode(noted["carry"]), Counter(noted["counts"])
                return _Progress(**noted)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return _Progress()


def _tasks(dump: Path, bit: int) -> Iterator[list[Block]]:
    blocks = find_blocks(dump, bit)
    while task := list(islice(blocks, _TASK)):
        yield task


def read_head(dump: Path) -> Site:
    """Return the wiki that a dump is of.

    Raises:
        CptError: It is none, or it is cut short.
    """
    try:
        with dump.open("rb") as file:
            head = file.read(_HEAD)
        if not head.startswith(b"BZh"):
            xml = " It is not compressed: bzip2 -k packs it." if b"<mediawiki" in head[:1000] else ""
            raise CptError(f"{dump} is no bzip2 file, as dumps of Wikipedia are.{xml}")
        with bz2.open(dump) as unpacked:
            site = read_site(unpacked.read(_HEAD), dump)
        if not ends_whole(dump):
            raise CptError(f"{dump} is cut short: it does not end as a bzip2 file does. Get it again.")
    except (OSError, EOFError) as error:
        raise CptError(f"Cannot read {dump}: {error}.") from error
    return site
