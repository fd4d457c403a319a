"""A project in a git repository, its tasks, and a real Slurm cluster to send them to."""

import io
import json
import sys
from importlib.resources import files

import pytest

from tests.support.shared import made_once

DOCUMENTS = 60

TASKS = '''
import gc, json, os, signal, subprocess, sys, time
from pathlib import Path

from nemo_cpt.errors import CptError, StoppedEarlyError

if importing := os.environ.get("NEVER_IMPORTED_AT_FIRST"):
    first = not Path(importing).exists()
    Path(importing).touch()
    while first:
        signal.pause()

def report(path, commands=False):
    """Write what the task sees, one file a rank."""
    rank = os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0"))
    seen = {"rank": rank, "cwd": os.getcwd(), "env": dict(os.environ), "file": __file__, "argv": sys.argv}
    seen["collects"] = gc.isenabled()
    if commands:
        seen["commands"] = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    Path(f"{path}.{rank}").write_text(json.dumps(seen))
    print("reported rank", rank, flush=True)

def fail(message):
    raise ValueError(message)

def raises(kind):
    kinds = {each.__name__: each for each in (CptError, StoppedEarlyError, BrokenPipeError, KeyboardInterrupt)}
    print("raises", kind, flush=True)
    if kind in kinds:
        raise kinds[kind]("as it was asked to")

def refuse(message):
    print("tried", flush=True)
    raise CptError(message)

def count(path, until, go=None):
    """Count to `until` in a file, going on where it stands; on SIGTERM end as a recipe does that has saved.

    The last number waits for the file `go`, if one is named.
    """
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    reached = int(os.read(file, 9) or 0)
    print("starting at", reached, flush=True)
    while reached < until:
        time.sleep(0.1)
        if reached < until - 1 or not go or Path(go).exists():
            reached += 1
            os.pwrite(file, b"%9d" % reached, 0)  # in place: the job's other processes never find it empty
        if stopped:
            print("stopped at", reached, flush=True)
            raise StoppedEarlyError("told to stop, saved")
    print("counted to", reached, flush=True)

def act(path, acts):
    """Do at each start what is next in `acts`, which leaves a file `path.NUMBER.ACT` of each.

    save: when it is told to stop, as a recipe does; die: without saving; stay: until it is killed; crash; end.
    """
    number = sum(1 for _ in Path(path).parent.glob(f"{Path(path).name}.*"))
    act = acts[number]

    def told(*_):
        if act == "save":
            raise StoppedEarlyError("told to stop, saved")
        if act == "die":
            sys.exit(1)

    signal.signal(signal.SIGTERM, told)
    Path(f"{path}.{number}.{act}").touch()
    print("start", number, act, flush=True)
    while act in ("save", "die", "stay"):
        signal.pause()
    if act == "crash":
        sys.exit(3)

def train(arguments, fields, folder, waits):
    """Train the tiny recipe, as `nemo-cpt run` does; once it has done a step of `waits`, it waits until it may go on.

    See `waiting.Wait`.
    """
    import fiddle as fdl
    from nemo_cpt.catalog.build import build_recipe
    from nemo_cpt.executors.stopping import save_on_sigterm
    from waiting import Wait

    recipe = build_recipe("tiny.continual_pretrain", arguments, fields)
    recipe.trainer.num_nodes = int(os.environ["SLURM_NNODES"])
    save_on_sigterm(recipe)
    training = fdl.build(recipe)
    training.keywords["trainer"].callbacks.insert(0, Wait(folder, waits))
    training()

def crash_once(path):
    if not os.path.exists(path):
        Path(path).touch()
        sys.exit(3)
    print("second start", os.environ.get("SLURM_RESTART_COUNT"), flush=True)
'''

# Of its own, because a task that does not train imports no Lightning.
WAITING = '''
import time
from pathlib import Path

import lightning.pytorch as pl

class Wait(pl.Callback):
    """Wait once each step of `waits` is done: a file `at.STEP` in `folder` says so, and `go.STEP` lets it go on."""

    def __init__(self, folder, waits):
        self.folder, self.waits = Path(folder), waits

    def on_train_batch_end(self, trainer, *args):
        step = trainer.global_step
        if step in self.waits and trainer.is_global_zero:
            (self.folder / f"at.{step}").touch()
            while not (self.folder / f"go.{step}").exists():
                time.sleep(0.1)
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A committed repository with tasks.py and waiting.py, as current folder; NeMo-Run's records go beside it."""
    import nemo_run.config
    from nemo_run.run.torchx_backend.schedulers import local as local_scheduler
    from nemo_run.run.torchx_backend.schedulers import slurm as slurm_scheduler

    from tests.support.executor_jobs import git

    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "tasks.py").write_text(TASKS)
    (folder / "waiting.py").write_text(WAITING)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    home = tmp_path / "home"
    monkeypatch.setattr(nemo_run.config, "_NEMORUN_HOME", str(home))
    monkeypatch.setattr(local_scheduler, "LOCAL_JOB_DIRS", str(home / ".local_jobs.json"))
    monkeypatch.setattr(slurm_scheduler, "SLURM_JOB_DIRS", str(home / ".slurm_jobs"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # NeMo-Run's commands read it
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    _forget_modules()
    yield folder
    _forget_modules()


def _forget_modules():
    """The next project has others of these names."""
    for name in ("tasks", "waiting"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A briefly trained base of the tiny shape, imported, and two datasets made with its tokenizer."""
    return made_once(tmp_path_factory, "material", _make_material)


def _make_material(folder):
    from nemo_cpt.checkpoint import import_hf
    from nemo_cpt.corpus import prepare
    from nemo_cpt.demo import base

    lines = (files("nemo_cpt.demo") / "corpus" / "en.jsonl").read_text().splitlines()[:DOCUMENTS]
    (folder / "en.jsonl").write_text("\n".join(lines) + "\n")
    texts = [json.loads(line)["text"] for line in lines]
    base.pretrain(
        texts, base.train_tokenizer(texts, 512), folder / "hf", steps=60, progress=lambda step, loss: None, batch_size=4
    )
    (folder / "held_out.jsonl").write_text("\n".join(lines[:8]) + "\n")
    for name in ("en", "held_out"):
        prepare(folder / f"{name}.jsonl", folder / name, folder / "hf", quiet=True)
    import_hf(folder / "hf", folder / "base")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    from tests.support.slurm_cluster import SlurmCluster, missing

    if reason := missing():
        pytest.skip(reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def slurm_here(cluster, project, monkeypatch):
    """The cluster as seen from its login node; no job is left behind by a test."""
    from tests.support.executor_jobs import wait_until

    for name, value in cluster.environ.items():
        monkeypatch.setenv(name, value)
    yield cluster
    for job in cluster.jobs():
        cluster.run("scancel", job, check=False)
    wait_until(lambda: cluster.jobs() == [])  # a job that is still ending would be one of the next test's
