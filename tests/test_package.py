"""What importing the package costs, and how its one exception ends a process."""

import subprocess
import sys
import time

import pytest

LIGHT = ["nemo_cpt", "nemo_cpt.corpus", "nemo_cpt.executors", "nemo_cpt.recipes", "nemo_cpt.checkpoint"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_neither_torch_nor_nemo(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'nemo', 'nemo_run', 'megatron')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_package_imports_in_under_0_3_s() -> None:
    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    # Of several tries the best: the machine may be busy. An interpreter alone is subtracted.
    assert min(seconds("import nemo_cpt") for _ in range(7)) - min(seconds("pass") for _ in range(7)) < 0.3


def test_a_cpt_error_ends_a_process_with_its_message_and_2() -> None:
    code = "from nemo_cpt import errors; errors.exit_with_the_message(); raise errors.CptError('lr is 0')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "nemo_cpt: lr is 0\n")


def test_other_errors_keep_their_traceback() -> None:
    code = "from nemo_cpt import errors; errors.exit_with_the_message(); raise ValueError('odd')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
