"""`nemo cpt ...`: nemo-cpt as a plugin of NeMo-Run's `nemo` command, and our recipes for `nemo llm ... --factory`.

NeMo-Run imports this module from its entry point group `nemo_run.cli`. Its own way to add commands knows only
functions of key=value, so `nemo cpt` hands over to nemo-cpt here.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from nemo_cpt import catalog
from nemo_cpt.errors import nearest


def main() -> None:
    """Take over `nemo cpt ...`; for other commands of `nemo`, register our recipes and executors."""
    if Path(sys.argv[0]).name in ("nemo", "nemorun") and sys.argv[1:2] == ["cpt"]:
        from nemo_cpt.cli import main as nemo_cpt

        # As the program's name, which usage messages show.
        sys.argv[:2] = ["nemo cpt"]
        nemo_cpt()
        sys.exit(0)
    if sys.argv[1:2] == ["llm"]:  # it imports NeMo in any case
        # Importing a recipe's module registers its factories.
        for module in {name.rpartition(".")[0] for name in catalog.recipes()}:
            import_module(f"nemo_cpt.recipes.{module}")
        _offer_yaml_as_a_factory()
        _refuse_unknown_factory()
    _register_executors()


def _offer_yaml_as_a_factory() -> None:
    """Turn `--yaml FILE` into `--factory`, because NeMo-Run cannot read back the YAML that it writes."""
    if "--yaml" not in sys.argv[:-1]:
        return
    import nemo_run as run

    from nemo_cpt.launching import yaml_file

    at = sys.argv.index("--yaml")
    recipe = yaml_file.load(sys.argv[at + 1])
    run.cli.factory(target=recipe.__fn_or_cls__, name="cpt_from_yaml")(lambda: recipe)
    sys.argv[at : at + 2] = ["--factory", "cpt_from_yaml"]


def _refuse_unknown_factory() -> None:
    """End where there is no such factory, with the names near to it: NeMo-Run only says that there is none."""
    import catalogue

    given = next((_value_of(at) for at in range(len(sys.argv)) if _value_of(at)), "")
    name = given.partition("(")[0]
    # By any namespace: what a factory is for shows when it is called. NeMo-Run imports a dotted name, and takes lists.
    known = {names[-1] for names in catalogue.REGISTRY}
    if name.isidentifier() and name not in known and not hasattr(sys.modules["__main__"], name):
        print(f"nemo-cpt: there is no factory {name}; {nearest(name, known)}", file=sys.stderr)
        sys.exit(2)


def _value_of(at: int) -> str:
    """The factory that a word of the command line names; empty for any other word."""
    option, equals, value = sys.argv[at].partition("=")
    if option not in ("--factory", "-f"):
        return ""
    return value if equals else "".join(sys.argv[at + 1 : at + 2])


def _register_executors() -> None:
    """Let `nemo llm pretrain run.executor=cpt_slurm run.executor.partition=...` find ours, with typed arguments."""
    import nemo_run as run

    from nemo_cpt import executors
    from nemo_cpt.executors import nemo_run_patches

    nemo_run_patches.parse_what_fields_hold()
    nemo_run_patches.write_what_fields_hold()
    nemo_run_patches.say_which_argument_is_wrong()
    nemo_run_patches.examine_dry_runs()
    nemo_run_patches.end_with_our_exit_codes()
    for name in executors.__all__:
        function = getattr(executors, name)
        # `ssh` is a class, and no executor.
        if not isinstance(function, type):
            run.cli.factory(target=run.Executor, name=f"cpt_{name}")(_config_of(function))


def _config_of(function: Callable[..., Any]) -> Callable[[], Any]:
    """A factory of the executor's config; NeMo-Run's help wants a function with a source and a docstring."""
    import nemo_run as run

    def executor() -> Any:
        return run.Config(function)

    executor.__doc__ = function.__doc__
    return executor


main()
