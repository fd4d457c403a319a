"""EleutherAI's lm-evaluation-harness in a process of its own: its tasks by name, presets, its results as our rows.

The harness reads the tasks' data sets from the hub, or with HF_DATASETS_OFFLINE=1 from the cache under HF_HOME.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_cpt.corpus.atomic_files import make_folder
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.bootstrap import Row
from nemo_cpt.evaluation.candidates import Candidate, Kept, first_and_last
from nemo_cpt.evaluation.journal import Journal, key_of
from nemo_cpt.inference.arithmetic import default_device, device_kind, precision_on
from nemo_cpt.installed import extra

HARNESS = "lm_eval"
NORMAL_95 = 1.959964  # standard errors on either side of a 95 % interval
LAST_LINES = 8
_EXCEPTION = re.compile(r"[A-Za-z_.]+(Error|Exception): .")
# A process that has trained keeps these, and accelerate, which the harness uses, would wait for the other ranks.
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Task:
    """A task of the harness.

    Attributes:
        name: by which the harness knows it.
        shots: examples before each question; the task's own number when None.
        metric: the one to show; all when empty.
        dataset: the data set that it reads from the hub; empty where that is not known here.
        folder: of a task's YAML file that is the user's own; empty for the harness' tasks.
    """

    name: str
    shots: int | None = None
    metric: str = ""
    dataset: str = ""
    folder: str = ""


def _group(tasks: Mapping[str, tuple[int, str, str]]) -> tuple[Task, ...]:
    return tuple(Task(name, *facts) for name, facts in tasks.items())


PRESETS = {
    # Shots: lm_eval/tasks/japanese_leaderboard (0.4.13), after Stability AI's Japanese leaderboard; MGSM with 4, as
    # swallow-evaluation; Belebele with 0, as its authors' instruction setting (arXiv 2308.16884).
    "ja": _group(
        {
            "ja_leaderboard_jcommonsenseqa": (3, "acc", "Rakuten/JGLUE"),
            "ja_leaderboard_jnli": (3, "acc", "Rakuten/JGLUE"),
            "ja_leaderboard_marc_ja": (3, "acc", "Rakuten/JGLUE"),
            "ja_leaderboard_jsquad": (2, "exact_match", "Rakuten/JGLUE"),
            "ja_leaderboard_jaqket_v2": (1, "exact_match", "kumapo/JAQKET"),
            "ja_leaderboard_xlsum": (1, "rouge2", "mkshing/xlsum_ja"),
            "ja_leaderboard_xwinograd": (0, "acc", "polm-stability/xwinograd-ja"),
            "mgsm_native_cot_ja": (4, "exact_match", "juletxara/mgsm"),
            "belebele_jpn_Jpan": (0, "acc", "facebook/belebele"),
        }
    ),
    # TMMLU+ with 5 shots, as its authors (arXiv 2403.01858); the others without, as their own files say.
    "zh-tw": _group(
        {
            "tmmluplus": (5, "acc", "ikala/tmmluplus"),
            "belebele_zho_Hant": (0, "acc", "facebook/belebele"),
            "xwinograd_zh": (0, "acc", "Muennighoff/xwinograd"),
        }
    ),
    # A short English set: shots of the Open LLM Leaderboard of 2023 for ARC (25), HellaSwag (10) and Winogrande (5);
    # PIQA and LAMBADA without, as their papers.
    "en-forgetting": _group(
        {
            "arc_challenge": (25, "acc_norm", "allenai/ai2_arc"),
            "hellaswag": (10, "acc_norm", "Rowan/hellaswag"),
            "winogrande": (5, "acc", "allenai/winogrande"),
            "piqa": (0, "acc_norm", "baber/piqa"),
            "lambada_openai": (0, "acc", "EleutherAI/lambada_openai"),
        }
    ),
}


def find_tasks(specs: Sequence[str]) -> list[Task]:
    """The tasks of presets, `NAME`, `NAME:SHOTS` and `FOLDER/NAME[:SHOTS]`, whose YAML file is in the folder.

    Raises:
        CptError: the harness is not installed, or a number of shots is none.
    """
    if find_spec(HARNESS) is None:
        raise CptError(f"benchmarks need lm-evaluation-harness: {extra('eval')}")
    return read_tasks(specs)


def read_tasks(specs: Sequence[str]) -> list[Task]:
    """The same, also where the harness is not installed: on a login node it need not be.

    Raises:
        CptError: a number of shots is none, or there is no such folder.
    """
    return [task for spec in specs for task in PRESETS.get(spec) or [_task(spec)]]


def _task(spec: str) -> Task:
    name, colon, shots = spec.partition(":")
    if not name or (colon and not re.fullmatch(r"\d{1,3}", shots)):
        raise CptError(
            f"a task is NAME, NAME:SHOTS or a preset ({', '.join(PRESETS)}), not {spec!r}; the harness' tasks are "
            f"listed by {Path(sys.executable).name} -m {HARNESS} ls tasks"
        )
    folder, _, name = name.rpartition("/")
    if folder and not Path(folder).is_dir():
        raise CptError(f"there is no folder {folder} of tasks")
    return Task(name, int(shots) if colon else None, folder=folder)


def rows(
    candidates: Sequence[Candidate],
    tasks: Sequence[Task],
    output: Path,
    journal: Journal,
    *,
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Run the tasks on the first model and the last, and compare them.

    The interval of a difference takes both models' standard errors for independent: for answers to the same questions
    it is too wide rather than too narrow.

    Args:
        candidates: the models.
        tasks: as `find_tasks` gives them.
        output: folder of the harness' logs and of its cache, by which a killed run goes on.
        journal: keeps the results.
        limit: questions of each task.
        say: told what is run, and which data sets it reads.

    Raises:
        CptError: the harness failed; the message ends with what it said last.
    """
    # Said beforehand: a machine without a network fails only after the model was loaded.
    if datasets := sorted({task.dataset for task in tasks if task.dataset}):
        say(f"the benchmarks read {', '.join(datasets)} from the hub, or from HF_HOME where HF_DATASETS_OFFLINE=1")
    found = []
    for candidate in first_and_last(candidates):
        found.append(_results(candidate, tasks, output, journal, limit, say))
    return list(_compared(tasks, found))


def _results(
    candidate: Candidate, tasks: Sequence[Task], output: Path, journal: Journal, limit: int | None, say: Any
) -> list[dict[str, Any]]:
    """Each task's results, of the journal or of a run; tasks of as many shots and of one folder share a process."""
    kept = Kept(candidate, journal)
    keys = {task: kept.key(*_asked(candidate, task, limit)) for task in tasks}
    groups: dict[tuple[int | None, str], list[Task]] = {}
    for task, key in keys.items():
        if kept.get(key) is None:
            groups.setdefault((task.shots, task.folder), []).append(task)
    for (shots, _), group in groups.items():
        names = ", ".join(task.name for task in group)
        say(f"{candidate.label}: {names}{'' if shots is None else f', {shots}-shot'}")
        merged = run(candidate, group, output, limit)
        # Kept at once: what the next group of tasks does with the machine must not cost these results.
        for task in group:
            kept.keep(keys[task], {"result": result_of(merged, task)})
    return [kept.get(keys[task])["result"] for task in tasks]  # type: ignore[index]


def _asked(candidate: Candidate, task: Task, limit: int | None) -> tuple[Any, ...]:
    from importlib.metadata import version

    # What is the user's own may be edited between two runs.
    files = [(str(path), *_state(path)) for path in sorted(Path(task.folder).rglob("*"))] if task.folder else []
    return HARNESS, version(HARNESS), candidate.key, asdict(task), limit, files, *filter(None, [candidate.rope])


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def run(candidate: Candidate, tasks: Sequence[Task], output: Path, limit: int | None) -> dict[str, Any]:
    """Run the harness on tasks of as many shots; return its results file.

    Raises:
        CptError: it failed.
    """
    # By content: another model of that name, or in another precision, must not go on from this one's cache.
    computed = filter(None, [candidate.arithmetic, candidate.rope])
    asked = key_of([asdict(task) for task in tasks], limit, *computed)
    folder = output / HARNESS / f"{candidate.key[:12]}-{asked[:12]}"
    make_folder(folder)
    # Appended to: an earlier attempt's words may say more than the last one's.
    log = folder / "log.txt"
    environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if key := candidate.options.get("api_key"):
        environment["OPENAI_API_KEY"] = key  # not on the command line, which everyone on the machine can read
    with log.open("ab") as file:
        done = subprocess.run(command(candidate, tasks, folder, limit), stdout=file, stderr=file, env=environment)
    # The names end in the time, so that the last one is the newest.
    results = sorted(folder.rglob("results_*.json"))
    if done.returncode or not results:
        raise CptError(_failure(done.returncode, log, tasks))
    return json.loads(results[-1].read_bytes())


def command(candidate: Candidate, tasks: Sequence[Task], folder: Path, limit: int | None) -> list[str]:
    """The harness' command line for a model or an endpoint; tasks of one number of shots and one folder."""
    words = [sys.executable, "-m", HARNESS, "run", "--tasks", ",".join(task.name for task in tasks)]
    if candidate.is_endpoint:
        served: Any = candidate.engine
        # The harness wants the whole path of the method, which other clients put together themselves.
        arguments = {"model": served.model, "base_url": f"{served.url}/chat/completions", "num_concurrent": 8}
        words += ["--model", "local-chat-completions", "--model_args", json.dumps(arguments), "--apply_chat_template"]
    else:
        device = candidate.options.get("device") or default_device()
        kind = device_kind(device)
        batch = "8" if kind == "cpu" else "auto"
        # As JSON: a comma or an equals sign of a path would end NAME=VALUE.
        arguments = {"pretrained": str(candidate.folder), "dtype": precision_on(kind) or "auto"}
        arguments |= candidate.rope
        words += ["--model", "hf", "--model_args", json.dumps(arguments, ensure_ascii=False)]
        words += ["--device", device, "--batch_size", batch]
    # The cache answers for what a killed run had asked already: it goes on, where the results come at the end alone.
    words += ["--output_path", str(folder), "--use_cache", str(folder / "cache")]
    if tasks[0].shots is not None:
        words += ["--num_fewshot", str(tasks[0].shots)]
    if tasks[0].folder:
        words += ["--include_path", tasks[0].folder]
    return words + (["--limit", str(limit)] if limit else [])


def _failure(code: int, log: Path, tasks: Sequence[Task]) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # Of an exception its own line: the traceback before it is in the log.
    last = lines[-1] if lines and _EXCEPTION.match(lines[-1]) else " | ".join(lines[-LAST_LINES:])[-1500:]
    datasets = sorted({task.dataset for task in tasks if task.dataset})
    needed = f" It reads the data sets {', '.join(datasets)}." if datasets else ""
    return f"lm-evaluation-harness ended with {code}, its log is {log}.{needed} It said last: {last}"


def result_of(merged: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What a results file of the harness says of one task: its metrics, their standard errors, version and shots.

    Raises:
        CptError: it does not have the task, or not its metric.
    """
    values = merged.get("results", {}).get(task.name)
    if values is None:
        raise CptError(f"the harness' results have no task {task.name}, but {', '.join(merged.get('results', {}))}")
    metrics: dict[str, dict[str, Any]] = {}
    better = merged.get("higher_is_better", {}).get(task.name, {})
    for key, value in values.items():
        # The harness' keys are "acc,none": the metric and the filter that was laid over the replies.
        metric, comma, strategy = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if task.metric and metric != task.metric:
            continue
        error = values.get(f"{metric}_stderr,{strategy}")
        metrics[metric if strategy == "none" else f"{metric} ({strategy})"] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
            "higher_is_better": better.get(metric),
        }
    if not metrics:
        raise CptError(
            f"the harness' results of {task.name} have no {task.metric or 'metric'}, but {', '.join(values)}"
        )
    shots = merged.get("n-shot", {}).get(task.name, task.shots)
    return {"metrics": metrics, "version": merged.get("versions", {}).get(task.name), "shots": shots}


def _compared(tasks: Sequence[Task], found: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[Row]:
    for number, task in enumerate(tasks):
        after = found[-1][number]
        before = found[0][number] if len(found) > 1 else None
        for metric, facts in after["metrics"].items():
            was = before["metrics"][metric] if before else None
            yield _row(task, metric, was, facts, after)


def _row(task: Task, metric: str, was: Any, now: Mapping[str, Any], result: Mapping[str, Any]) -> Row:
    errors = [each["stderr"] for each in (was, now) if each is not None]
    middle = now["value"] - (was["value"] if was else 0)
    low = high = None
    # Some metrics have no standard error, such as corpus BLEU: then there is no interval.
    if None not in errors:
        # Variances of independent errors add up.
        reach = NORMAL_95 * math.hypot(*errors)
        low, high = middle - reach, middle + reach
    better = {True: "higher", False: "lower"}.get(now["higher_is_better"])
    shots = "" if result["shots"] is None else f", {result['shots']}-shot"
    note = f"lm-evaluation-harness, version {result['version']} of the task"
    return Row(
        f"{task.name}{shots}", f"benchmark, {metric}", was["value"] if was else None, now["value"], low, high, better,
        note,
    )  # fmt: skip
