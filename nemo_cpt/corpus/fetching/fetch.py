"""Corpora from the network: resumed where they stopped, with certificates verified and checksums kept."""

import glob
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from nemo_cpt.arguments import checked
from nemo_cpt.checksums import hash_of
from nemo_cpt.corpus.atomic_files import folder_to_fill, locked
from nemo_cpt.corpus.fetching.download import (
    CHECKSUMS,
    LOCAL,
    LOCK,
    URLS,
    Download,
    Fetched,
    check_origin,
    keep_notes,
    read_checksums,
    read_notes,
)
from nemo_cpt.corpus.fetching.known_corpora import CORPORA
from nemo_cpt.corpus.fetching.wikimedia import SCHEME, find_address, find_sha1, is_dump
from nemo_cpt.corpus.preparing.workers import count_processes
from nemo_cpt.corpus.reading.sources import HUB
from nemo_cpt.corpus.wikipedia.extraction import Extraction, existing, extract
from nemo_cpt.errors import CptError
from nemo_cpt.hub import content_of, explained, git_prefix, retries_told_once
from nemo_cpt.quiet import bars_of_the_hub
from nemo_cpt.urls import public_url

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling


@checked
def fetch(
    corpus: str,
    folder: str | os.PathLike[str],
    *,
    workers: int | None = None,
    quiet: bool = False,
    patience: float = 2.0,
) -> list[Fetched]:
    """Download a corpus; what is there already is checked against `SHA256SUMS`, what is there in part is continued.

    Of a dump of Wikipedia, its articles' plain text is made too, as JSON lines.

    Args:
        corpus: A name of the catalogue (`llm-jp/ja_wiki`, `wikinews-zhtw`), `wikipedia:ja@20260901` or
            `wikipedia:ja@latest`, a URL, `hf:NAME`, or a dump's file on this machine.
        folder: Where its files go.
        workers: Processes for a dump's text; all CPUs that this process may use by default.
        quiet: Show no progress.
        patience: Seconds before the second attempt after a broken connection, doubled each time, five attempts in all;
            and to wait for another process that fetches into the folder.

    Raises:
        CptError: The corpus is unknown, the server refuses or its certificate is not valid, the folder has a file of
            that name which came from elsewhere, it cannot be written, or a dump is damaged or none.
    """
    check_options(corpus, workers)
    target = Path(folder)
    found: list[Fetched] = []
    for url in _urls(corpus):
        if is_dump(url):
            found += _fetch_dump(url, target, workers, quiet, patience)
            continue
        with folder_to_fill(target):
            # The lock is one for the folder: the notes of all its files are in one file.
            if url.startswith(HUB):
                with locked(target / LOCK, patience):
                    found += _fetch_dataset(url, target, quiet)
            else:
                found.append(Download(url, target, quiet, patience).run())
    return found


def check_options(corpus: str, workers: int | None) -> None:
    """Check the options of `fetch` that need no network.

    Raises:
        CptError: The corpus is none that is known by name, or one is unusable.
    """
    _urls(corpus)
    count_processes(workers)


def _urls(corpus: str) -> tuple[str, ...]:
    if corpus in CORPORA:
        return CORPORA[corpus].urls
    if corpus.startswith(HUB) and set("@:") & set(corpus.removeprefix(HUB)):
        raise CptError(
            f"{corpus}: fetch takes a dataset with all its files, {HUB}OWNER/NAME; a configuration (@) and a split (:) "
            "are for prepare, which reads them from the hub."
        )
    if corpus.startswith((HUB, "https://")) or ("://" not in corpus and is_dump(corpus)):
        return (corpus,)
    if corpus.startswith("http://") and urlsplit(corpus).hostname in LOCAL:
        return (corpus,)
    if corpus.startswith("http://"):
        raise CptError(f"{corpus} is not encrypted: nobody could tell whether it arrives unchanged. Use https.")
    raise CptError(
        f"There is no corpus {corpus!r}. Known are {', '.join(CORPORA)}, {SCHEME}LANGUAGE@DATE, https:// addresses, "
        f"{HUB}NAME and a dump's file."
    )


def _fetch_dump(corpus: str, folder: Path, workers: int | None, quiet: bool, patience: float) -> list[Fetched]:
    """Get a dump of Wikipedia and make text of it; where the text is there, its dump may be deleted."""
    got: list[Fetched] = []
    if "://" in corpus or corpus.startswith(SCHEME):
        [url] = _urls(find_address(corpus, patience))
        dump = folder / Path(urlsplit(url).path).name
        if not dump.exists() and (text := existing(folder, public_url(url))):
            return [_fetched(text, public_url(url))]
        # A dump that is there is compared with the checksum noted when it came, without asking the server.
        sha1 = "" if dump.exists() else find_sha1(url, patience)
        with folder_to_fill(folder):
            got.append(Download(url, folder, quiet, patience, sha1).run())
        shown, sha256 = got[0].url, got[0].sha256
    else:
        dump = Path(corpus)
        if not dump.is_file():
            raise CptError(f"There is no file {corpus}.")
        shown = sha256 = ""
    text = extract(dump, folder, url=shown, sha256=sha256, workers=workers, quiet=quiet, patience=patience)
    return [*got, _fetched(text, shown or str(dump))]


def _fetched(text: Extraction, url: str) -> Fetched:
    return Fetched(text.path, url, text.size, text.sha256, text.status, text.pages)


def _fetch_dataset(url: str, folder: Path, quiet: bool) -> list[Fetched]:
    """Get a dataset of the hub; its own client resumes what is there in part."""
    from huggingface_hub import HfApi, constants, snapshot_download

    name, known = url.removeprefix(HUB), read_checksums(folder)
    page, shown = f"{constants.ENDPOINT}/datasets/{name}", not quiet and sys.stderr.isatty()
    with _writing(folder), explained("dataset", name, page), bars_of_the_hub(shown), retries_told_once():
        # The commit is asked for first and then named: files of two revisions must not end up in one folder.
        info = HfApi().dataset_info(name, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings or [] if not file.rfilename.startswith(".")}
        _claim(folder, url, sorted(files))
        # But for its words, which change without the data.
        there = {file: known[file] for file in files.keys() & known.keys() - {"README.md"} if (folder / file).exists()}
        for file, checksum in there.items():
            _check_kept(folder / file, checksum, files[file], f"{name} at {info.sha}")
        if missing := files.keys() - there.keys():  # without a pattern the client takes all files
            patterns = list(map(glob.escape, missing))
            snapshot_download(name, repo_type="dataset", revision=info.sha, local_dir=folder, allow_patterns=patterns)
        sums = there | {file: _checked_sum(folder / file, files[file]) for file in missing}
    keep_notes(folder, CHECKSUMS, sums)
    found = []
    for file, checksum in sorted(sums.items()):
        status = "unchanged" if known.get(file) == checksum else "fetched"
        found.append(Fetched(str(folder / file), url, (folder / file).stat().st_size, checksum, status))
    return found


def _check_kept(path: Path, checksum: str, file: "RepoSibling", revision: str) -> None:
    """Refuse to replace a file that an earlier run brought and that is another now, here or at the hub."""
    if hash_of(path) != checksum:
        raise CptError(f"{path} is not what {CHECKSUMS} says; delete it to fetch it again.")
    if not _is_the_hubs(path, file, checksum):
        raise CptError(
            f"{path} came from an earlier revision, and has other bytes in {revision}. Take another folder, or delete "
            "what is here."
        )


def _checked_sum(path: Path, file: "RepoSibling") -> str:
    """The SHA-256 of a file that has just arrived, which must have the bytes that the hub says."""
    checksum = hash_of(path)
    if not _is_the_hubs(path, file, checksum):
        path.unlink()
        raise CptError(f"{path} arrived damaged: it is not what the hub says. It was removed; rerun to fetch it again.")
    return checksum


def _is_the_hubs(path: Path, file: "RepoSibling", checksum: str) -> bool:
    kind, _, said = (content_of(file) or "").partition(":")
    if kind != "git":
        return said in ("", checksum)
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.sha1(git_prefix(path.stat().st_size)))
    return found.hexdigest() == said


def _claim(folder: Path, url: str, names: list[str]) -> None:
    """Note that files come from `url`, before its client writes them: it replaces what is there.

    Raises:
        CptError: A file is there that did not come from `url`, or that `url` does not have any more.
    """
    known, urls = read_notes(folder, CHECKSUMS), read_notes(folder, URLS)
    for name in names:
        fetched = name in known or urls.get(name) == url  # the latter: an earlier run was interrupted
        check_origin(folder / name, url, fetched, urls.get(name))
    # Shards that were cut anew have new names: beside the old ones every text would be there twice.
    gone = [name for name, origin in urls.items() if origin == url and name not in names and (folder / name).exists()]
    if gone:
        raise CptError(
            f"{folder} holds {gone[0]}, which {url} had at an earlier revision and has no more. Take another folder, "
            "or delete what is here."
        )
    keep_notes(folder, URLS, dict.fromkeys(names, url))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CptError(f"Cannot write to {folder}: {error.strerror or error}. A rerun goes on.") from error
