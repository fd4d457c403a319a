"""The parts that reports are made of: HTML that opens offline, with styles and pictures inside, and PNGs."""

import base64
import html
import io
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import orjson

# What matplotlib's own font lacks, it takes from the first of these that is installed.
CJK_FONTS = (
    "Noto Sans CJK JP", "Noto Sans JP", "IPAexGothic", "IPAGothic", "TakaoGothic", "VL Gothic", "Hiragino Sans",
    "Yu Gothic", "Noto Sans CJK TC", "Noto Sans CJK SC", "Noto Sans CJK KR", "WenQuanYi Zen Hei", "NanumGothic",
)  # fmt: skip

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: #1b2733 }
h1, h2, h3 { overflow-wrap: anywhere } img, input { max-width: 100% }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
td, th { padding: .25em .7em; border-bottom: 1px solid #d5dce2; text-align: left; vertical-align: top }
td div { white-space: pre-wrap; overflow-wrap: anywhere } small { color: #66788a }
#replies { display: table; table-layout: fixed; width: 100% } #replies th:first-child { width: 7em }
.better td:last-child { color: #14713d } .worse td:last-child { color: #b3261e }
.warning { background: #fff3cd; padding: .4em .8em } .answer { color: #14713d } pre { overflow-x: auto }
"""


def head(title: str) -> str:
    """The page's beginning, up to its heading; `</body></html>` ends it."""
    title = html.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], titles: Sequence[str] | None = None) -> Iterator[str]:
    """A table of texts; a row that ends in "better" or "worse" is coloured, and has its `titles` entry as a tooltip."""
    yield f"<table><thead>{table_row('th', *map(html.escape, columns))}</thead><tbody>"
    for number, row in enumerate(rows):
        title = f' title="{html.escape(titles[number])}"' if titles and titles[number] else ""
        verdict = f' class="{row[-1]}"' if row[-1] in ("better", "worse") else ""
        yield f"<tr{verdict}{title}>{''.join(f'<td>{html.escape(each)}</td>' for each in row)}</tr>"
    yield "</tbody></table>"


def table_row(tag: str, *parts: str) -> str:
    """A table's row of cells that are HTML already."""
    return f"<tr>{''.join(f'<{tag}>{part}</{tag}>' for part in parts)}</tr>"


def image(description: str, png_bytes: bytes) -> str:
    """A picture, inside the page."""
    content = base64.b64encode(png_bytes).decode()
    return f'<p><img alt="{html.escape(description)}" src="data:image/png;base64,{content}"></p>'


def details(summary: str, value: Any) -> str:
    """A value as JSON, folded under its name."""
    text = json.dumps(finite(value), ensure_ascii=False, indent=1)
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"


def finite(value: Any) -> Any:
    """A value as JSON holds it: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(value: Any) -> bytes:
    """A value as a file of JSON; NaN and infinity become null. Also of a hundred thousand steps in a moment."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(value, option=options)


@contextmanager
def drawing() -> Iterator[Any]:
    """Lend matplotlib's pyplot, without a window, for pictures that names of users stand in."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    installed = {font.name for font in font_manager.fontManager.ttflist}
    family = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
    # A name with $ is no formula.
    with matplotlib.rc_context({"text.parse_math": False, "font.family": family}), warnings.catch_warnings():
        # Without any such font there are boxes: pages have the names as text beside the picture.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield pyplot


def legend_name(name: str) -> str:
    """A name as a legend shows it: matplotlib leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def png(figure: Any) -> bytes:
    """A figure of matplotlib's as PNG; it is closed."""
    from matplotlib import pyplot

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
    return file.getvalue()
