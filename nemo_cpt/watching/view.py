"""A run as a terminal shows it: rich's for a live view, lines for everything else."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nemo_cpt.monitoring.forgetting import Change
from nemo_cpt.watching.record import GPU_MEMORY, TRAIN_LOSS, Record

if TYPE_CHECKING:
    from rich.console import RenderableType

MARKS = {"worse": ("forgotten", "red"), "better": ("gained", "green"), "": ("", "dim")}
STATES = {
    "running": "cyan",
    "queued": "yellow",
    "starting": "yellow",
    "finished": "green",
    "ended early": "green",
    "stopped": "yellow",
}  # all others are red
WARNINGS_SHOWN = 2


@dataclass(frozen=True)
class Snapshot:
    """What is shown of a run at one moment.

    Attributes:
        record: what its files say.
        state: queued, starting, running, finished, ended early, stopped, failed or killed.
        message: what its end said; empty while it goes on.
        saved: its checkpoints' names, the newest first.
        warnings: of the run itself and of its log, the newest last.
        log: where the raw log is; empty where that is not known.
        seconds: since the job was started, while it has not measured anything.
        trouble: why all this may be old; empty where it is not.
    """

    record: Record
    state: str
    message: str = ""
    saved: Sequence[str] = ()
    warnings: Sequence[str] = field(default=())
    log: str = ""
    seconds: float | None = None
    trouble: str = ""


def render(shown: Snapshot, hint: str = "") -> "RenderableType":
    """The live view: seven lines, one a validation set, and the run's own warnings.

    Args:
        shown: the run.
        hint: which keys do what.
    """
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    record = shown.record
    top = Table.grid(padding=(0, 1))
    top.add_row(
        Text(record.name, style="bold"),
        Text(shown.state, style=STATES.get(shown.state, "red")),
        Text(_steps(record)),
        ProgressBar(total=record.max_steps or 1, completed=record.step, width=30),
        Text(_left(record) if shown.state == "running" else ""),
    )
    parts: list[RenderableType] = [top]
    if facts := list(_facts(record)):
        parts.append(Text("   ").join(Text.assemble((f"{name} ", "dim"), value) for name, value in facts))
    if record.changes:
        parts.append(_sets(record))
    if shown.saved:
        parts.append(Text.assemble(("saved ", "dim"), f"{len(shown.saved)}, the newest {shown.saved[0]}"))
    own = {each["text"] for each in record.warnings}  # whole: what to do stands at their ends
    for line, warning in _folded(shown.warnings):
        parts.append(Text(line, style="yellow", overflow="ellipsis", no_wrap=warning not in own))
    if shown.trouble:
        parts.append(Text(f"! {shown.trouble}", style="yellow", overflow="fold"))
    if shown.seconds is not None:
        parts.append(Text(f"importing NeMo and building the model, {shown.seconds:.0f} s", style="dim"))
    if shown.message:
        parts.append(Text(shown.message))
    if shown.log:
        log = Table.grid(padding=(0, 1))
        log.add_column()
        log.add_column(overflow="fold")
        log.add_row(Text("log", style="dim"), Text(shown.log))
        parts.append(log)
    if hint:
        parts.append(Text(hint, style="dim"))
    return Group(*parts)


def _numbers(record: Record, change: Change) -> tuple[str, str, str, str]:
    """A set's first loss, the one now, the change in percent and the losses' unit, as they are shown."""
    scale, unit = record.unit(change.name)
    first, now = f"{scale * change.first:.4f}{change.first_step}", f"{scale * change.value:.4f}"
    return first, now, f"{change.percent:+.2f} %", unit


def _mark(change: Change) -> tuple[str, str]:
    """What is said of a change beside its numbers, and in which style."""
    return MARKS["worse" if change.worse else "better" if change.better else ""]


def _sets(record: Record) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in ("set", "step 0", "now", "change", "", "unit"):
        table.add_column(name, justify="right" if name in ("step 0", "now", "change") else "left")
    for change in record.changes.values():
        *numbers, unit = _numbers(record, change)
        mark, style = _mark(change)
        table.add_row(
            *(Text(each) for each in (change.name, *numbers)), Text(mark, style=style), Text(unit, style="dim")
        )
    return table


def _steps(record: Record) -> str:
    return f"step {record.step:,} of {record.max_steps:,}" if record.max_steps else f"step {record.step:,}"


def _left(record: Record) -> str:
    return "" if record.seconds_left is None else f"{duration(record.seconds_left)} left"


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    """Speed beside its plan, loss, learning rate, gradient norm, memory: what is known of them."""
    if speed := record.tokens_per_second:
        planned = record.plan.get("tokens_per_second")
        yield "tokens/s", f"{speed:,.0f}" + (f" (plan {planned:,.0f})" if planned else "")
    for name, key, form in (("loss", TRAIN_LOSS, ".4f"), ("lr", "lr", ".2e"), ("grad norm", "grad_norm", ".2f")):
        if (value := record.last(key)) is not None:
            yield name, f"{value:{form}}"
    if memory := record.last(GPU_MEMORY):
        card = record.description.get("machine", {}).get("gpu_memory_gib")
        yield "GPU", f"{memory:.1f}" + (f" of {card:.0f} GiB" if card else " GiB")


def _folded(warnings: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The last warnings, equal ones once, and how many there are besides; as the line to show, and as they came."""
    counts: dict[str, int] = {}
    for warning in warnings:
        # Taken out and put in again: the last entry is then what was said last.
        counts[warning] = counts.pop(warning, 0) + 1
    shown = list(counts.items())[-WARNINGS_SHOWN:]
    # The newest stay in sight: of the others only how many there are.
    if more := len(counts) - len(shown):
        yield f"! {more} more warnings in the log", ""
    for warning, count in shown:
        yield f"! {warning}" + (f" ({count} times)" if count > 1 else ""), warning


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12:05, 3:07:00, 2 days 3 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def lines(shown: Snapshot, before: Snapshot | None) -> Iterator[str]:
    """What is new since an earlier moment, as lines for a log: steps, validations, checkpoints, warnings, the end."""
    record, known = shown.record, before.record.step if before else -1
    if before is not None and bool(before.trouble) != bool(shown.trouble):
        yield f"warning: {shown.trouble}" if shown.trouble else "heard of again"
    if before is None or before.state != shown.state:
        yield f"{record.name}: {shown.state}" + (f": {shown.message}" if shown.message else "")
    if record.step != known and record.metrics:
        facts = "  ".join(f"{name} {value}" for name, value in _facts(record))
        yield "  ".join(filter(None, (_steps(record), facts, _left(record) if shown.state == "running" else "")))
    # A step of training is no news of a validation: told once, at its own step.
    told = {} if before is None else {change.name: change.step for change in before.record.changes.values()}
    for change in record.changes.values():
        if told.get(change.name) != change.step:
            first, now, percent, unit = _numbers(record, change)
            mark, _ = _mark(change)
            yield f"validation at step {change.step}: {change.name} {first} -> {now} {unit} ({percent}) {mark}".rstrip()
    yield from (f"saved {name}" for name in reversed(shown.saved) if before is None or name not in before.saved)
    # By what they say, not by how many there were: two sources are read, and one may be behind.
    known_warnings = Counter(before.warnings if before else ())
    yield from (f"warning: {text}" for text in (Counter(shown.warnings) - known_warnings).elements())
