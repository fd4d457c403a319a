"""The report of a cleaning: one HTML file that opens offline, its pictures inside."""

import html
from collections.abc import Iterator
from typing import Any

from nemo_cpt.cleaning.rule import Check
from nemo_cpt.cleaning.rules import Rules
from nemo_cpt.cleaning.tallies import CleaningReport, Counts, bin_edge, is_share, position
from nemo_cpt.page import head, table

_WIDTH, _HEIGHT = 420, 130
_STYLE = (
    "<style>.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); gap: 1em } "
    "figure { margin: 0 } svg { background: #f7f9fa } .before { fill: #b9c4cd } .after { fill: #2f7d4f } "
    "svg text { font-size: 11px; fill: #66788a } .limit { stroke: #b3261e; stroke-dasharray: 4 3 } "
    "blockquote { border-left: 3px solid #d5dce2; margin: .4em 0; padding: 0 .8em; white-space: pre-wrap; "
    "overflow-wrap: anywhere }</style>"
)


def page(report: CleaningReport, counts: Counts, rules: Rules, seconds: float) -> str:
    """Return the report of a cleaning as a page.

    Args:
        report: What was done.
        counts: What was counted, with samples and histograms.
        rules: The rules.
        seconds: How long it took.
    """
    return "\n".join(_page(report, counts, rules, seconds))


def _page(report: CleaningReport, counts: Counts, rules: Rules, seconds: float) -> Iterator[str]:
    yield head("What was cleaned")
    yield _STYLE
    for warning in report.warnings:
        yield f'<p class="warning">{html.escape(warning)}</p>'
    rate = counts.nbytes / 1e6 / max(seconds, 1e-9)
    rows = [
        ("read", f"{counts.documents:,}", f"{counts.nbytes:,}", ""),
        ("kept", f"{counts.kept:,}", f"{counts.kept_bytes:,}", _share(counts.kept, counts.documents)),
    ]
    for (rule, measure), found in _ordered(counts, rules):
        share = _share(found.documents, counts.documents)
        rows.append((f"dropped: {rule}, {measure}", f"{found.documents:,}", f"{found.nbytes:,}", share))
    yield from table(("", "documents", "bytes", "share"), rows)
    yield f"<p>{seconds:,.1f} s, {rate:,.1f} MB/s. Rules for the language {html.escape(rules.language)}.</p>"
    if report.changes:
        yield "<h2>What was done to texts that are kept by the rules</h2>"
        yield from table(("", "times"), [(name, f"{count:,}") for name, count in report.changes.items()])
    yield "<h2>Before and after</h2>"
    yield (
        "<p>How many documents have which value: grey of all that were measured, which is all that no earlier rule "
        "dropped; green of those that all rules about single documents kept. The dashed lines are the limits.</p>"
    )
    yield '<div class="grid">'
    for name in counts.before:
        yield _figure(name, counts.before[name].tolist(), counts.after[name].tolist(), counts.limits[name])
    yield "</div><h2>Samples of what was dropped</h2>"
    for (rule, measure), found in _ordered(counts, rules):
        yield f"<h3>{html.escape(rule)}: {html.escape(measure)} ({found.documents:,})</h3>"
        for sample in found.samples:
            of = f", repeats {sample['of']}" if "of" in sample else ""
            yield f"<small>{sample['value']:.4g}; allowed: {html.escape(sample['limit'] + of)}</small>"
            yield f"<blockquote>{html.escape(sample['text'])}</blockquote>"
    yield "<h2>The rules</h2>"
    yield f"<details><summary>as YAML, for --config</summary><pre>{html.escape(rules.to_yaml())}</pre></details>"
    yield "</body></html>"


def _ordered(counts: Counts, rules: Rules) -> list[tuple[tuple[str, str], Any]]:
    order = {rule.name: number for number, rule in enumerate(rules.rules)}
    return sorted(counts.dropped.items(), key=lambda each: (order.get(each[0][0], len(order)), each[0]))


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"


def _figure(name: str, before: list[int], after: list[int], check: Check) -> str:
    """Return a histogram, from the first bin that has anything to the last."""
    used = [number for number, count in enumerate(before) if count]
    if not used:
        return ""
    # A share is shown from 0 to 1, so that pictures can be compared; sizes have no natural end.
    first, last = (0, len(before) - 1) if is_share(name) else (used[0], used[-1])
    width, tallest = _WIDTH / (last - first + 1), max(before)
    bars = []
    for kind, counted in (("before", before), ("after", after)):
        for number in range(first, last + 1):
            if tall := _HEIGHT * counted[number] / tallest:
                place = f'x="{(number - first) * width:.1f}" y="{_HEIGHT - tall:.1f}"'
                bars.append(f'<rect class="{kind}" {place} width="{width:.1f}" height="{tall:.1f}"/>')
    for limit in (check.at_least, check.at_most):
        # A limit outside of what was measured dropped nothing, and would stretch the picture.
        if limit is not None and 0 <= (at := (float(position(name, limit)) - first) * width) <= _WIDTH:
            bars.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{_HEIGHT}"/>')
    ends = [f"{bin_edge(name, number):,.{2 if is_share(name) else 0}f}" for number in (first, last + 1)]
    return (
        f"<figure><figcaption><b>{html.escape(name)}</b> {html.escape(check.limit)}</figcaption>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT + 16}" role="img">{"".join(bars)}'
        f'<text x="0" y="{_HEIGHT + 13}">{ends[0]}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 13}" text-anchor="end">{ends[1]}</text></svg></figure>'
    )
