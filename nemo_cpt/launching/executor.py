"""An executor by its name and `key=value` options, or from a file of the user's."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_cpt import catalog
from nemo_cpt.errors import CptError
from nemo_cpt.python_files import import_file


def own_executor(name: str, options: Sequence[str]) -> Any:
    """Return the executor that a function of the user's makes, without a recipe's size; None for one by name.

    Raises:
        CptError: there is no such file or function, it makes no executor, or options are given.
    """
    return _from_file(name) if _is_own(name, options) else None


def make_executor(name: str, options: Sequence[str], processes: int, nodes: int = 1, on_gpus: bool = False) -> Any:
    """Return what `executor_maker` makes.

    Raises:
        CptError: there is no such executor, file or function, or an option is wrong.
    """
    return executor_maker(name, options, processes, nodes, on_gpus)()


def executor_maker(
    name: str, options: Sequence[str], processes: int, nodes: int = 1, on_gpus: bool = False
) -> Callable[[], Any]:
    """Return what makes an executor by name, with `key=value` options, or the one a function of the user's makes.

    Name and options are looked at now; NeMo-Run, which takes seconds to import, is needed by what is returned.

    Args:
        name: `local`, `slurm`, ... or `FILE.py:FUNCTION`.
        options: for an executor by name, its arguments.
        processes: processes on a node that the recipe needs; the default of the executor's own count.
        nodes: machines that it needs; likewise.
        on_gpus: each of the processes takes a GPU.

    Raises:
        CptError: there is no such executor, file or function, or an option is wrong.
    """
    # Before the catalog: a user's file needs no name there.
    if _is_own(name, options):
        return lambda: sized(_from_file(name), processes, on_gpus)
    described = catalog.executor(name)
    given = catalog.parse(described, options, prefix="executor.")
    count = next((each for each in ("processes", "tasks_per_node") if each in described.parameters), None)
    # Only where the user says nothing: a number that is given is meant. Slurm's jobs take it with their GPUs, below.
    if count and not {count, "gpus_per_node", "gpus"} & set(given) and (name != "slurm" or "gres" in given):
        given[count] = processes
    if nodes > 1 and "nodes" in described.parameters and name != "local":  # which somebody starts on each machine
        given.setdefault("nodes", nodes)
    return lambda: sized(_by_name(name, given), processes, on_gpus)


def sized(executor: Any, processes: int, on_gpus: bool) -> Any:
    """An executor that takes the recipe's size, where it was given none.

    Args:
        executor: NeMo-Run's.
        processes: as for `executor_maker`.
        on_gpus: likewise.
    """
    if take_size := getattr(executor, "take_size", None):
        take_size(processes, on_gpus)
    return executor


def _is_own(name: str, options: Sequence[str]) -> bool:
    """Whether an executor is one of a file of the user's, which alone says what it is."""
    file = name.partition(":")[0]
    if file.endswith(".py") and options:
        raise CptError(f"{', '.join(options)}: {name} takes no options; write them into {file}")
    return file.endswith(".py")


def _by_name(name: str, given: Mapping[str, Any]) -> Any:
    from nemo_cpt import executors

    return getattr(executors, name)(**given)


def _from_file(name: str) -> Any:
    from nemo_cpt.executors.examination import check_executor

    path, _, function = name.partition(":")
    file = Path(path)
    if not file.is_file():
        raise CptError(f"executor {file}: there is no such file; give FILE.py:FUNCTION")
    if not function:
        raise CptError(f"executor {file}: which function of it makes the executor? Give {file}:FUNCTION")
    module = import_file(file)
    if not hasattr(module, function):
        raise CptError(f"{file} has no {function}; {catalog.nearest(function, vars(module))}")
    try:
        executor = getattr(module, function)()
        check_executor(executor)
    # Of the user's own code, which may raise anything.
    except Exception as error:
        said = error.message if isinstance(error, CptError) else f"{type(error).__name__}: {error}"
        raise CptError(f"executor {file}:{function}: {said}") from error
    return executor
