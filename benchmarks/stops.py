"""Trainings that are told to stop or killed at chosen points, against an unbroken run: how many lost what.

    python benchmarks/stops.py [--folder FOLDER] [--kills 100] [--seed 0] [--at-once 2] [--quick]

Run it in a checkout: the jobs are the tests' (tests/support/interruptions.py), on the CPU, forked from a process that
has imported NeMo once. Every case is a run that is hit, started again until it is finished, and compared: its
checkpoints' names, its validations and its steps with their losses and learning rates, which must be equal to the last
digit. Stops must end with exit code 75, kills with -9.
"""

import argparse
import functools
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

STOPPED, KILLED = 75, -9
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
STOP_POINTS = (  # hook and step: before the first checkpoint, behind it, in writes, at and within validations
    ("on_validation_batch_end", 0),
    ("on_train_batch_start", 0),
    ("on_train_batch_start", 1),
    ("weights", 3),
    ("on_train_batch_start", 4),
    ("on_train_batch_end", 6),
    ("on_validation_batch_end", 6),
    ("config", 6),
    ("on_validation_end", 6),
    ("on_validation_batch_end", 8),
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--folder", type=Path, default=None, help="where the base and the runs go")
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0, help="of the choice of kill points")
    options.add_argument("--at-once", type=int, default=2, help="cases at a time")
    options.add_argument("--quick", action="store_true", help="every eleventh case")
    given = options.parse_args()
    runs = _runs(given.folder or Path(tempfile.mkdtemp(prefix="stops_")))
    cases = [*_stops(), *_kills(given.kills, random.Random(given.seed))][:: 11 if given.quick else 1]
    for setting in {setting.processes: setting for _, setting, _ in cases}.values():
        _make_unbroken(runs, setting.processes)
    counts: Counter[str] = Counter()
    with ThreadPoolExecutor(given.at_once) as pool:
        outcomes = pool.map(functools.partial(_outcome, runs), itertools.count(1), *zip(*cases, strict=True))
        for number, ((kind, setting, hit), outcome) in enumerate(zip(cases, outcomes, strict=True), 1):
            counts[f"{kind}: {'equal' if outcome == 'equal' else 'NOT EQUAL'}"] += 1
            print(f"{number}/{len(cases)}\t{kind}\t{hit}\t{setting}\t{outcome}", flush=True)
    print(json.dumps({**counts, "refusal of a second start, seconds": _refusal(runs)}, indent=2))
    sys.exit(any("NOT EQUAL" in kind for kind in counts))


def _runs(folder: Path) -> Any:
    """The tests' base and data in `folder`, made unless they are there."""
    import tests.conftest  # noqa: F401  no hub, one thread: before anything reads them
    from nemo_cpt.corpus import Blend
    from tests.support.interruptions import Runs
    from tests.training.conftest import make_world

    world = folder / "world"
    if not world.exists():
        world.mkdir(parents=True)
        make_world(world)
    validation = {language: str(world / f"ds/{language}_validation") for language in ("ja", "en")}
    blend = Blend.replay(str(world / "ds/ja_train"), str(world / "ds/en_train"), share=0.25, validation=validation)
    return Runs(world, blend, folder / "runs")


def _settings() -> Iterator[Any]:
    from tests.support.interruptions import Setting

    for workers, asynchronous in itertools.product((0, 2), (False, True)):
        yield Setting(workers, asynchronous)
    yield Setting(processes=2)


def _stops() -> Iterator[tuple[str, Any, Any]]:
    """Every point under every setting; the signals take turns."""
    from tests.support.interruptions import Hit

    signals = itertools.cycle(SIGNALS)
    for setting, (where, step) in itertools.product(_settings(), STOP_POINTS):
        yield "stop", setting, Hit(where, step, next(signals))


def _kills(count: int, choice: random.Random) -> Iterator[tuple[str, Any, Any]]:
    """Kills of every process: two of three within the writing of a checkpoint, the others between and within steps."""
    from tests.support.interruptions import HOOKS, WRITE_POINTS, Hit

    settings = list(_settings())
    for number in range(count):
        setting = settings[number % len(settings)]
        if number % 3:
            where, step = choice.choice([point for point in WRITE_POINTS if point != "deletion"]), choice.choice((3, 6))
            yield (
                "kill in a write",
                setting,
                Hit(where, step, "SIGKILL", call=choice.randint(1, 5) if where == "weights" else 1),
            )
        else:
            yield "kill in a step", setting, Hit(choice.choice(HOOKS[:2]), choice.randint(1, 7), "SIGKILL")


def _make_unbroken(runs: Any, processes: int) -> None:
    from tests.support.interruptions import Setting

    name = f"unbroken_{processes}"
    if not (runs.folder / name).exists():
        assert runs.start(name, Setting(processes=processes)) == 0, runs.log(name).read_text()[-3000:]


def _outcome(runs: Any, number: int, kind: str, setting: Any, hit: Any) -> str:
    name, wanted = f"case_{number}", [STOPPED if kind == "stop" else KILLED, 0]
    codes = runs.broken(name, setting, [hit])
    if codes != wanted:
        return f"exit codes {codes} instead of {wanted}, see {runs.log(name)}"
    differences = runs.differences(name, f"unbroken_{setting.processes}")
    if not differences:
        shutil.rmtree(runs.folder / name)
    return "; ".join(differences) or "equal"


def _refusal(runs: Any) -> float:
    """Seconds from the check to the refusal, while another process of this machine holds the folder."""
    from nemo_cpt.errors import CptError
    from nemo_cpt.training.run_lock import check_free, hold
    from tests.training import jobs

    folder = runs.folder / "held"
    holder = jobs.SERVER.Process(target=_hold, args=(hold, folder), daemon=True)
    holder.start()
    while not (folder / "run" / "owner.json").exists():
        time.sleep(0.05)
    started = time.monotonic()
    try:
        check_free(folder)
        raise SystemExit("a second start was not refused")
    except CptError:
        return round(time.monotonic() - started, 3)
    finally:
        holder.kill()


def _hold(hold: Any, folder: Path) -> None:
    hold(folder)
    time.sleep(600)


if __name__ == "__main__":
    main()
