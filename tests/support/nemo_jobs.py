"""What the tests need NeMo's own processes for, in one run, since importing NeMo takes 20 s of CPU.

    python -m tests.support.nemo_jobs FOLDER

FOLDER/runs/lora, dora and full are trainings from the imported FOLDER/nemo, edited is one from FOLDER/tied_nemo whose
model config was edited, and parallel is FOLDER/nemo saved anew at TP 2 x PP 2. FOLDER/runs/dora_SHAPE has NeMo's DoRA
on FOLDER/nemo and FOLDER/biased_nemo at TP 1 and TP 2, and at TP 2 without the library's patches.
Everything is forked after the imports. They are inside functions because Megatron's saving spawns helpers that import
this file again.
"""

import multiprocessing
import sys
from pathlib import Path

from tests.support import dora_parallel, resave_parallel, train_small


def main() -> None:
    from nemo_cpt.training import patches
    from tests.support import preloaded  # noqa: F401  before the forks

    patches.report_writes_as_bytes()  # plain NeMo, but for 2 s of each process

    folder = Path(sys.argv[1])
    base, dest = folder / "nemo", folder / "runs"
    dest.mkdir(parents=True)
    train_small.write_text(dest / "text")
    fork = multiprocessing.get_context("fork")
    for name, start in (("lora", base), ("dora", base), ("full", base), ("edited", folder / "tied_nemo")):
        _run([fork.Process(target=train_small.train, args=(start, dest, name))])
    ranks = range(resave_parallel.TENSOR * resave_parallel.PIPELINE)
    (dest / "parallel" / "weights").mkdir(parents=True)
    _run([fork.Process(target=resave_parallel.resave, args=(rank, base, dest / "parallel")) for rank in ranks])
    for shape, start in (("plain", base), ("biased", folder / "biased_nemo")):
        for name, tensor_parallel, patched in (
            ("tp1", 1, True), ("tp2", 2, True), ("tp2_in_parts", 2, True), ("unpatched", 2, False)
        ):  # fmt: skip
            work = dest / f"dora_{shape}" / name
            (work / "weights").mkdir(parents=True)
            how = (tensor_parallel, patched, start, work, name == "tp2_in_parts")
            _run([fork.Process(target=dora_parallel.forward, args=(rank, *how)) for rank in range(tensor_parallel)])


def _run(processes: list[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"processes ended with {[process.exitcode for process in processes]}")


if __name__ == "__main__":
    main()
