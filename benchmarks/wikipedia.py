"""Speed of `nemo-cpt fetch` on a dump of Wikipedia beside wikiextractor's, on the same file, interleaved in one run.

    python benchmarks/wikipedia.py ja.jsonl --rounds 3 --processes 2 --peers FOLDER

ja.jsonl: articles, `text` in each line; they are written as wikitext with infoboxes, links, references, tables, files
and categories, about as many as Wikipedia's articles have, and packed as a multistream dump like Wikimedia's. FOLDER:
`pip install --target FOLDER wikiextractor mwparserfromhell`; what is missing there is left out. wikiextractor runs as
it is, as people call it, and once with `--no-templates`: else it reads the dump twice, and expands the templates that
the dump defines, as Wikipedia's does. mwparserfromhell is what the `datasets` script of Wikipedia cleans with; it gets
the first --slow articles in this process, and its rate is what it gives alone.

    python benchmarks/wikipedia.py --cases --peers FOLDER

counts on how many constructs of tests/corpus/test_wikitext.py each of them gives what MediaWiki shows as text; blanks,
the marks of lists, dollars around formulas and raised or lowered digits are taken for the same.

Megabytes are those of the XML. A process is measured with its children, from its start to its end.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.support
from tests.support.wikipedia_dump import WikiPage, head, write_dump, xml_of

CITATIONS = (
    "<ref>{{{{Cite web|url=https://example.org/{0}/{1}.html|title={2}|date=2021-0{3}-1{3}|accessdate=2024-0{3}-02"
    "|work=[[{2}]]|language=en}}}}</ref>",
    '<ref name="n{0}">{{{{Cite book|和書|author={2}|title={2}の歴史|year=19{1}{3}|publisher=[[{2}]]出版|page=2{3}|'
    "isbn=978-4-00-0{0}}}}}</ref>",
    '<ref name="n{0}" />',
    "{{{{Sfn|{2}|19{1}{3}|p={3}}}}}",
)
INFOBOX = """{{{{Infobox 組織
| 名称 = {0}
| 画像 = [[ファイル:Example {1}.jpg|thumb|250px|{0}の[[写真]]]]
| 画像説明 = {{{{small|{0}}}}}、{{{{lang|en|Example {1}}}}}
| 設立 = {{{{start date and age|19{2}|4|1}}}}
| 所在地 = {{{{ウィキ座標2段度分秒|35|41|{2}|N|139|45|{2}|E|region:JP}}}}
| 人口 = {{{{formatnum:12345{2}}}}}人<ref>{{{{Cite web|url=http://example.org|title={0}}}}}</ref>
| 外部リンク = {{{{URL|https://example.org/{1}}}}}
}}}}
"""
TABLE = """{{| class="wikitable sortable" style="text-align:center"
|+ {0}
! 年 !! 数 !! 備考
|-
| 19{1} || {{{{formatnum:1{1}0}}}} || [[{0}]]
|-
| rowspan="2" | 19{1} || style="background:#eee" | {1} || {{{{flagicon|JPN}}}} {0}
|}}
"""
END = """== 脚注 ==
{{{{脚注ヘルプ}}}}
{{{{Reflist|2}}}}
== 関連項目 ==
* [[{0}]]
* [[日本の{0}一覧]]
== 外部リンク ==
* {{{{Official website|https://example.org/}}}}
* [https://example.org/{1} {0} 公式サイト]
{{{{Navbox {0}}}}}
{{{{Normdaten}}}}
{{{{DEFAULTSORT:{0}}}}}
[[Category:{0}]]
[[Category:19{1}年生]]
"""


# As ja.wikipedia.org has them: what is not written in Lua tests its parameters one by one.
_FIELDS = (
    "名称",
    "画像",
    "画像説明",
    "設立",
    "所在地",
    "人口",
    "外部リンク",
    *(f"予備{number}" for number in range(40)),
)
TEMPLATES = {
    "Infobox 組織": '{| class="infobox"\n'
    + "".join(
        f"{{{{#if:{{{{{{{name}|}}}}}}|\n{{{{!}}}}-\n! {name}\n{{{{!}}}} {{{{{{{name}}}}}}}}}}}" for name in _FIELDS
    )
    + "\n|}<noinclude>{{Documentation}}</noinclude>",
    "Cite web": "<includeonly>{{#invoke:citation/CS1|citation|CitationClass=web}}</includeonly>",
    "Cite book": "<includeonly>{{#invoke:citation/CS1|citation|CitationClass=book}}</includeonly>",
    "Sfn": "{{#invoke:Footnotes|sfn|template=sfn}}",
    "Lang": '<span lang="{{{1}}}" xml:lang="{{{1}}}">{{{2}}}</span><noinclude>{{Documentation}}</noinclude>',
    "Lang-en": "[[英語|英]]: {{lang|en|{{{1|}}}}}",
    "IPA": '<span title="国際音声記号" class="IPA">[{{{1}}}]</span>',
    "Small": "<small>{{{1}}}</small>",
    "Start date and age": "{{{1}}}年{{#if:{{{2|}}}|{{{2}}}月}}{{#if:{{{3|}}}|{{{3}}}日}}",
    "Flagicon": "[[ファイル:Flag of {{{1}}}.svg|border|{{#if:{{{size|}}}|{{{size}}}|25x20px}}|link=]]",
    "URL": "[{{{1}}} {{#if:{{{2|}}}|{{{2}}}|{{{1}}}}}]",
    "Official website": "[{{{1}}} {{#if:{{{name|}}}|{{{name}}}|公式ウェブサイト}}]",
    "脚注ヘルプ": '<div class="noprint">[[Help:脚注|脚注の使い方]]</div>',
    "Reflist": '<div class="reflist {{#if:{{{1|}}}|columns}}"><references group="{{{group|}}}" /></div>',
    "Normdaten": "{{#invoke:Authority control|authorityControl}}",
}


def as_wikitext(text: str, noise: random.Random) -> WikiPage:
    """An article around a text: a link for each 30 characters or so, a reference for each two sentences."""
    lines = [line for line in text.splitlines() if line.strip()] or ["空"]
    title = lines[0][:30].strip(" []{}|#<>") or "題"
    number = noise.randrange(10, 99)
    made = [INFOBOX.format(title, number, noise.randrange(10, 99))]
    for at, line in enumerate(lines[1:] or lines, 1):
        if at % 12 == 0:
            made += ["", f"== {line[:12]} ==", "<!-- 節 -->"]
        if at % 30 == 7:
            made += [
                TABLE.format(line[:8].replace("|", ""), number),
                f"[[ファイル:Image {at}.jpg|thumb|right|{line[:40]}]]",
            ]
        made.append(("* " if at % 9 == 0 else "") + _with_links(line, noise) + _reference(line, at, noise))
    made.append(END.format(title, number))
    return WikiPage(title, f"'''{title}'''（{{{{lang-en|{title}}}}}、{{{{IPA|x}}}}）は、\n" + "\n".join(made))


def _with_links(line: str, noise: random.Random) -> str:
    pieces, place = [], 0
    for word in re.finditer(r"[一-龠ァ-ヶー]{3,}|\b[A-Z][a-z]{3,}", line):
        if noise.random() < 0.4:
            label = word[0]
            link = f"[[{label}]]" if noise.random() < 0.6 else f"[[{label} (曖昧)|{label}]]"
            pieces += [line[place : word.start()], f"'''{link}'''" if noise.random() < 0.05 else link]
            place = word.end()
    return "".join(pieces) + line[place:]


def _reference(line: str, at: int, noise: random.Random) -> str:
    if at % 2:
        return ""
    title = re.sub(r"[\[\]{}|<>=]", "", line[:14])
    return noise.choice(CITATIONS).format(at, noise.randrange(1, 9), title, noise.randrange(1, 9))


def pages(paths: list[Path], megabytes: float) -> Iterator[WikiPage]:
    noise, left = random.Random(7), megabytes * 1e6
    yield from (WikiPage(f"Template:{name}", text, namespace=10) for name, text in TEMPLATES.items())
    for path in paths:
        for line in path.open(encoding="utf-8"):
            page = as_wikitext(json.loads(line)["text"], noise)
            yield page
            left -= len(page.text.encode()) + 900
            if noise.random() < 0.4:
                yield WikiPage(f"{page.title}の別名", f"#REDIRECT [[{page.title}]]", redirect=page.title)
            if noise.random() < 0.1:
                yield WikiPage(f"Template:{page.title}", "{{Navbox|list1=[[a]]}}", namespace=10)
            if left < 0:
                return


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run a process; return its wall-clock and CPU seconds, children included."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def mwparserfromhell_rate(dump_pages: list[WikiPage], peers: Path) -> tuple[float, float]:
    """Megabytes of wikitext a second that mwparserfromhell and our cleaner go through, each in this process."""
    sys.path.insert(0, str(peers))
    import mwparserfromhell

    from nemo_cpt.corpus.wikipedia.wikitext import Cleaner

    size = sum(len(page.text.encode()) for page in dump_pages) / 1e6
    begin = time.process_time()
    for page in dump_pages:
        mwparserfromhell.parse(page.text, skip_style_tags=True).strip_code()
    theirs = time.process_time() - begin
    cleaner, begin = Cleaner("ja"), time.process_time()
    for page in dump_pages:
        cleaner.text(page.text, page.title)
    return size / theirs, size / (time.process_time() - begin)


def compare_cases(peers: Path) -> None:
    """Print of each parser how many cases it gets right, and which it does not."""
    sys.path.insert(0, str(peers))
    import mwparserfromhell
    from wikiextractor.extract import Extractor

    from tests.corpus.test_wikitext import CASES, CLEANERS

    def by_wikiextractor(language: str, text: str) -> str:
        names = {"knownNamespaces": {"File", "Image", "Category", "ファイル", "画像", "カテゴリ", "Fichier"}}
        made = Extractor("1", "1", "https://e.org/wiki", "T", [text], **names)
        return "\n".join(made.clean_text(text, html_safe=False))

    parsers = {
        "nemo_cpt": lambda language, text: CLEANERS[language].text(text, "T"),
        "mwparserfromhell": lambda language, text: str(mwparserfromhell.parse(text).strip_code()),
        "wikiextractor": by_wikiextractor,
    }
    for name, parse in parsers.items():
        wrong = [
            case for case, (language, text, shown) in CASES.items() if _bare(parse(language, text)) != _bare(shown)
        ]
        print(f"{name}\t{len(CASES) - len(wrong)} of {len(CASES)}\t{'; '.join(wrong)}")


def _bare(text: str) -> str:
    return re.sub(r"[\s*#$-]", "", unicodedata.normalize("NFKC", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", type=Path)
    parser.add_argument("--cases", action="store_true")
    parser.add_argument("--megabytes", type=float, default=200, help="of XML, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers", type=Path, default=Path("."))
    parser.add_argument("--slow", type=int, default=300)
    given = parser.parse_args()
    if given.cases:
        return compare_cases(given.peers)
    folder = Path(tempfile.mkdtemp(prefix="wikipedia."))
    try:
        compare(given, folder)
    finally:
        shutil.rmtree(folder)


def compare(given: argparse.Namespace, folder: Path) -> None:
    made = list(pages(given.texts, given.megabytes))
    size = (len(head("ja").encode()) + sum(len(xml_of(1, page).encode()) for page in made)) / 1e6
    dump = write_dump(folder / "jawiki-20260901-pages-articles-multistream.xml.bz2", made, "ja")
    print(f"{len(made):,} pages, {size:,.1f} MB of XML, {dump.stat().st_size / 1e6:,.1f} MB packed")
    environment = os.environ | {"PYTHONPATH": f"{given.peers}:{Path(__file__).parents[1]}"}
    workers = str(given.processes)
    ours = [sys.executable, "-m", "nemo_cpt.cli", "fetch", str(dump), "-o", "OUT", "--workers", workers]
    theirs = [sys.executable, "-m", "wikiextractor.WikiExtractor", str(dump), "--json", "-q", "-o", "OUT"]
    theirs += ["--processes", workers]
    contestants = {"nemo-cpt fetch": ours}
    if (given.peers / "wikiextractor").is_dir():
        contestants |= {"wikiextractor --no-templates": [*theirs, "--no-templates"], "wikiextractor": theirs}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(given.rounds):
        for name, command in contestants.items():
            output = folder / "output"
            shutil.rmtree(output, ignore_errors=True)
            runs[name].append(measure([word.replace("OUT", str(output)) for word in command], environment))
            written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6
            print(f"  {name}: {runs[name][-1][0]:.1f} s, {written:,.1f} MB of text", file=sys.stderr)
    print("contestant\twall s\tMB/s\tCPU s\tMB per CPU s")
    for name, measured in runs.items():
        wall, cpu = (statistics.median(times) for times in zip(*measured, strict=True))
        print(f"{name}\t{wall:.1f}\t{size / wall:.1f}\t{cpu:.1f}\t{size / cpu:.1f}")
    if (given.peers / "mwparserfromhell").is_dir():
        theirs_alone, ours_alone = mwparserfromhell_rate(made[: given.slow], given.peers)
        print(f"cleaning alone, one process: mwparserfromhell {theirs_alone:.2f} MB/s, ours {ours_alone:.1f} MB/s")


if __name__ == "__main__":
    main()
