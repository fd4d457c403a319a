import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def nemo_jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf` (Llama 3.1's shape), `nemo` (imported from it) and `runs`, the work of nemo_jobs.py."""
    import small_models

    from nemo_cpt.checkpoint import import_hf

    folder = tmp_path_factory.mktemp("nemo_jobs")
    import_hf(small_models.make("llama31", folder / "hf"), folder / "nemo")
    script = [sys.executable, Path(__file__).with_name("nemo_jobs.py"), folder / "nemo", folder / "runs"]
    with (folder / "log").open("w") as log:
        done = subprocess.run(script, timeout=500, stdout=log, stderr=log)
    assert done.returncode == 0, (folder / "log").read_text()[-3000:]
    return folder
