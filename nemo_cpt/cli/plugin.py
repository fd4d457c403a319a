"""`nemo cpt ...`: nemo-cpt as a plugin of NeMo-Run's `nemo` command, and our recipes for `nemo llm ... --factory`.

NeMo-Run imports this module from its entry point group `nemo_run.cli`. Its own way to add commands knows only
functions of key=value, so `nemo cpt` hands over to nemo-cpt here.
"""

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Take over `nemo cpt ...`; for other commands of `nemo`, register our recipes and executors."""
    if Path(sys.argv[0]).name in ("nemo", "nemorun") and sys.argv[1:2] == ["cpt"]:
        from nemo_cpt.cli import main as nemo_cpt

        sys.argv[:2] = ["nemo cpt"]
        nemo_cpt()
        sys.exit(0)
    if find_spec("nemo_cpt.recipes.factories"):
        import nemo_cpt.recipes.factories  # noqa: F401
    _register_executors()


def _register_executors() -> None:
    """Let `nemo llm pretrain --executor cpt_slurm executor.partition=...` find ours."""
    import nemo_run as run

    from nemo_cpt import executors

    for name in executors.__all__:
        function = getattr(executors, name)
        if not isinstance(function, type):
            run.cli.factory(target=run.Executor, name=f"cpt_{name}")(function)


main()
