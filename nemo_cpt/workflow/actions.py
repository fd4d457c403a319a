"""What steps call where it is a little more than one function of the library: what its command does around that."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_cpt.errors import CptError


def in_tasks(function: str, tasks: int, executor: str, options: Sequence[str], **parameters: Any) -> Any:
    """Make what a function of `launching.in_tasks` makes, on an executor that is named.

    Raises:
        CptError: there is no such executor, or the function cannot do it.
    """
    from nemo_cpt.launching import in_tasks as making

    make = getattr(making, function)
    return make(executor=making.executor_named(executor, options), tasks=tasks, **parameters)


def verify(nemo: str, hf: str, **parameters: Any) -> Any:
    """Compare a checkpoint with its export by `checkpoint.verify`; the workflow ends where they differ.

    Raises:
        CptError: they are not the same model.
    """
    from nemo_cpt.checkpoint import verify as compare

    found = compare(nemo, hf, **parameters)
    if not found.identical:
        raise CptError(f"{hf} is not the model of {nemo}: `nemo-cpt verify {nemo} {hf}` says in what")
    return found


def evaluate(**parameters: Any) -> dict[str, Any]:
    """Measure by `evaluation.evaluate`, and write the report beside its journal."""
    from nemo_cpt.evaluation import evaluate as measure
    from nemo_cpt.evaluation.report import write

    found = measure(**parameters, say=lambda line: print(line, flush=True))
    # As the command does: the function itself returns the report, and leaves its journal.
    write(found, parameters["output"])
    measured = [(row.group, row.measure, row.before, row.after) for row in found.rows]
    return {"rows": measured, "warnings": found.warnings}


def report(run: str, output: str, against: str | None = None) -> dict[str, Any]:
    """Write what became of a training: `report.html`, pictures and `report.json`, as `nemo-cpt report` does.

    Args:
        run: the run's folder.
        output: folder of the report.
        against: a second run's folder, to compare with.

    Raises:
        CptError: a folder holds no run.
    """
    from nemo_cpt.watching.record import record
    from nemo_cpt.watching.report import write_report

    records = [record(Path(folder)) for folder in (run, against) if folder is not None]
    return {"files": [str(path) for path in write_report(records, Path(output))]}


def serve(model: str, host: str = "127.0.0.1", port: int = 8000, served_as: str | None = None) -> None:
    """Serve a model on this machine over HTTP, compatible with OpenAI's, until it is stopped.

    Args:
        model: Hugging Face folder, NeMo checkpoint, or a run's folder.
        host: an address of this machine's own; `nemo-cpt serve` with a key serves others.
        port: to listen on; 0 takes a free one.
        served_as: the model's name in requests; its folder's when None.

    Raises:
        CptError: the port is taken, or the model cannot be opened.
    """
    check_address(host, port)
    from nemo_cpt.inference.hosts import listen, url_of
    from nemo_cpt.inference.models import open_transformers
    from nemo_cpt.inference.server import make_app
    from nemo_cpt.inference.server import serve as run_server

    listener = listen(host, port, "give the step another port")
    name = served_as or Path(model).resolve().name
    loaded = open_transformers(model, say=lambda line: print(line, flush=True))
    address = url_of(host, listener)
    app = make_app(loaded, served_as=name)
    run_server(app, listener, ready=lambda: print(f"{name} at {address}", flush=True))


def check_address(host: str, port: int) -> None:
    """Check where a model is to be served.

    Raises:
        CptError: the address is not this machine's own, or there is no such port.
    """
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise CptError(f"{host} can be reached from other machines: `nemo-cpt serve --api-key-env` serves them")
    if not 0 <= port < 2**16:
        raise CptError(f"port is {port}; ports go from 1 to 65535, and 0 takes a free one")
