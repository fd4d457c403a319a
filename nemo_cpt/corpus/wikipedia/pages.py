"""The pages of a MediaWiki export (export-0.10 and 0.11): what is an article of them, and what it is made of.

Markup within the XML is escaped, so that no text holds `<page>`: a piece of a dump is cut into pages without an XML
parser, from any place on, twenty times as fast as by expat.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote

from nemo_cpt.corpus.wikipedia.templates import is_disambiguation
from nemo_cpt.errors import CptError

LICENSE = "CC BY-SA 4.0"
OPEN, CLOSE = b"<page>", b"</page>"
_FIELD = r"<{0}>(.*?)</{0}>"
_TITLE, _NAMESPACE, _MODEL = (re.compile(_FIELD.format(name)) for name in ("title", "ns", "model"))
_ID = re.compile(r"<id>(\d+)</id>")
_TEXT = re.compile(r"<text\b[^>]*(?<!/)>(.*?)</text>", re.DOTALL)
_NUMBERED = re.compile(r"&#(x[0-9a-fA-F]+|\d+);")
_REDIRECT = re.compile(r"\s*#\s*(?:redirect|転送|重定向|넘겨주기)\s*:?\s*\[\[", re.IGNORECASE)
_SAFE = "/:@!$*,;()'~"  # what MediaWiki leaves as it is in the address of a page


@dataclass(frozen=True)
class Site:
    """What a dump says of the wiki that it is of.

    Attributes:
        database: Its name, `jawiki`.
        language: Of its texts, `ja`.
        base: Address of an article without its title, "" where the dump does not tell.
        license: Of its texts, "" where it is not known.
        namespaces: Names of its namespaces by number, as they are written there.
    """

    database: str
    language: str
    base: str
    license: str
    namespaces: dict[int, str]


class Page(NamedTuple):
    """An article: its title, the numbers of the page and of its revision, and its wikitext."""

    title: str
    id: int
    revision: int
    wikitext: str


def read_site(head: bytes, path: object) -> Site:
    """Return what the head of a dump says of its wiki.

    Raises:
        CptError: It is not the head of a MediaWiki export.
    """
    text = head.decode("utf-8", "replace")
    begin = re.match(r"\ufeff?\s*(?:<\?xml[^>]*>\s*)?<mediawiki\b([^>]*)>", text)
    if not begin:
        raise CptError(
            f"{path} holds no MediaWiki export, it begins with {text[:60]!r}. A dump of Wikipedia is called "
            "…-pages-articles-multistream.xml.bz2."
        )
    language = re.search(r'xml:lang="([^"]+)"', begin[1])
    found = {name: re.search(_FIELD.format(name), text) for name in ("dbname", "base")}
    namespaces = re.findall(r'<namespace key="(-?\d+)"[^>]*>([^<]+)</namespace>', text)
    base = _unescape(found["base"][1]) if found["base"] else ""
    return Site(
        found["dbname"][1] if found["dbname"] else "",
        language[1] if language else "en",
        base.rpartition("/")[0] + "/" if base else "",
        # Another wiki may have another licence.
        LICENSE if ".wikipedia.org/" in base else "",
        {int(number): _unescape(name) for number, name in namespaces},
    )


def pages_in(piece: bytes) -> Iterator[str]:
    """Yield the XML of each whole page."""
    end = 0
    while (begin := piece.find(OPEN, end)) >= 0 and (end := piece.find(CLOSE, begin)) >= 0:
        yield piece[begin:end].decode("utf-8", "replace")


def read_page(xml: str, site: Site) -> Page | str:
    """Return a page that is an article; of any other the reason why it is none."""
    head, _, rest = xml.partition("<revision>")
    namespace, title, number = _NAMESPACE.search(head), _TITLE.search(head), _ID.search(head)
    if not (namespace and title and number):
        return "damaged"
    if namespace[1] != "0":
        return "other namespaces"
    if "<redirect" in head:
        return "redirects"
    # A history has many: the last one is the newest.
    revision = rest.rpartition("<revision>")[2]
    model, identity, found = _MODEL.search(revision), _ID.search(revision), _TEXT.search(revision)
    if model and model[1] != "wikitext":
        return "not wikitext"
    if not (found and identity):
        return "empty"
    text = _unescape(found[1])
    if _REDIRECT.match(text):
        return "redirects"
    if is_disambiguation(text, site.language):
        return "disambiguations"
    return Page(_unescape(title[1]), int(number[1]), int(identity[1]), text)


def address(title: str, site: Site) -> str:
    """Return where an article can be read, "" where the dump does not tell."""
    return site.base + quote(title.replace(" ", "_"), safe=_SAFE) if site.base else ""


def _unescape(text: str) -> str:
    """Undo XML's escapes, and no more: an entity of the wikitext itself, as `&amp;nbsp;`, is one afterwards."""
    if "&" not in text:
        return text
    if "&#" in text:
        text = _NUMBERED.sub(_character, text)
    for name, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&apos;", "'"), ("&amp;", "&")):
        text = text.replace(name, character)
    return text


def _character(found: re.Match[str]) -> str:
    number = int(found[1][1:], 16) if found[1][0] == "x" else int(found[1])
    return chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else "\ufffd"
