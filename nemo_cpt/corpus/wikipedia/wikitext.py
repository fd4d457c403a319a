"""Wikitext to plain text, in time that grows with its length, however broken it is.

Four steps, in MediaWiki's own order: what hides its content from the parser (comments, nowiki, references, formulas) is
taken out; what nests (templates, links, tables) is resolved from the inside by one pass with a stack; then tags, quotes
and external links; then what begins lines (headings, lists), and entities.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from html import unescape

from nemo_cpt.corpus.wikipedia.names import CATEGORIES, CONVERTED, FILES, LANGUAGES
from nemo_cpt.corpus.wikipedia.templates import PIPE, rendered, subscript, superscript

# Characters that XML allows in no page stand for what is not to be touched, and for what was there.
_HELD = "\x02{}\x03"
_HELD_MARK = re.compile("\x02(\\d+)\x03")
_GONE = "\x04"  # a template without a text: it may leave empty brackets or a comma behind
_GONE_LAST = "\x05"  # one or more of them before a closing bracket, with the separators between
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_FILE, _CATEGORY = 6, 14
_DEPTH = 100  # constructs within each other; MediaWiki stops at 40, what goes on is broken
_VARIANTS = ("zh-hans", "zh-cn", "zh-sg", "zh-my", "zh", "zh-hant", "zh-tw", "zh-hk", "zh-mo", "sr-ec", "sr-cyrl")
_KEPT = "nowiki|pre|syntaxhighlight|source|math|ce|chem"
_DROPPED = (
    "ref|references|gallery|timeline|score|graph|chart|mapframe|maplink|imagemap|hiero|templatedata|templatestyles|"
    "inputbox|categorytree|indicator|includeonly|section|dynamicpagelist|phonos"
)
_OPENING = re.compile(rf"<!--|<({_KEPT}|{_DROPPED})(?=[\s/>])([^<>]*+)>", re.IGNORECASE)
_SIMPLE_LINK = re.compile(r"\[\[ *+([^\[\]{}|\n:#<>]++)\]\]")
_LABELLED_LINK = re.compile(r"\[\[[^\[\]{}|\n:<>]++\|([^\[\]{}|\n]++)\]\]")
_SIMPLE_TEMPLATE = re.compile(r"(?<!\{)\{\{([^{}\[\]]++)\}\}")
_MARK = re.compile(
    r"\[\[|\]\]++|\{\{++|\}\}++|^[ \t:*#]*+\{\||^[ \t]*+\|\}(?!\})|<table\b[^<>]*+>|</table\s*+>|-\{(?!\{)|\}-",
    re.IGNORECASE | re.MULTILINE,
)
_LINE_END = re.compile(r"[ \t]*+(?:\n|\Z)")
_OF_HEADERS = re.compile(r"^[ \t]*!.*$", re.MULTILINE)
_EXTERNAL = re.compile(r"\[(?:(?:https?:|ftps?:|irc:)?//|mailto:)[^\s\[\]<>\"]*+[ \t]*+([^\[\]\n]*+)\]", re.IGNORECASE)
_TAG = re.compile(
    r"</?(?:abbr|b|bdi|bdo|big|blockquote|br|caption|center|cite|code|data|dd|del|dfn|div|dl|dt|em|font|h[1-6]|hr|i|ins|"
    r"kbd|li|mark|noinclude|ol|onlyinclude|p|poem|q|rb|rp|rt|rtc|ruby|s|samp|section|small|span|strike|strong|sub|sup|"
    r"table|tbody|td|th|tr|tt|u|ul|var|wbr|references|ref|nowiki|includeonly|gallery|link|meta|time|languages|translate)"
    r"(?:[\s/][^<>]*+)?>",
    re.IGNORECASE,
)
_BREAK = re.compile(r"<(?:br|p|/p|/li|/tr|/div|hr|/blockquote|/h[1-6])(?:[\s/][^<>]*+)?>", re.IGNORECASE)
_RUBY_BRACKETS = re.compile(r"<rp>[^<]*+</rp>|<rt>\s*+</rt>", re.IGNORECASE)
_RAISED = re.compile(r"<(su[pb])>([^<]{1,20})</\1>", re.IGNORECASE)
_QUOTES = re.compile("''++")
_SWITCH = re.compile(r"__[A-Z]{3,30}__|__[^\x00-\x7f]{2,20}__")
_HEADING = re.compile(r"(={1,6})(.+?)(={1,6})")
_CELLS = ("|", "{|", PIPE)
_LEAD = ",;:、，；：/・"
_BRACKETS = re.compile(f"([(（])[ {_LEAD}]*+{_GONE}[ {_LEAD}{_GONE}]*+([)）]?)")
_LAST_IN_BRACKETS = re.compile(f"{_GONE}[ ,;{_GONE}、，；]{{0,30}}+(?=[)）])")
_BEFORE_LAST = re.compile(f"(?:[,;、，；] ?)?{_GONE_LAST}")
_BEFORE_STOP = re.compile(f" {_GONE}(?=[.,;:!?])")
_GONE_ROW = re.compile(f"{_GONE}(?: ?{_GONE})++")
_BLANKS = re.compile(r"[ \t]{2,}+")
_ODD = dict.fromkeys((0xA0, 0x2002, 0x2003, 0x2009, 0x202F), " ") | dict.fromkeys((0xAD, 0x200B, 0xFEFF))
_IS_ODD = re.compile(f"[{''.join(map(chr, _ODD))}]")


class Cleaner:
    """Makes plain text of one wiki's wikitext.

    Attributes:
        converts: Whether the wiki converts between scripts, by marks in the text.

    Args:
        language: Of the wiki.
        namespaces: Names of its namespaces by number, as its dump lists them.
    """

    def __init__(self, language: str = "en", namespaces: Mapping[int, str] | None = None) -> None:
        local = {number: name.lower() for number, name in (namespaces or {}).items()}
        self._dropped = {*FILES, *CATEGORIES, local.get(_FILE, ""), local.get(_CATEGORY, "")} - {""}
        # What looks like a language, and is a namespace here
        self._languages = LANGUAGES - set(local.values())
        self.converts = language.partition("-")[0] in CONVERTED

    def text(self, wikitext: str, title: str = "") -> str:
        """Return the plain text of an article."""
        text, held = _take_out(_FORBIDDEN.sub("", wikitext))
        # Most links and templates hold no others: substituting those first takes less than the pass below would.
        text = _SIMPLE_LINK.sub(r"\1", _LABELLED_LINK.sub(r"\1", text))
        text = _SIMPLE_TEMPLATE.sub(lambda found: _rendered(found[1], title), text)
        text = _lines(_characters(_Nesting(self, title).resolved(text)))
        if held:
            text = _HELD_MARK.sub(lambda found: held[int(found[1])], text)
        return text.replace(PIPE, "|").strip()

    def link(self, content: str) -> str:
        """Return what a link shows; nothing for files, categories and the same article in other languages."""
        target, bar, label = content.partition("|")
        target = target.strip()
        namespace, colon, _ = target.partition(":")
        if colon:
            name = namespace.strip().replace("_", " ").lower()
            if name in self._dropped or (name in self._languages and not bar):
                return ""
            # [[:Category:X]] is a link to that page, and shows its name.
            if not name:
                target = target[1:].lstrip()
        return label if label.strip() else target

    def converted(self, content: str) -> str:
        """Return what a mark of the converter between scripts shows: one of its forms, the simplified one first."""
        flags, bar, rest = content.partition("|")
        if bar:
            if {flag.strip() for flag in flags.split(";")} & {"T", "H", "D", "-"}:  # a rule, for another place
                return ""
            content = rest
        forms = {}
        for part in content.split(";"):
            name, colon, form = part.rpartition("=>")[2].partition(":")
            forms[name.strip().lower()] = form.strip() if colon else ""
        return next((forms[name] for name in _VARIANTS if forms.get(name)), content)


@lru_cache(64)
def _closing(name: str) -> re.Pattern[str]:
    return re.compile(rf"</{name}\s*+>", re.IGNORECASE)


def _take_out(text: str) -> tuple[str, list[str]]:
    """Take out comments, and tags whose content is no wikitext or no text.

    Returns:
        The text, and what is put back at its marks in the end.
    """
    if "<" not in text:
        return text, []
    pieces, held = list[str](), list[str]()
    unclosed = set[str]()  # else each of many would look through the whole rest for an end that is not there
    place = done = 0
    while opening := _OPENING.search(text, place):
        begin, place = opening.span()
        name, shown = (opening[1] or "").lower(), ""
        if not name:
            end = _after_comment(text, begin, place)
        # <ref name="x"/> holds nothing.
        elif opening[2].endswith("/"):
            end = place
        elif name not in unclosed and (closing := _closing(name).search(text, place)):
            end = closing.end()
            if name in _KEPT.split("|"):
                shown = _shown(name, text[place : closing.start()])
        else:
            unclosed.add(name)
            continue
        pieces.append(text[done:begin])
        if shown:
            pieces.append(_HELD.format(len(held)))
            held.append(shown)
        place = done = end
    return "".join(pieces) + text[done:], held


def _after_comment(text: str, begin: int, place: int) -> int:
    """Return where the text goes on; one alone on its line takes its end along: else a paragraph ends there."""
    end = text.find("-->", place)
    if end < 0:
        return len(text)
    end += len("-->")
    return end + ((begin == 0 or text[begin - 1] == "\n") and text[end : end + 1] == "\n")


def _shown(name: str, content: str) -> str:
    """Return the text of a tag whose content is no wikitext: formulas as TeX, code as it is."""
    if name in ("math", "ce", "chem"):
        formula = " ".join(content.split())
        return formula and (f"${formula}$" if name == "math" else f"$\\ce{{{formula}}}$")
    if name in ("nowiki", "pre"):
        content = unescape(content)
    return content.strip("\n")


class _Open:
    """A construct that has begun: its mark, and its content so far."""

    __slots__ = ("mark", "pieces")

    def __init__(self, mark: str) -> None:
        self.mark, self.pieces = mark, list[str]()


class _Nesting:
    """One pass over a text that resolves what nests, with a stack of what is open.

    Marks on it are `[[`, `{{` (or more braces), `-{`, and `t` for a table.
    """

    def __init__(self, cleaner: Cleaner, title: str) -> None:
        self.cleaner, self.title = cleaner, title
        self.stack = [_Open("")]

    def resolved(self, text: str) -> str:
        """Return the text with all that nests resolved."""
        search, place = _MARK.search, 0
        while found := search(text, place):
            begin, end = found.span()
            self.stack[-1].pieces.append(text[place:begin])
            place = begin + self._heed(text[begin:end], last=_LINE_END.match(text, end) is not None)
        self.stack[-1].pieces.append(text[place:])
        self._give_all_up()
        return "".join(self.stack[0].pieces)

    def _heed(self, mark: str, last: bool) -> int:
        """Open or close a construct.

        Args:
            mark: What was found.
            last: Whether it is the last of its line.

        Returns:
            How many characters of the mark that took; the others may begin another one.
        """
        if mark == "[[" or mark.startswith("{{"):
            self._open(mark)
        elif mark.startswith("]]"):
            return self._close_brackets(len(mark))
        elif mark.startswith("}}"):
            return self._close_braces(len(mark))
        elif mark == "-{" and self.cleaner.converts:
            self._open(mark)
        elif mark == "}-" and self._unwound_to("-"):
            self._add(self.cleaner.converted(self._closed()))
        # Of a wiki that does not convert scripts: one brace is text, and what follows may begin something else.
        elif mark in ("-{", "}-"):
            self._add(mark[0])
            return 1
        elif mark.endswith("{|") or mark[1] in "tT":
            self._open("t")
        elif mark.endswith("|}") and self._begins_an_argument(last):
            self.stack[-1].pieces.append(mark)
        elif self._unwound_to("t"):
            self._closed()
            self._add("\n")
        return len(mark)

    def _begins_an_argument(self, last: bool) -> bool:
        """Say whether a bar and a brace at a line's beginning are of a template: an argument that begins with a brace.

        Within a template in a table they are where the line goes on: else the template is one that has no end, and does
        not take the table's.
        """
        marks = [each.mark[0] for each in self.stack[1:]]
        inner = next((mark for mark in reversed(marks) if mark in "{t"), "")
        return inner == "{" and ("t" not in marks or not last)

    def _open(self, mark: str) -> None:
        if len(self.stack) > _DEPTH:
            self._give_all_up()
        self.stack.append(_Open(mark))

    def _close_brackets(self, brackets: int) -> int:
        """Close a link, or first the external one that ends within it; return how many brackets that took."""
        if not self._unwound_to("["):
            return brackets // 2 * 2  # all pairs at once: each would look through the run again
        content = "".join(self.stack[-1].pieces)
        if brackets % 2 and content.count("[") > content.count("]"):
            self._add("]")
            return 1
        self._add(self.cleaner.link(self._closed()))
        return 2

    def _close_braces(self, braces: int) -> int:
        """Close a template (two braces) or a parameter (three); return how many that took."""
        if not self._unwound_to("{"):
            return braces
        opened = len(self.stack[-1].mark)
        # MediaWiki takes three where both sides have them: {{{1|what stands here without an argument}}}
        taken = 3 if min(opened, braces) >= 3 else 2
        content = self._closed()
        if opened - taken >= 2:
            self.stack.append(_Open("{" * (opened - taken)))
        self._add(_rendered(content, self.title) if taken == 2 else content.partition("|")[2])
        return taken

    def _unwound_to(self, kind: str) -> bool:
        """Give up what was begun within the innermost construct of a kind and has no end; say whether there is one.

        So a link or table without an end ends with the template that it is in; but no bracket within a template or a
        table closes a link around it.
        """
        stack = self.stack
        for place in range(len(stack) - 1, 0, -1):
            mark = stack[place].mark
            if mark[0] == kind:
                while len(stack) > place + 1:
                    self._give_up()
                return True
            if kind in "[-" and mark[0] in "{t":
                return False
        return False

    def _give_all_up(self) -> None:
        while len(self.stack) > 1:
            self._give_up()

    def _closed(self) -> str:
        return "".join(self.stack.pop().pieces)

    def _give_up(self) -> None:
        """Take the content of what is open innermost, and has no end, for text."""
        kind = self.stack[-1].mark[0]
        content = self._closed()
        if kind in "{t":
            # The name of a template or what a table looks like is no text; arguments and cells below begin with a bar.
            _, end, content = content.partition("\n")
            content = end + content
        if kind == "t":
            content = _OF_HEADERS.sub("", content)
        self._add(content)

    def _add(self, text: str) -> None:
        # Its bars do not divide the construct around it.
        self.stack[-1].pieces.append(text.replace("|", PIPE) if "|" in text and len(self.stack) > 1 else text)


def _rendered(call: str, title: str) -> str:
    return rendered(call, title).replace("|", PIPE) or _GONE


def _characters(text: str) -> str:
    """Undo external links, tags and switches, and what dropped templates left behind."""
    # Each look-up spares most texts an expression that would go through all of them.
    if "[" in text:
        text = _EXTERNAL.sub(r"\1", text)
    if "<" in text:
        if "<rt>" in text:
            text = _RUBY_BRACKETS.sub("", text).replace("<rt>", "（").replace("</rt>", "）")
        text = _RAISED.sub(_raised, text)
        text = _TAG.sub("", _BREAK.sub("\n", text))
    if "__" in text:
        text = _SWITCH.sub("", text)
    if _GONE in text:
        text = _BRACKETS.sub(_brackets, _GONE_ROW.sub(_GONE, text))
        text = _LAST_IN_BRACKETS.sub(_GONE_LAST, text)
        if _GONE_LAST in text:
            text = _BEFORE_LAST.sub("", text)
        text = _BEFORE_STOP.sub("", text).replace(_GONE, "")
    return text


def _brackets(found: re.Match[str]) -> str:
    """Leave nothing of brackets that only a template stood in, and nothing before what comes first in them now."""
    return _GONE if found[2] else found[1]


def _raised(found: re.Match[str]) -> str:
    return (superscript if found[1].lower() == "sup" else subscript)(found[2])


def _lines(text: str) -> str:
    """Undo what begins lines, quotes and entities; sections in which nothing is left lose their heading."""
    kept = list[str]()
    headings = list[tuple[int, str]]()  # those that wait for a text
    apart = False
    for line in text.split("\n"):
        line = line.strip()
        # A blank line, or a rule of dashes: what follows is a paragraph of its own.
        if not line or (line[0] == "-" and len(line) > 3 and not line.strip("-")):
            apart = True
            continue
        if line[0] == "=" and (heading := _HEADING.fullmatch(line)):
            level = min(len(heading[1]), len(heading[3]))
            # A heading within a section waits with those around it; one beside it takes its place.
            while headings and headings[-1][0] >= level:
                headings.pop()
            headings.append((level, _plain(heading[2].strip())))
            continue
        # What is left of tables and templates that are broken.
        if line.startswith(_CELLS):
            continue
        line = _item(line) if line[0] in "*#:;" else _plain(line)
        if not line:
            continue
        for _, name in headings:
            kept += ("", name)
        if apart or headings:
            kept.append("")
        headings.clear()
        kept.append(line)
        apart = False
    return "\n".join(kept)


def _item(line: str) -> str:
    """Return an item of a list: with a dash for its bullet or number, further in for each level above it."""
    text = line.lstrip("*#:;")
    marks = line[: len(line) - len(text)]
    text = _plain(text.strip())
    if not any(map(str.isalnum, text)):  # what citations leave: a stop, a dash
        return ""
    return f"{'  ' * (len(marks) - 1)}- {text}" if marks[-1] in "*#" else text


def _plain(line: str) -> str:
    if "''" in line:
        line = _unquoted(line)
    if "&" in line:
        line = unescape(line)
    if _IS_ODD.search(line):
        line = line.translate(_ODD)
    return _BLANKS.sub(" ", line).strip()


def _unquoted(line: str) -> str:
    """Undo italic and bold as MediaWiki does: what is more than five quotes is text, and so is the first of four."""
    runs = list(_QUOTES.finditer(line))
    counts = [5 if (size := len(run[0])) > 5 else 3 if size == 4 else size for run in runs]
    # As MediaWiki's doQuotes: where both are odd in number, one of the bolds is an apostrophe before an italic. It is
    # the first behind a word of one letter (l'''amour''), else behind a longer word, else the first.
    lone = None
    if sum(count in (2, 5) for count in counts) % 2 and sum(count in (3, 5) for count in counts) % 2:
        bold = [run for run, count in zip(runs, counts, strict=True) if count == 3]
        words = [run for run in bold if run.start() and line[run.start() - 1] != " "]
        letters = [run for run in words if run.start() == 1 or line[run.start() - 2] == " "]
        lone = next(iter([*letters, *words, *bold]), None)
    pieces, place = list[str](), 0
    for run, count in zip(runs, counts, strict=True):
        pieces += (line[place : run.start()], "'" * (len(run[0]) - count + (run is lone)))
        place = run.end()
    return "".join(pieces) + line[place:]
