"""Command of `nemo-cpt`: cleaning a corpus."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.corpus import (
    PANEL,
    Detach,
    Json,
    Key,
    MaxSkipped,
    OnError,
    Overwrite,
    Tasks,
    Workers,
    print_prepared,
    print_submitted,
    without_executors,
)
from nemo_cpt.cli.launch import only_json_on_stdout
from nemo_cpt.cli.recipe_arguments import Executor
from nemo_cpt.cli.tables import note_long_texts, print_json, print_report, print_table
from nemo_cpt.errors import CptError

if TYPE_CHECKING:
    from nemo_cpt.cleaning.examination import Examination
    from nemo_cpt.cleaning.rules import Rules
    from nemo_cpt.cleaning.tallies import CleaningReport


@app.command(rich_help_panel=PANEL)
def clean(
    inputs: Annotated[list[str] | None, typer.Argument(help="As for prepare; executor.key=value with --tasks.")] = None,
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
    executor: Executor = None,
    tasks: Tasks = None,
    detach: Detach = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Keep what is worth learning from: repair, mask, drop what is no prose or a duplicate, and say why."""
    rules = _rules(language, config)
    # Before inputs are asked for: the rules are to be looked at without any.
    if show_config:
        return print(rules.to_yaml(), end="")
    if explain is not None:
        return _explain(explain, rules.without_contamination_of(tuple(decontaminate or ())), json_key, json)
    inputs, of_executor = without_executors(inputs or [])
    if not inputs or output is None:
        raise CptError("clean: name inputs and --output FOLDER, or --explain FILE:LINE, or --show-config.")
    note_long_texts(inputs)
    options: dict[str, Any] = {
        "decontaminate": decontaminate or (),
        "json_key": json_key,
        "on_error": on_error,
        "max_skipped": max_skipped,
        "workers": workers,
        "overwrite": overwrite,
    }
    if tasks is not None:
        given = (inputs, output, rules, executor or "local", of_executor, tasks, detach)
        return _clean_in_tasks(*given, json, options)
    if executor or of_executor or detach:
        raise CptError("--executor, executor.X=... and --detach are for many tasks: say how many with --tasks")
    from nemo_cpt.cleaning import clean as run

    _print_cleaned(run(inputs, output, rules, **options), json)


def _clean_in_tasks(
    inputs: list[str],
    output: Path,
    rules: "Rules",
    executor: str,
    of_executor: list[str],
    tasks: int,
    detach: bool,
    json: bool,
    options: dict[str, Any],
) -> None:
    from nemo_cpt.launching.in_tasks import Submitted, clean_in_tasks, executor_named

    # NeMo-Run prints panels and the tasks' logs.
    with only_json_on_stdout(json):
        where = executor_named(executor, of_executor, detach)
        done = clean_in_tasks(inputs, output, rules, where, tasks, detach=detach, **options)
    return print_submitted(done, json) if isinstance(done, Submitted) else _print_cleaned(done, json)


@app.command(rich_help_panel=PANEL)
def join(
    output: Annotated[
        str, typer.Argument(help="Of prepare or clean, or the folder of the parts, which ends in .parts.")
    ],
    json: Json = False,
) -> None:
    """Join the parts that `prepare --tasks` or `clean --tasks` has made; on Slurm a job does it behind the tasks."""
    from nemo_cpt.cleaning import parts as cleaned
    from nemo_cpt.corpus.preparing import parts

    # By what lies there: both kinds of parts are named by their output.
    if (folder := cleaned.parts_folder(output)) is not None:
        return _print_cleaned(cleaned.join(folder), json)
    print_prepared(parts.join(parts.parts_folder(output)), json)


def _print_cleaned(report: "CleaningReport", json: bool) -> None:
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
    # `+` leaves away what a Counter has counted 0 times.
    return {"checks": checks, "dropped_by": failed, "changes": +found.document.changes, "text": found.document.text}
