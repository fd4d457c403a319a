"""A workflow of light functions of the user's, whose processes take a tenth of a second each."""

from pathlib import Path

import pytest

from nemo_cpt.workflow import Step, Workflow, call

FUNCTIONS = """
import os, signal, time
from pathlib import Path

def join(sources, dest, word="+"):
    Path(dest).write_text(word.join(Path(each).read_text() for each in sources))
    return {"characters": len(Path(dest).read_text()), "seconds": time.monotonic()}

def constant(sources, dest):
    Path(dest).write_text("always the same")

def crash(sources, dest):
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def refuse(sources, dest):
    from nemo_cpt import CptError
    raise CptError("two tasks failed:\\ntask 1: why")

def spoil(sources, dest, victim):
    Path(dest).write_text("made")
    Path(victim).write_text("something else")

def forget(sources, dest):
    pass

def wait(sources, dest, until):
    Path(until + ".begun").write_text(str(os.getpid()))
    while not Path(until).exists():
        time.sleep(0.02)
    Path(dest).write_text("waited")
"""


def own(name: str, function: str, sources: list[str | Step], dest: str, **parameters: object) -> Step:
    return call(
        name,
        f"functions.py:{function}",
        reads="sources",
        writes="dest",
        sources=[str(each) if isinstance(each, str) else each for each in sources],
        dest=dest,
        **parameters,
    )


def chain(folder: Path, *more: Step, **words: str) -> Workflow:
    """a.txt -> one -> two -> four, and b.txt -> three -> four."""
    one = own("one", "join", ["a.txt"], "one.txt", **({"word": words["one"]} if "one" in words else {}))
    two = own("two", "join", [one, one], "out/two.txt", word=words.get("two", "+"))
    three = own("three", "join", ["b.txt", "b.txt"], "three.txt")
    four = own("four", "join", [two, three], "four.txt", word="-")
    return Workflow("light", [four, three, two, one, *more], folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_folder(tmp_path)
    return tmp_path


def make_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "functions.py").write_text(FUNCTIONS)
    (path / "a.txt").write_text("a")
    (path / "b.txt").write_text("b")
