import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.shared import made_once


@pytest.fixture(scope="session")
def nemo_jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and the work of nemo_jobs.py from them.

    `hf` has Llama 3.1's shape, `tied_hf` Llama 3.2's, `biased_hf` Qwen2's; all have more rows than tokens, and not a
    multiple of 128. `nemo`, `tied_nemo` and `biased_nemo` are imported from them; `runs` are trainings from those.
    """
    return made_once(tmp_path_factory, "nemo_jobs", _run_nemo_jobs)


def _run_nemo_jobs(folder: Path) -> None:
    from nemo_cpt.checkpoint import import_hf
    from tests.support import small_models

    for shape, prefix in (("llama31", ""), ("llama32", "tied_"), ("qwen2", "biased_")):
        hf = small_models.make(shape, folder / f"{prefix}hf", vocab_size=small_models.MORE_ROWS)
        import_hf(hf, folder / f"{prefix}nemo")
    script = [sys.executable, "-m", "tests.support.nemo_jobs", folder]
    with (folder / "log").open("w") as log:
        done = subprocess.run(script, cwd=Path(__file__).parents[2], timeout=500, stdout=log, stderr=log)
    assert done.returncode == 0, (folder / "log").read_text()[-3000:]
