"""The Makefile finds an interpreter that answers, and says what is missing where there is none."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIM = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"  # pyenv's, of a version that is not selected

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def make(tmp_path: Path):
    """Run make in a checkout without .venv, where these interpreters are found and no others."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tests/model_packages.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    found = tmp_path / "bin"
    found.mkdir()
    for tool in ("make", "sh"):
        (found / tool).symlink_to(shutil.which(tool))

    def run(*arguments: str, **interpreters: str) -> subprocess.CompletedProcess[str]:
        for name, script in interpreters.items():
            path = found / {"python3": "python3"}.get(name, name.replace("_", "."))
            path.write_text(script)
            path.chmod(0o755)
        environ = {"PATH": str(found)}
        return subprocess.run(["make", *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True)

    return run


def test_a_shim_that_does_not_answer_is_passed_over(make) -> None:
    answers = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    done = make("-n", "demo", python3_11=SHIM, python3_12=SHIM, python3=answers)
    assert "bin/python3 -m venv .venv" in done.stdout
    assert 'echo "making .venv with ' in done.stdout
    assert "bin/python3.12 -m venv .venv" in make("-n", "test", python3_12=answers).stdout


def test_without_one_that_answers_it_says_what_to_install(make) -> None:
    for done in (make("demo", python3_11=SHIM, python3=SHIM), make("demo", "PYTHON=/no/python")):
        assert done.returncode == 2
        assert done.stderr.count("\n") <= 2
    said = make("demo").stdout + make("demo", "PYTHON=/no/python").stdout
    assert "No Python 3.11 or 3.12 with venv answers (tried python3.11 python3.12 python3): install one" in said
    assert "(tried /no/python)" in said
