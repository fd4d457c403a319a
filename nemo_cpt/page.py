"""The parts that reports are made of: HTML that opens offline, with styles and pictures inside, and PNGs."""

import base64
import html
import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

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


def png(figure: Any) -> bytes:
    """A figure of matplotlib's as PNG; it is closed."""
    from matplotlib import pyplot

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
    return file.getvalue()
