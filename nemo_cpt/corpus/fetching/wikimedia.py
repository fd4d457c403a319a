"""Dumps of Wikipedia on Wikimedia's servers: which there are, and what their checksums are."""

import os
import re
from urllib.parse import urlsplit

import orjson

from nemo_cpt.corpus.fetching.download import read_page
from nemo_cpt.errors import CptError

SCHEME = "wikipedia:"
SERVER = "https://dumps.wikimedia.org"
MIRROR = "WIKIMEDIA_DUMPS"  # environment variable with the address of a mirror
_NAME = re.compile(r"([a-z][a-z0-9-]*)(?:@(\d{8}|latest))?")
_FILE = "pages-articles-multistream.xml.bz2"
_DUMP = re.compile(r"-pages-(?:articles|meta-current)[^/]*\.xml[^/]*\.bz2$|-p\d+p\d+\.xml\.bz2$")
_DATES = re.compile(r'href="(\d{8})/?"')


def is_dump(corpus: str) -> bool:
    """Say whether a corpus is a dump of Wikipedia, by its name: of its language, its address or its file."""
    if "://" not in corpus:
        return corpus.startswith(SCHEME) or corpus.endswith(".bz2")
    return bool(_DUMP.search(urlsplit(corpus).path))


def find_address(corpus: str, patience: float) -> str:
    """Return the address of a dump that is named by language and date; an address is returned as it is.

    Raises:
        CptError: The name is none, or the server has no such Wikipedia, or no finished dump of it.
    """
    if not corpus.startswith(SCHEME):
        return corpus
    named = _NAME.fullmatch(corpus.removeprefix(SCHEME))
    if not named:
        raise CptError(f"{corpus} names no dump. Write {SCHEME}ja@20260901, {SCHEME}ja@latest, {SCHEME}simple@latest.")
    language, date = named[1], named[2] or "latest"
    wiki = language.replace("-", "_") + "wiki"
    if date != "latest":
        return _address(wiki, date)
    # The newest may still be in the making.
    for date in _dates(wiki, patience):
        if _file_status(f"{_server()}/{wiki}/{date}/", f"{wiki}-{date}-{_FILE}", patience) is not None:
            return _address(wiki, date)
    raise CptError(f"{_server()}/{wiki}/ has no finished dump at the moment. Name a date: {SCHEME}{language}@YYYYMMDD.")


def find_sha1(url: str, patience: float) -> str:
    """Return the SHA-1 of a dump that its server tells, "" where it tells none.

    Raises:
        CptError: The address is one of a Wikipedia or a date that the server does not have.
    """
    folder, _, name = url.partition("?")[0].rpartition("/")
    if (sha1 := _file_status(f"{folder}/", name, patience)) is not None:
        return sha1
    wiki, _, rest = name.partition("-")
    date = rest.partition("-")[0]
    sums = read_page(f"{folder}/{wiki}-{date}-sha1sums.txt", patience)
    # In the folder of the latest ones, the list has the names with their dates.
    ending = f"-{rest.partition('-')[2]}"
    for line in (sums or b"").decode("utf-8", "replace").splitlines():
        sha1, _, listed = line.partition("  ")
        if listed == name or (date == "latest" and listed.startswith(f"{wiki}-") and listed.endswith(ending)):
            return sha1
    if url.startswith(f"{_server()}/{wiki}/{date}/") and date != "latest":
        raise CptError(
            f"There is no finished dump of {wiki} of {date} at {_server()}. There are: "
            f"{', '.join(_dates(wiki, patience)) or 'none'}."
        )
    return ""


def _server() -> str:
    return os.environ.get(MIRROR, SERVER).rstrip("/")


def _address(wiki: str, date: str) -> str:
    return f"{_server()}/{wiki}/{date}/{wiki}-{date}-{_FILE}"


def _dates(wiki: str, patience: float) -> list[str]:
    """Return the dates of a wiki's dumps, the latest one first.

    Raises:
        CptError: The server has no such wiki.
    """
    page = read_page(f"{_server()}/{wiki}/", patience)
    if page is None:
        raise CptError(
            f"{_server()} has no {wiki}: languages are written as in the address of their Wikipedia, such as ja, en, "
            "zh, ko, simple, zh-min-nan."
        )
    return sorted(set(_DATES.findall(page.decode("utf-8", "replace"))), reverse=True)


def _file_status(folder: str, name: str, patience: float) -> str | None:
    """Return the SHA-1 of a finished file, None where the dump's status does not know it."""
    page = read_page(f"{folder}dumpstatus.json", patience)
    try:
        jobs = orjson.loads(page or b"{}").get("jobs", {}).values()
        files = [job["files"].get(name) for job in jobs if job.get("status") == "done" and "files" in job]
        return next((str(file["sha1"]) for file in files if file and file.get("sha1")), None)
    except (ValueError, AttributeError, TypeError):
        return None
