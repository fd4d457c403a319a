"""Command of `nemo-cpt`: cleaning a corpus."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.corpus import PANEL, Json, Key, MaxSkipped, OnError, Overwrite, Workers
from nemo_cpt.cli.tables import print_json, print_report, print_table
from nemo_cpt.errors import CptError

if TYPE_CHECKING:
    from nemo_cpt.cleaning.examination import Examination
    from nemo_cpt.cleaning.rules import Rules


@app.command(rich_help_panel=PANEL)
def clean(
    inputs: Annotated[list[str] | None, typer.Argument(help="As for prepare.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of kept.jsonl, dropped.jsonl, cleaning.json, report.html."),
    ] = None,
    language: Annotated[str | None, typer.Option(help="Of the texts: ja, en, zh or ko.")] = None,
    config: Annotated[Path | None, typer.Option(help="Rules as YAML, instead of those of --language.")] = None,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print the rules as YAML.")] = False,
    explain: Annotated[str | None, typer.Option(help="FILE:LINE: every rule on one document; writes nothing.")] = None,
    decontaminate: Annotated[
        list[str] | None,
        typer.Option(help="An evaluation set: documents that overlap it are dropped; repeatable."),
    ] = None,
    json_key: Key = "text",
    on_error: OnError = "stop",
    max_skipped: MaxSkipped = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Keep what is worth learning from: repair, mask, drop what is no prose or a duplicate, and say why."""
    rules = _rules(language, config)
    if show_config:
        return print(rules.to_yaml(), end="")
    if explain is not None:
        return _explain(explain, rules.without_contamination_of(tuple(decontaminate or ())), json_key, json)
    if not inputs or output is None:
        raise CptError("clean: name inputs and --output FOLDER, or --explain FILE:LINE, or --show-config.")
    from nemo_cpt.cleaning import clean as run

    report = run(
        inputs,
        output,
        rules,
        decontaminate=decontaminate or (),
        json_key=json_key,
        on_error=on_error,
        max_skipped=max_skipped,
        workers=workers,
        overwrite=overwrite,
    )
    if json:
        return print_json(asdict(report))
    rows: dict[str, Any] = {
        "read": f"{report.documents:,} documents, {report.nbytes:,} bytes",
        "kept": f"{report.kept:,} documents, {report.kept_bytes:,} bytes, {report.files['kept']}",
    }
    for rule, measures in report.dropped.items():
        found = ", ".join(f"{measure} {each['documents']:,}" for measure, each in measures.items())
        rows[f"dropped: {rule}"] = found
    rows |= {name: f"{count:,}" for name, count in report.changes.items()}
    rows |= {f"evaluation texts {name}": f"{count:,}" for name, count in report.evaluation_texts.items()}
    rows |= {"report": report.files["report"], "status": report.status}
    print_report(rows, report.warnings)


def _rules(language: str | None, config: Path | None) -> "Rules":
    from nemo_cpt.cleaning import read_rules, rules_for

    if (language is None) == (config is None):
        raise CptError("clean: give --language (ja, en, zh or ko) for its rules, or --config FILE with your own.")
    return read_rules(config) if config is not None else rules_for(str(language))


def _explain(place: str, rules: "Rules", json_key: str, json: bool) -> None:
    from nemo_cpt.cleaning import explain

    found = explain(place, rules, json_key)
    if json:
        return print_json(_as_dict(found))
    rows = [
        (rule, check.measure, f"{check.value:,.4g}", check.limit, "kept" if check.passes else "DROPPED")
        for rule, check in found.checks
    ]
    print_table(("rule", "measure", "value", "limit", "verdict"), rows)
    changes = ", ".join(f"{name} ({count:,})" for name, count in found.document.changes.items() if count)
    verdict = f"dropped by {found.failed[0]}, {found.failed[1].measure}" if found.failed else "kept, unless a duplicate"
    print_report({"changes": changes or "none", "verdict": verdict}, [])
    print(f"\n{found.document.text}")


def _as_dict(found: "Examination") -> dict[str, Any]:
    checks = [{"rule": rule} | check._asdict() | {"passes": check.passes} for rule, check in found.checks]
    failed = None if found.failed is None else {"rule": found.failed[0], "measure": found.failed[1].measure}
    return {"checks": checks, "dropped_by": failed, "changes": +found.document.changes, "text": found.document.text}
