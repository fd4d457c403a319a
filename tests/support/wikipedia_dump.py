"""Dumps of a small Wikipedia in the form of Wikimedia's own: export-0.11, multistream, with their index and status."""

import bz2
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

NAMESPACES = {
    "ja": {0: "", 1: "ノート", 2: "利用者", 4: "Wikipedia", 6: "ファイル", 10: "Template", 14: "Category"},
    "zh": {0: "", 1: "Talk", 2: "User", 4: "Wikipedia", 6: "File", 10: "Template", 14: "Category"},
    "en": {0: "", 1: "Talk", 2: "User", 4: "Wikipedia", 6: "File", 10: "Template", 14: "Category"},
}


@dataclass(frozen=True)
class WikiPage:
    """A page as it stands in a dump."""

    title: str
    text: str
    namespace: int = 0
    redirect: str = ""
    model: str = "wikitext"


def head(language: str) -> str:
    names = NAMESPACES[language].items()
    listed = "".join(
        f'      <namespace key="{number}" case="first-letter">{name}</namespace>\n'
        if name
        else f'      <namespace key="{number}" case="first-letter" />\n'
        for number, name in names
    )
    return (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" '
        f'xml:lang="{language}">\n  <siteinfo>\n    <sitename>Wikipedia</sitename>\n'
        f"    <dbname>{language}wiki</dbname>\n    <base>https://{language}.wikipedia.org/wiki/Main_Page</base>\n"
        "    <generator>MediaWiki 1.46.0</generator>\n"
        f"    <case>first-letter</case>\n    <namespaces>\n{listed}    </namespaces>\n  </siteinfo>\n"
    )


def xml_of(number: int, page: WikiPage) -> str:
    redirect = f'    <redirect title="{escape(page.redirect)}" />\n' if page.redirect else ""
    size = len(page.text.encode())
    return (
        f"  <page>\n    <title>{escape(page.title)}</title>\n    <ns>{page.namespace}</ns>\n    <id>{number}</id>\n"
        f"{redirect}    <revision>\n      <id>{100_000_000 + number}</id>\n      <parentid>{99_000_000 + number}"
        "</parentid>\n      <timestamp>2026-08-31T12:34:56Z</timestamp>\n      <contributor>\n"
        "        <username>Somebody</username>\n        <id>42</id>\n      </contributor>\n"
        f"      <comment>/* x */ &lt;page&gt;</comment>\n      <origin>{100_000_000 + number}</origin>\n"
        f"      <model>{page.model}</model>\n      <format>text/x-wiki</format>\n"
        f'      <text bytes="{size}" sha1="phoiac9h4m842xq45sp7s6u21eteeq1" xml:space="preserve">'
        + escape(page.text, {'"': "&quot;"})
        + "</text>\n      <sha1>phoiac9h4m842xq45sp7s6u21eteeq1</sha1>\n    </revision>\n  </page>\n"
    )


def write_dump(path: Path, pages: Sequence[WikiPage], language: str = "en", streams_of: int = 100) -> Path:
    """Write a multistream dump and its index; `streams_of=0` writes one stream."""
    xml = [xml_of(number, page) for number, page in enumerate(pages, 1)]
    if not streams_of:
        path.write_bytes(bz2.compress((head(language) + "".join(xml) + "</mediawiki>\n").encode()))
        return path
    streams, index = [bz2.compress(head(language).encode())], list[str]()
    for begin in range(0, len(xml), streams_of):
        offset = sum(map(len, streams))
        packed = pages[begin : begin + streams_of]
        index += (f"{offset}:{begin + at}:{page.title}\n" for at, page in enumerate(packed, 1))
        streams.append(bz2.compress("".join(xml[begin : begin + streams_of]).encode()))
    streams.append(bz2.compress(b"</mediawiki>\n"))
    path.write_bytes(b"".join(streams))
    path.with_name(path.name.replace(".xml.bz2", "-index.txt.bz2")).write_bytes(bz2.compress("".join(index).encode()))
    return path


def publish(root: Path, wiki: str, date: str, pages: Iterable[WikiPage], language: str, status: str = "done") -> Path:
    """Lay a dump out as dumps.wikimedia.org does: a folder for its date, with its status and checksums."""
    folder = root / wiki / date
    folder.mkdir(parents=True)
    path = folder / f"{wiki}-{date}-pages-articles-multistream.xml.bz2"
    write_dump(path, list(pages), language, streams_of=4)
    files = {}
    for file in sorted(folder.glob("*.bz2")):
        content = file.read_bytes()
        sums = {name: hashlib.new(name, content).hexdigest() for name in ("md5", "sha1")}
        files[file.name] = {"size": len(content), "url": f"/{wiki}/{date}/{file.name}", **sums}
    job = {"status": status, "updated": "2026-09-02 03:04:05", "files": files}
    waiting = {"status": "waiting", "updated": ""}
    jobs = {"articlesmultistreamdump": job, "metahistory7zdump": waiting}
    (folder / "dumpstatus.json").write_text(json.dumps({"version": "0.8", "jobs": jobs}))
    sums_path = folder / f"{wiki}-{date}-sha1sums.txt"
    finished = files if status == "done" else {}
    sums_path.write_text("".join(f"{entry['sha1']}  {name}\n" for name, entry in finished.items()))
    return path
