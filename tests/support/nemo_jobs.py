"""What the tests need NeMo's own processes for, in one run, since importing NeMo takes 20 s of CPU.

    python nemo_jobs.py FOLDER

FOLDER/runs/lora and full are trainings from the imported FOLDER/nemo, edited is one from FOLDER/tied_nemo whose model
config was edited, and parallel is FOLDER/nemo saved anew at TP 2 x PP 2.
Everything is forked after the imports. They are inside functions because Megatron's saving spawns helpers that import
this file again.
"""

import multiprocessing
import sys
from pathlib import Path

from tests.support import resave_parallel, train_small


def main() -> None:
    import nemo.collections.llm  # noqa: F401  before the forks

    folder = Path(sys.argv[1])
    base, dest = folder / "nemo", folder / "runs"
    dest.mkdir(parents=True)
    train_small.write_text(dest / "text")
    fork = multiprocessing.get_context("fork")
    for name, start in (("lora", base), ("full", base), ("edited", folder / "tied_nemo")):
        _run([fork.Process(target=train_small.train, args=(start, dest, name))])
    ranks = range(resave_parallel.TENSOR * resave_parallel.PIPELINE)
    (dest / "parallel" / "weights").mkdir(parents=True)
    _run([fork.Process(target=resave_parallel.resave, args=(rank, base, dest / "parallel")) for rank in ranks])


def _run(processes: list[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"processes ended with {[process.exitcode for process in processes]}")


if __name__ == "__main__":
    main()
