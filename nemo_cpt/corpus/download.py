"""Corpora from the network: resumed where they stopped, with certificates verified and checksums kept."""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nemo_cpt.corpus.catalogue import CORPORA
from nemo_cpt.corpus.files import make_folder, sync_directory, write_whole
from nemo_cpt.corpus.progress import ProgressBar
from nemo_cpt.corpus.sources import HUB
from nemo_cpt.errors import CptError
from nemo_cpt.hub import explained, progress_bars

CHECKSUMS = "SHA256SUMS"
URLS = "SHA256SUMS.urls"  # where each file came from, in lines like those of SHA256SUMS
PIECE = 1 << 20
ATTEMPTS = 5
TIMEOUT = (20, 60)  # seconds to connect, and between two pieces


@dataclass(frozen=True)
class Fetched:
    """A file that `fetch` got.

    Attributes:
        path: Where it is.
        url: Where it came from.
        size: Its bytes.
        sha256: Its checksum.
        status: `fetched`, `resumed` or `unchanged`.
    """

    path: str
    url: str
    size: int
    sha256: str
    status: str


def fetch(corpus: str, folder: str | os.PathLike[str], *, quiet: bool = False, patience: float = 2.0) -> list[Fetched]:
    """Download a corpus; what is there already is checked against `SHA256SUMS`, what is there in part is continued.

    Args:
        corpus: A name of the catalogue (`llm-jp/ja_wiki`, `wikinews-zhtw`, `wikimedia/enwiki`), a URL, or `hf:NAME`.
        folder: Where its files go.
        quiet: Show no progress.
        patience: Seconds before the second attempt after a broken connection; doubled each time, five attempts in all.

    Raises:
        CptError: The corpus is unknown, the server refuses or its certificate is not valid, the folder has a file of
            that name which came from elsewhere, or it cannot be written.
    """
    urls = _urls(corpus)
    target = Path(folder)
    make_folder(target)
    found: list[Fetched] = []
    for url in urls:
        if url.startswith(HUB):
            found += _fetch_dataset(url, target, quiet)
        else:
            found.append(_Download(url, target, quiet, patience).run())
    return found


def _urls(corpus: str) -> tuple[str, ...]:
    if corpus in CORPORA:
        return CORPORA[corpus].urls
    if corpus.startswith((HUB, "https://")):
        return (corpus,)
    if corpus.startswith("http://") and urlsplit(corpus).hostname in ("localhost", "127.0.0.1", "::1"):
        return (corpus,)
    if corpus.startswith("http://"):
        raise CptError(f"{corpus} is not encrypted: nobody could tell whether it arrives unchanged. Use https.")
    raise CptError(f"There is no corpus {corpus!r}. Known are {', '.join(CORPORA)}, https:// addresses and {HUB}NAME.")


def _fetch_dataset(url: str, folder: Path, quiet: bool) -> list[Fetched]:
    """Get a dataset of the hub; its own client resumes and leaves alone what is there."""
    from huggingface_hub import HfApi, constants, snapshot_download

    name, known = url.removeprefix(HUB), read_checksums(folder)
    page, shown = f"{constants.ENDPOINT}/datasets/{name}", not quiet and sys.stderr.isatty()
    with _writing(folder), explained("dataset", name, page), progress_bars(shown):
        info = HfApi().dataset_info(name)
        names = sorted(file.rfilename for file in info.siblings or [] if not file.rfilename.startswith("."))
        _claim(folder, url, names)
        snapshot_download(name, repo_type="dataset", revision=info.sha, local_dir=folder, allow_patterns=names)
    found = []
    for file in names:
        path, checksum = folder / file, hash_of(folder / file)
        status = "unchanged" if known.get(file) == checksum else "fetched"
        found.append(Fetched(str(path), url, path.stat().st_size, checksum, status))
    _keep(folder, CHECKSUMS, dict(zip(names, (file.sha256 for file in found), strict=True)))
    return found


def _claim(folder: Path, url: str, names: list[str]) -> None:
    """Note that files come from `url`, before its client writes them: it replaces what is there.

    Raises:
        CptError: A file is there that did not come from `url`.
    """
    known, urls = _read(folder, CHECKSUMS), _read(folder, URLS)
    for name in names:
        fetched = name in known or urls.get(name) == url  # the latter: an earlier run was interrupted
        _check_origin(folder / name, url, fetched, urls.get(name))
    _keep(folder, URLS, dict.fromkeys(names, url))


def _check_origin(path: Path, url: str, fetched: bool, origin: str | None) -> None:
    """Raise if a file is there that is not from `url`; of what older versions fetched, the origin is not known."""
    if not path.exists():
        return
    if not fetched:
        raise CptError(
            f"{path} exists and is not in {CHECKSUMS}: it was not fetched, and would be replaced. Move it away, or "
            "take another folder."
        )
    if origin not in (None, url):
        raise CptError(f"{path} came from {origin}, not from {url}. Delete it, or take another folder.")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CptError(f"Cannot write to {folder}: {error.strerror or error}. A rerun goes on.") from error


class _Download:
    """One file on its way."""

    def __init__(self, url: str, folder: Path, quiet: bool, patience: float) -> None:
        self.url, self.folder, self.quiet, self.patience = url, folder, quiet, patience
        self.name = Path(urlsplit(url).path).name
        if not self.name:
            raise CptError(f"{url} names no file.")
        if self.name in (CHECKSUMS, URLS):
            raise CptError(f"{url} cannot be fetched: {self.name} is where fetch keeps its own notes.")
        self.path = folder / self.name
        self.part, self.state = folder / f"{self.name}.part", folder / f"{self.name}.part.json"
        self.resumed = False

    def run(self) -> Fetched:
        """Get the file, or check the one that is there.

        Raises:
            CptError: As `fetch`.
        """
        known, url = read_checksums(self.folder).get(self.name), _without_credentials(self.url)
        _check_origin(self.path, url, known is not None, _read(self.folder, URLS).get(self.name))
        if known and self.path.exists():
            if hash_of(self.path) != known:
                raise CptError(f"{self.path} is not what {CHECKSUMS} says; delete it to fetch it again.")
            return self._fetched(known, "unchanged")
        self._attempt_often()
        checksum = hash_of(self.part)
        # The notes come first: a file without them would be taken for the user's own
        _keep(self.folder, URLS, {self.name: url})
        _keep(self.folder, CHECKSUMS, {self.name: checksum})
        self.part.rename(self.path)
        sync_directory(self.folder)
        self.state.unlink(missing_ok=True)
        return self._fetched(checksum, "resumed" if self.resumed else "fetched")

    def _fetched(self, checksum: str, status: str) -> Fetched:
        return Fetched(str(self.path), self.url, self.path.stat().st_size, checksum, status)

    def _attempt_often(self) -> None:
        import requests

        for attempt in range(ATTEMPTS):
            try:
                return self._attempt()
            except requests.exceptions.SSLError as error:
                raise CptError(
                    f"The certificate of {urlsplit(self.url).hostname} cannot be verified: {error}. Behind a proxy "
                    "with its "
                    f"own certificate, set REQUESTS_CA_BUNDLE to it; there is no way to switch the check off."
                ) from error
            except requests.exceptions.RequestException as error:
                if attempt == ATTEMPTS - 1:
                    raise CptError(
                        f"Cannot fetch {self.url}: {error}. What arrived is in {self.part}; the same command "
                        "continues it."
                    ) from error
                time.sleep(self.patience * 2**attempt)
            except OSError as error:
                raise CptError(f"Cannot write {self.part}: {error.strerror}. Make room and run it again.") from error

    def _attempt(self) -> None:
        """Ask for what is missing and write it; an answer cut short raises requests' ConnectionError."""
        import requests

        have, state = self._state()
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": state["validator"]}
        with requests.get(self.url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            begin, total = _place(answer, have)
            if answer.status_code == 416 and have == (total or state.get("total")):
                return
            self._check(answer)
            if begin > have:
                raise requests.exceptions.ConnectionError(f"the server sends from byte {begin} on, not from {have}")
            have, total = begin, total or (state.get("total", 0) if begin else 0)
            self.resumed = self.resumed or have > 0
            self._remember(answer, total)
            with self.part.open("r+b" if have else "wb") as file, ProgressBar(self.name, total, self.quiet) as bar:
                file.truncate(have)
                file.seek(have)
                for piece in answer.iter_content(PIECE):
                    file.write(piece)
                    have += len(piece)
                    bar.update(have)
                file.flush()
                os.fsync(file.fileno())
        if total and have != total:
            raise requests.exceptions.ConnectionError(f"{have} of {total} bytes arrived")

    def _check(self, answer: Any) -> None:
        import requests

        if answer.status_code == 416:
            self.state.unlink(missing_ok=True)  # what is here is longer than the file: begin anew
            raise requests.exceptions.ConnectionError(f"the server has no such range of {self.url}")
        if answer.status_code >= 500 or answer.status_code == 429:
            raise requests.exceptions.ConnectionError(f"the server answers {answer.status_code} {answer.reason}")
        if answer.status_code not in (200, 206):
            raise CptError(f"The server answers {answer.status_code} {answer.reason} for {self.url}.")
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            raise CptError(f"{self.url} answers with a web page, not with data: it may want a login, or have moved.")

    def _state(self) -> tuple[int, dict[str, Any]]:
        """Return how much is here and what the server said about the file; nothing counts without a validator."""
        try:
            state = json.loads(self.state.read_text("utf-8"))
            if state["url"] == self.url and state["validator"]:
                return self.part.stat().st_size, state
        except (OSError, ValueError, KeyError):
            pass
        return 0, {}

    def _remember(self, answer: Any, total: int) -> None:
        etag = answer.headers.get("ETag", "")
        strong = "" if etag.startswith("W/") else etag
        state = {"url": self.url, "total": total, "validator": strong or answer.headers.get("Last-Modified", "")}
        write_whole(self.state, json.dumps(state).encode())


def _place(answer: Any, have: int) -> tuple[int, int]:
    """Return where an answer to a request from byte `have` on begins, and the size of the whole file, 0 if unsaid."""
    length = int(answer.headers.get("Content-Length", 0))
    said = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
    begin, total = said.groups() if said else (None, None)
    size = int(total) if total and total != "*" else 0
    if answer.status_code == 416:
        return have, size
    if answer.status_code != 206:
        return 0, length
    begin = int(begin) if begin else have
    return begin, size or (begin + length if length else 0)


def _without_credentials(url: str) -> str:
    """Return a URL as it may be noted: without user and password, and in one word."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().replace(" ", "%20")


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that `fetch` brought into a folder, by name."""
    return _read(folder, CHECKSUMS)


def _read(folder: Path, notes: str) -> dict[str, str]:
    """Return what stands before each name in a file of notes, by name; nothing where there are none."""
    path = folder / notes
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}


def _keep(folder: Path, notes: str, new: dict[str, str]) -> None:
    """Add to a file of notes, in the form of `sha256sum`."""
    values = _read(folder, notes) | new
    write_whole(folder / notes, "".join(f"{value}  {name}\n" for name, value in sorted(values.items())).encode())
