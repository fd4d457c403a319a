"""A project in a git repository, its tasks, and a real Slurm cluster to send them to."""

import io
import json
import sys
from importlib.resources import files
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for slurm_cluster and helpers

DOCUMENTS = 60

TASKS = '''
import json, os, signal, subprocess, sys, time
from pathlib import Path

def report(path, commands=False):
    """Write what the task sees, one file a rank."""
    rank = os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0"))
    seen = {"rank": rank, "cwd": os.getcwd(), "env": dict(os.environ), "file": __file__, "argv": sys.argv}
    if commands:
        seen["commands"] = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    Path(f"{path}.{rank}").write_text(json.dumps(seen))
    print("reported rank", rank, flush=True)

def fail(message):
    raise ValueError(message)

def refuse(message):
    from nemo_cpt.errors import CptError

    print("tried", flush=True)
    raise CptError(message)

def count(path, until, pause=0.2):
    """Count to `until` in a file, going on where it stands; on SIGTERM end as NeMo's PreemptionCallback does."""
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    file = Path(path)
    reached = int(file.read_text()) if file.exists() else 0
    print("starting at", reached, flush=True)
    while reached < until:
        time.sleep(pause)
        reached += 1
        file.write_text(str(reached))
        if stopped:
            print("stopped at", reached, flush=True)
            sys.exit(0)
    print("counted to", reached, flush=True)

def crash_once(path):
    if not os.path.exists(path):
        Path(path).touch()
        sys.exit(3)
    print("second start", os.environ.get("SLURM_RESTART_COUNT"), flush=True)
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A committed repository with tasks.py, as current folder; NeMo-Run's records go beside it."""
    import nemo_run.config
    from helpers import git
    from nemo_run.run.torchx_backend.schedulers import local as local_scheduler
    from nemo_run.run.torchx_backend.schedulers import slurm as slurm_scheduler

    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "tasks.py").write_text(TASKS)
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
    sys.modules.pop("tasks", None)
    yield folder
    sys.modules.pop("tasks", None)


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A briefly trained base of the tiny shape, imported, and two datasets made with its tokenizer."""
    from nemo_cpt.checkpoint import import_hf
    from nemo_cpt.corpus import prepare
    from nemo_cpt.demo import base

    folder = tmp_path_factory.mktemp("material")
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
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    from slurm_cluster import SlurmCluster, missing

    if reason := missing():
        pytest.skip(reason)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def slurm_here(cluster, project, monkeypatch):
    """The cluster as seen from its login node; no job is left behind by a test."""
    for name, value in cluster.environ.items():
        monkeypatch.setenv(name, value)
    yield cluster
    for job in cluster.jobs():
        cluster.run("scancel", job, check=False)
