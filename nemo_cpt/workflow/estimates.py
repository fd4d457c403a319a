"""What a step would take: seconds, memory and disk, from the planner for trainings and from measured rates for others.

What is not known is None, and nothing is guessed for it: a hub's sizes, a tuning whose conversations are not there yet.
The note says why.
"""

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_cpt.cache import cache_folder
from nemo_cpt.catalog.workloads import workload
from nemo_cpt.checkpoint.context import HF_FOLDER
from nemo_cpt.checkpoint.untrained import shape_fields
from nemo_cpt.cleaning.language import Language
from nemo_cpt.cleaning.rules import chosen_rules
from nemo_cpt.corpus.atomic_files import make_folder, write_whole
from nemo_cpt.corpus.preparing.workers import count_processes
from nemo_cpt.corpus.reading.chunks import Feed
from nemo_cpt.corpus.reading.sources import list_sources
from nemo_cpt.doctor import PREFLIGHT, Examination, Finding, Job, examine
from nemo_cpt.doctor.examination import from_error
from nemo_cpt.doctor.inputs import base_architecture, run_folder
from nemo_cpt.errors import CptError
from nemo_cpt.launching.description import describe
from nemo_cpt.page import as_json
from nemo_cpt.planning import memory
from nemo_cpt.planning.checkpoint_size import checkpoint_bytes, export_bytes, parameters
from nemo_cpt.planning.plans import plan_workload
from nemo_cpt.workflow import outputs, recipes
from nemo_cpt.workflow.kinds import paths_in, value_of
from nemo_cpt.workflow.standing import Standing, goes_on
from nemo_cpt.workflow.steps import Step, Workflow

# Inputs whose size tells that of what is made of them; the tokenizer's and the base's do not.
MEASURED = ("inputs", "corpora", "source", "hf")
SAMPLE_BYTES = 1 << 20  # of a compressed input, read to know how much is in it


@dataclass(frozen=True)
class Rate:
    """How a kind of step goes through its inputs: docs/corpus.md, cleaning.md and checkpoints.md measured it.

    Attributes:
        bytes_per_second: of its inputs; of one worker where it has several.
        grows: bytes made for each byte read.
        memory_gib: of this process; 0 where nothing was measured.
        by_workers: it has a worker a CPU.
    """

    bytes_per_second: float
    grows: float
    memory_gib: float = 0.0
    by_workers: bool = False


RATES = {
    "clean": Rate(8e6, 1.0, 0.06, by_workers=True),
    "split": Rate(20e6, 1.0),
    "prepare": Rate(42e6, 1.05, 0.35, by_workers=True),
    "tokenizer": Rate(1e6, 0.0, 1.8),
    "import": Rate(0.9e9, 1.0, 0.5),
    "grow": Rate(0.9e9, 1.0, 0.5),
    "merge": Rate(0.9e9, 1.0, 0.5),
    "export": Rate(0.9e9, 1.0, 0.5),
    "verify": Rate(0.9e9, 0.0),
}
# Latin letters: lingua, which takes a third of the time, and statistics of words; a quarter of the others' rate.
CLEAN_LATIN = Rate(2.3e6, 1.0, 0.06, by_workers=True)
WHY_NOT = {
    "fetch": "a server's sizes are not asked for",
    "download": "a hub's sizes are not asked for",
    "synthesize": "as long as its questions take",
    "evaluate": "as long as its replies take",
    "push": "as long as the network takes",
    "serve": "until it is stopped",
    "report": "not measured; seconds",
    "init": "not measured; its weights in bf16",
    "grow_tokenizer": "not measured",
}
NOT_THERE_YET = "not known before its inputs are there"
NO_BASE_YET = "not known before its base is there"


@dataclass(frozen=True)
class Estimate:
    """What a step would take; None for what is not known.

    Attributes:
        seconds: of wall time.
        memory_gib: of a GPU, of a training; else of this machine.
        disk_bytes: that it would write and keep.
        note: what the figures are of, or why there are none.
        model_bytes: of a training's model.
    """

    seconds: float | None = None
    memory_gib: float | None = None
    disk_bytes: float | None = None
    note: str = ""
    model_bytes: float | None = None


class Estimates:
    """Estimates of steps, in their order: what one makes another reads.

    Args:
        workflow: whose.
        executor: of trainings that name none.
        options: its `key=value`, which trainings that name it take, too.
    """

    def __init__(self, workflow: Workflow, executor: str = "local", options: Sequence[str] = ()) -> None:
        self.workflow, self.executor, self.options = workflow, executor, options
        self.made: dict[str, float] = {}
        self.findings: list[tuple[str, Finding]] = []

    def of(self, standing: Standing, plan: bool = True) -> Estimate:
        """What one step would take, and what the doctor finds of a training.

        Args:
            standing: the step's.
            plan: plan trainings for GPUs, which imports NeMo the first time.
        """
        step = standing.step
        if standing.done or standing.earlier:
            found = Estimate(0.0, 0.0, 0.0)
        elif step.kind.recipe:
            with contextlib.chdir(self.workflow.folder):
                found = self._training(standing, plan)
        else:
            found = self._by_rate(step)
        if found.disk_bytes:
            # Of a training what is read of it: its weights, without the states of its optimizer.
            self.made |= dict.fromkeys(step.writes, found.model_bytes or found.disk_bytes)
        return found

    def disk(self, needed: float) -> Finding:
        """Whether the disk holds what all steps would write."""
        free = shutil.disk_usage(self.workflow.folder).free
        found = f"{free / 1e9:,.1f} GB free, {needed / 1e9:,.1f} GB known to be written"
        short = f"free {(needed - free) / 1e9:,.1f} GB" if needed > free else ""
        return Finding("disk", "error" if short else "ok", found, short)

    def _by_rate(self, step: Step) -> Estimate:
        rate = self._rate(step)
        if rate is None:
            return Estimate(note=WHY_NOT.get(step.do, "a function of your own"))
        size = self._size(step)
        if size is None:
            return Estimate(memory_gib=rate.memory_gib or None, note=NOT_THERE_YET)
        workers = count_processes(step.parameters.get("workers")) if rate.by_workers else 1
        return Estimate(size / rate.bytes_per_second / workers, rate.memory_gib or None, size * rate.grows)

    def _rate(self, step: Step) -> Rate | None:
        if step.do != "clean":
            return RATES.get(step.do)
        try:
            with contextlib.chdir(self.workflow.folder):
                rules = chosen_rules(str(step.parameters["rules"])).rules
        except CptError:  # a step before it makes them
            return RATES[step.do]
        return CLEAN_LATIN if any(isinstance(rule, Language) for rule in rules) else RATES[step.do]

    def _size(self, step: Step) -> float | None:
        """Bytes of what a step reads; None where a part of it is not known."""
        known = [self._size_of(path) for path in _measured(step)]
        return None if not known or any(each is None for each in known) else sum(filter(None, known))

    def _size_of(self, path: str) -> float | None:
        files = outputs.files_of(self.workflow.folder / path, linked=True)
        if files:
            on_disk = float(sum(file.stat().st_size for file in files))
            # The largest stands for all: to sample each of a folder of dumps would take long.
            return on_disk * _unpacked(max(files, key=lambda file: file.stat().st_size))
        # Not there yet: as large as the step that makes it is estimated to leave it.
        size = next((size for made, size in self.made.items() if outputs.related(path, made)), None)
        return size and size * self._share(path)

    def _share(self, path: str) -> float:
        """The part of a split's output that one of its sets is."""
        makers = (step for step in self.workflow.steps.values() if step.do == "split")
        step = next((step for step in makers if path.startswith(f"{step.writes[0]}/")), None)
        if step is None:
            return 1.0
        shares = {name: value_of(step.function, name, step.parameters) for name in ("validation", "test")}
        held_out = {name: share for name, share in shares.items() if isinstance(share, int | float)}
        return held_out.get(Path(path).stem, 1 - sum(held_out.values()))

    def _training(self, standing: Standing, plan: bool) -> Estimate:
        step = standing.step
        recipe, arguments, fields, options = recipes.split(step.name, step.parameters, step.folder)
        executor = str(step.parameters.get(recipes.EXECUTOR, self.executor))
        shared = self.options if executor == self.executor else ()
        try:
            job = describe(recipe, arguments, fields, executor, [*shared, *options])
        except CptError as error:  # such as the shape of a base that is not made yet
            self.findings.append((step.name, from_error("recipe", error)))
            return Estimate(note=NO_BASE_YET)
        self._preflight(standing, job)
        if shape := self._shape_to_come(job.base):
            job, arguments = replace(job, base=shape), {**arguments, "base": shape}
        if not job.gpus_per_node:
            return _on_disk(job, "on the CPU, whose pace is not known")
        if not plan:
            return _on_disk(job, "")
        try:
            planned = plan_workload(workload(recipe.name, arguments, fields), job.gpu_memory_gib)
        except CptError as error:
            if job.base and not Path(job.base).exists():  # a step before it makes it, or the workflow would be refused
                return Estimate(note=NO_BASE_YET)
            self.findings.append((step.name, Finding("plan", "warning", f"none: {error.message}")))
            return _on_disk(job, "the planner has no plan for it")
        if not planned.fits:
            self.findings.append((step.name, Finding("plan", "error", planned.verdict, "nemo-cpt plan says what fits")))
        tokens = planned.workload.max_steps * planned.workload.tokens_per_step
        note = f"{planned.speed.gpus} x {planned.gpu.name}"
        seconds, model = planned.speed.hours(tokens) * 3600, planned.workload.parameters * 2  # in bf16
        written = job.checkpoints * memory.checkpoint_bytes(planned.workload) + job.exports * model
        return Estimate(seconds, planned.peak_gib, written, note, model)

    def _shape_to_come(self, base: str | None) -> str | None:
        """A folder with the config.json of a base that a step will make from random weights; None for others."""
        init = self._maker("init", base) if base and not Path(base).exists() else None
        trained = self._maker("tokenizer", str(init.parameters.get("tokenizer"))) if init else None
        if init is None or trained is None:
            return None

        def value(step: Step, name: str) -> Any:
            return value_of(step.function, name, step.parameters)

        params, shape, positions = (value(init, name) for name in ("params", "shape", "max_position_embeddings"))
        multiple = value(trained, "multiple_of")
        rows = math.ceil(value(trained, "vocabulary_size") / multiple) * multiple
        # A place that stays the same: plans are kept by where their base is.
        folder = cache_folder("shapes") / f"{shape}-{params}-{positions}-{rows}"
        make_folder(folder / HF_FOLDER)
        write_whole(folder / HF_FOLDER / "config.json", as_json(shape_fields(params, shape, positions, rows)))
        return str(folder)

    def _maker(self, do: str, path: str) -> Step | None:
        """The step of a kind that makes what a path names."""
        steps = (step for step in self.workflow.steps.values() if step.do == do)
        related = (step for step in steps if any(outputs.related(path, made, step.folder) for made in step.writes))
        return next(related, None)

    def _preflight(self, standing: Standing, job: Job) -> None:
        # What steps before it make is not there yet: files are not looked at then, as of a task that waits for others.
        first = [name for name in self.workflow.needs[standing.step.name] if self._missing(name)]
        if first or standing.waits:
            job = replace(job, place=replace(job.place, same_files=False))
        # What lies in the run's folder is set aside before the training begins anew.
        anew = standing.record is not None and not goes_on(standing)
        checks = [each for each in PREFLIGHT if not (anew and each is run_folder)]
        for each in examine(checks, Examination(job), seconds=20):
            if each.state in ("warning", "error"):
                self.findings.append((standing.step.name, each))

    def _missing(self, name: str) -> bool:
        step = self.workflow.steps[name]
        return any(not outputs.files_of(step.folder / path) for path in step.writes)


def _on_disk(job: Job, note: str) -> Estimate:
    """What a training that is not planned leaves on the disk, where its base is there to tell."""
    architecture = base_architecture(Path(job.base)) if job.base else None
    if architecture is None:
        return Estimate(note=note)
    on_cpu = job.gpus_per_node == 0
    checkpoint = checkpoint_bytes(architecture, job.lora_rank, job.trained_embeddings, on_cpu)
    model, exports = parameters(architecture) * (4 if on_cpu else 2), job.exports * export_bytes(architecture)
    return Estimate(disk_bytes=job.checkpoints * checkpoint + exports, note=note, model_bytes=model)


def _unpacked(file: Path) -> float:
    """Bytes of text for each byte on disk, by the beginning of a file: above 1 for a compressed one."""
    try:
        (source,) = list_sources(file)
        if source.kind not in ("gzip", "zstd", "parquet"):
            return 1.0
        task = next(iter(Feed([source], None, SAMPLE_BYTES)))
    except (CptError, OSError):  # no input of text, such as a model's weights; or what its step will refuse
        return 1.0
    size = sum(len(str(row).encode()) for row in task.data) if isinstance(task.data, list) else len(task.data or b"")
    return size / max(task.done, 1)


def _measured(step: Step) -> Iterator[str]:
    for name in MEASURED:
        value = step.parameters.get(name)
        yield from paths_in(list(value) if isinstance(value, Mapping) else value)
