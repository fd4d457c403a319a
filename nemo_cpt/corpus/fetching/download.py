"""A file from the network: resumed where it stopped, its certificate verified, its checksum kept."""

import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from nemo_cpt.checksums import hash_of
from nemo_cpt.corpus.atomic_files import locked, sync, write_whole
from nemo_cpt.corpus.progress import ProgressBar
from nemo_cpt.errors import CptError
from nemo_cpt.hub import check_certificates
from nemo_cpt.urls import public_url

CHECKSUMS = "SHA256SUMS"
URLS = "SHA256SUMS.urls"  # where each file came from, in lines like those of SHA256SUMS
LOCK = ".fetch.lock"
LOCAL = ("localhost", "127.0.0.1", "::1")
PACKED = {"gzip": (".gz", ".tgz"), "zstd": (".zst",), "br": (".br",)}  # files that a server may call an encoding
PIECE = 1 << 20
ATTEMPTS = 5
TIMEOUT = (20, 60)  # seconds to connect, and between two pieces
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Fetched:
    """A file that `fetch` got.

    Attributes:
        path: Where it is.
        url: Where it came from.
        size: Its bytes.
        sha256: Its checksum.
        status: `fetched`, `resumed` or `unchanged`; `extracted` where it was made of a dump.
        pages: Of a dump's text: how many pages were kept (`articles`), and how many not, by reason.
    """

    path: str
    url: str
    size: int
    sha256: str
    status: str
    pages: dict[str, int] = field(default_factory=dict)


def check_origin(path: Path, url: str, fetched: bool, origin: str | None) -> None:
    """Raise if a file is there that is not from `url`; of what older versions fetched, the origin is not known."""
    if not path.exists():
        return
    if not fetched:
        raise CptError(
            f"{path} exists and is not in {CHECKSUMS}: it was not fetched, and would be replaced. Move it away, or "
            "take another folder."
        )
    if origin is not None and public_url(origin) != url:
        raise CptError(f"{path} came from {origin}, not from {url}. Delete it, or take another folder.")


class _BrokenError(Exception):
    """An answer that is not what was asked for, or not all of it; the next attempt may get it."""


def patiently(
    url: str, patience: float, attempt: Callable[[Any], Answer], outlook: Callable[[], str] = lambda: "Try again later."
) -> Answer:
    """Return what an attempt gives, which is repeated where the connection breaks or the server is busy.

    Other libraries' errors are not chained: they hold the whole address.

    Args:
        url: What is asked for.
        patience: Seconds before the second attempt, doubled each time.
        attempt: Gets the session to ask in.
        outlook: Says what can be done when all failed.

    Raises:
        CptError: All failed, or another attempt would not help.
    """
    import requests
    from requests import exceptions
    from urllib3.exceptions import HTTPError

    permanent = (exceptions.InvalidURL, exceptions.InvalidSchema, exceptions.TooManyRedirects)
    shown = public_url(url)
    with _session(url) as session:
        for number in range(ATTEMPTS):
            try:
                return attempt(session)
            # The first of these clauses: it is a RequestException as well, and would be tried again in vain.
            except exceptions.SSLError as error:
                raise CptError(
                    f"The certificate of {urlsplit(url).hostname} cannot be verified: {error}. Behind a proxy "
                    "with its own certificate, set REQUESTS_CA_BUNDLE to it; there is no way to switch the check "
                    "off."
                ) from None
            except permanent as error:
                raise CptError(f"{shown} cannot be fetched: {error}") from None
            except (_BrokenError, requests.RequestException, HTTPError) as error:
                if number == ATTEMPTS - 1:
                    raise CptError(f"Cannot fetch {shown}: {error}. {outlook()}") from None
                time.sleep(patience * 2**number)
            except OSError as error:
                check_certificates(error)
                raise
    raise AssertionError


def read_page(url: str, patience: float) -> bytes | None:
    """Return what a server has at an address, None where it has nothing there.

    Raises:
        CptError: It refuses, or cannot be reached.
    """

    def attempt(session: Any) -> bytes | None:
        answer = session.get(url, timeout=TIMEOUT)
        # Broken or busy: `patiently` asks again. Any other refusal would be the same the next time.
        if answer.status_code >= 500 or answer.status_code == 429:
            raise _BrokenError(f"the server answers {answer.status_code} {answer.reason}")
        if answer.status_code in (404, 410):
            return None
        if answer.status_code != 200:
            raise CptError(f"The server answers {answer.status_code} {answer.reason} for {public_url(url)}.")
        content: bytes = answer.content
        return content

    return patiently(url, patience, attempt)


class Download:
    """One file on its way. `shown` is its address as it may be shown and kept, `url` with what gives access.

    Attributes:
        sha1: What its server's list of checksums says of it; "" where there is none.
    """

    def __init__(self, url: str, folder: Path, quiet: bool, patience: float, sha1: str = "") -> None:
        self.url, self.shown, self.sha1 = url, public_url(url), sha1
        self.folder, self.quiet, self.patience = folder, quiet, patience
        self.name = Path(urlsplit(url).path).name
        if not self.name:
            raise CptError(f"{self.shown} names no file.")
        if self.name in (CHECKSUMS, URLS) or self.name.endswith((".part", ".part.json")):
            raise CptError(f"{self.shown} cannot be fetched: {self.name} is where fetch keeps its own notes.")
        self.path = folder / self.name
        self.part, self.state = folder / f"{self.name}.part", folder / f"{self.name}.part.json"
        self.resumed = False

    def run(self) -> Fetched:
        """Get the file, or check the one that is there.

        Raises:
            CptError: As `fetch`.
        """
        if (there := self._there()) is not None:
            return there
        with locked(self.folder / LOCK, self.patience):
            if (there := self._there()) is not None:  # another process has got it meanwhile
                return there
            self._attempt_often()
            self._check_sha1()
            checksum = hash_of(self.part)
            # The notes come first: a file without them would be taken for the user's own
            keep_notes(self.folder, URLS, {self.name: self.shown})
            keep_notes(self.folder, CHECKSUMS, {self.name: checksum})
            self.part.rename(self.path)
            sync(self.folder)
            self._tidy()
        return self._fetched(checksum, "resumed" if self.resumed else "fetched")

    def _there(self) -> Fetched | None:
        """Return the file that an earlier run got, None if there is none.

        Raises:
            CptError: It is damaged, or another file has its name.
        """
        known = read_checksums(self.folder).get(self.name)
        check_origin(self.path, self.shown, known is not None, read_notes(self.folder, URLS).get(self.name))
        if not (known and self.path.exists()):
            return None
        if hash_of(self.path) != known:
            raise CptError(f"{self.path} is not what {CHECKSUMS} says; delete it to fetch it again.")
        with suppress(OSError):  # a folder that may only be read holds nothing to tidy
            self._tidy()
        return self._fetched(known, "unchanged")

    def _check_sha1(self) -> None:
        if self.sha1 and (arrived := hash_of(self.part, "sha1")) != self.sha1:
            self._tidy()
            raise CptError(
                f"{self.shown} arrived with the SHA-1 {arrived}, and its server says {self.sha1}: it was damaged on "
                "the way, and is deleted. The same command gets it again."
            )

    def _tidy(self) -> None:
        """Remove what only an unfinished download needs; a killed run may have left it."""
        for path in (self.part, self.state, self.folder / CHECKSUMS, self.folder / URLS):
            path.with_name(f"{path.name}.part").unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)

    def _fetched(self, checksum: str, status: str) -> Fetched:
        return Fetched(str(self.path), self.shown, self.path.stat().st_size, checksum, status)

    def _attempt_often(self) -> None:
        try:
            patiently(self.url, self.patience, self._attempt, self._outlook)
        except OSError as error:
            raise CptError(f"Cannot write {self.part}: {error.strerror}. Make room, run it again.") from error

    def _outlook(self) -> str:
        have, _ = self._noted()
        return f"What arrived is in {self.part}; the same command continues it." if have else "Try again later."

    def _attempt(self, session: Any) -> None:
        """Ask for what is missing and write it.

        Raises:
            _BrokenError: The answer is cut short, or does not continue what is here.
        """
        have, noted = self._noted()
        # Else a server may compress on the fly: ranges, sizes and checksums would be of bytes that nobody keeps.
        headers = {"Accept-Encoding": "identity"}
        # If-Range makes the server send the whole file (200) where its content is another by now, instead of a tail
        # that does not fit.
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": noted["validator"]}
        with session.get(self.url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            begin, total = _place(answer)
            # The file was whole already, and the process ended before it was renamed: nothing is left to ask for.
            if answer.status_code == 416 and have == noted.get("total") == (total or have):
                return
            self._check(answer)
            # Servers and proxies may answer with another range, or of another version, than was asked for.
            if answer.status_code == 206 and not (have == begin and _continues(answer, total, noted)):
                self.state.unlink(missing_ok=True)  # begin anew
                raise _BrokenError(
                    "the server answers with a part of another file, or with another part than was asked for"
                )
            have = begin
            self.resumed = have > 0
            self._note(answer, total)
            with self.part.open("r+b" if have else "wb") as file, ProgressBar(self.name, total, self.quiet) as bar:
                # A 200 to a range request means from the beginning: what was here of the old version goes.
                file.truncate(have)
                file.seek(have)
                # `raw`, undecoded: requests' iter_content would unpack a .gz that is served with an encoding.
                for piece in answer.raw.stream(PIECE, decode_content=False):
                    file.write(piece)
                    have += len(piece)
                    bar.update(have)
                file.flush()
                os.fsync(file.fileno())
        # urllib3 before 2.0 takes a connection that closes early for the end of the file.
        if total and have != total:
            raise _BrokenError(f"{have} of {total} bytes arrived")
        if not have:
            self._tidy()
            raise CptError(f"{self.shown} is an empty file.")

    def _check(self, answer: Any) -> None:
        """Check that an answer brings a file's bytes, and that its end can be told from a broken connection.

        Raises:
            CptError: It does not, and will not.
            _BrokenError: It may the next time.
        """
        status, headers = answer.status_code, answer.headers
        if status == 416:
            self.state.unlink(missing_ok=True)  # what is here is longer than the file: begin anew
            raise _BrokenError("the server has no such range")
        if status >= 500 or status == 429:
            raise _BrokenError(f"the server answers {status} {answer.reason}")
        if status not in (200, 206):
            raise CptError(f"The server answers {status} {answer.reason} for {self.shown}.")
        # Login pages come with status 200; saved as .jsonl.gz they would fail only in `prepare`.
        if headers.get("Content-Type", "").startswith("text/html"):
            raise CptError(f"{self.shown} answers with a web page, not with data: it may want a login, or have moved.")
        packed = headers.get("Content-Encoding", "identity").removeprefix("x-")
        if packed != "identity" and not self.name.endswith(PACKED.get(packed, ())):
            raise CptError(
                f"{self.shown} is sent compressed ({packed}) though the file itself was asked for: its bytes and its "
                "checksum would be others than the file's. Get it in another way."
            )
        # A chunked answer has an end mark, of which urllib3 notices the lack; a length that is not said has none.
        if status == 200 and not _is_chunked(answer) and not headers.get("Content-Length", "").isdigit():
            raise CptError(
                f"The server does not say how long {self.shown} is: nobody could tell the whole file from one that "
                "breaks off. Get it in another way, and compare its size."
            )

    def _noted(self) -> tuple[int, dict[str, Any]]:
        """Return how much is here and what the server said about the file; nothing counts without a validator."""
        try:
            noted = json.loads(self.state.read_text("utf-8"))
            # Compared without credentials: a presigned address is another one each hour, and still the same file.
            if public_url(noted["url"]) == self.shown and noted["validator"]:
                return self.part.stat().st_size, noted
        except (OSError, ValueError, KeyError):
            pass
        return 0, {}

    def _note(self, answer: Any, total: int) -> None:
        noted = {"url": self.shown, "total": total, "validator": _validator(answer)}
        noted["modified"] = answer.headers.get("Last-Modified", "")
        write_whole(self.state, json.dumps(noted).encode())


def _session(url: str) -> Any:
    """Return a session in which an address that is not encrypted is not even asked, but for this machine's own."""
    import requests
    from requests.adapters import HTTPAdapter

    local = url.startswith("http://")

    class OnlyHere(HTTPAdapter):
        def send(self, request: Any, *arguments: Any, **options: Any) -> Any:
            # In the adapter: requests follows redirects through it, so that their targets are looked at, too.
            if local and urlsplit(request.url).hostname in LOCAL:
                return super().send(request, *arguments, **options)
            raise CptError(
                f"{public_url(url)} leads on to {public_url(request.url)}, which is not encrypted: nobody could tell "
                "whether it arrives unchanged. It was not asked."
            )

    session = requests.Session()
    session.mount("http://", OnlyHere())
    return session


def _place(answer: Any) -> tuple[int, int]:
    """Return where an answer's bytes begin, and the size of the whole file, 0 if unsaid; -1 if the place is unsaid."""
    length = answer.headers.get("Content-Length", "")
    size = int(length) if length.isdigit() and not _is_chunked(answer) else 0
    if answer.status_code not in (206, 416):
        return 0, size
    said = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
    begin, end, total = said.groups() if said else (None, None, None)
    whole = int(total) if total and total != "*" else 0
    # A place that was not said is -1, which equals no length of a part.
    if begin is None or end is None or (size and size != int(end) - int(begin) + 1):
        return -1, whole
    return int(begin), whole


def _is_chunked(answer: Any) -> bool:
    return "chunked" in answer.headers.get("Transfer-Encoding", "").lower()


def _validator(answer: Any) -> str:
    etag = answer.headers.get("ETag", "")
    # A weak validator says "equivalent", not "the same bytes", and RFC 9110 forbids it in If-Range.
    return ("" if etag.startswith("W/") else etag) or answer.headers.get("Last-Modified", "")


def _continues(answer: Any, total: int, noted: dict[str, Any]) -> bool:
    """Say whether a part belongs to the file that was noted; a server may well ignore If-Range."""
    modified = answer.headers.get("Last-Modified", "")
    same_time = not modified or modified == noted.get("modified", modified)
    same_file = _validator(answer) == noted.get("validator") and same_time
    return same_file and bool(total) and total == (noted["total"] or total)


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that `fetch` brought into a folder, by name."""
    return read_notes(folder, CHECKSUMS)


def read_notes(folder: Path, notes: str) -> dict[str, str]:
    """Return what stands before each name in a file of notes, by name; nothing where there are none."""
    path = folder / notes
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}


def keep_notes(folder: Path, notes: str, new: dict[str, str]) -> None:
    """Add to a file of notes, in the form of `sha256sum`."""
    values = read_notes(folder, notes) | new
    # Also the older lines: an earlier version may have written credentials there.
    if notes == URLS:
        values = {name: public_url(url) for name, url in values.items()}
    write_whole(folder / notes, "".join(f"{value}  {name}\n" for name, value in sorted(values.items())).encode())
