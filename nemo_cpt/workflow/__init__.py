"""Many steps as one file: what is done is known by content, what changed is made again, what was killed goes on.

    from nemo_cpt.workflow import Workflow, prepare, run, split

    text = split("text", inputs="ja.jsonl", output_folder="text/ja")
    data = prepare("data", inputs=text / "train.jsonl", output_prefix="ds/ja", tokenizer="models/base")
    run(Workflow("japanese", [text, data]))

Each kind of step has a function here of its name (`import_` for `import`): the step's name, then the parameters of the
library's function. `call` makes a step of a function of one's own.
"""

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_cpt.arguments import checked
from nemo_cpt.errors import CptError
from nemo_cpt.workflow.files import as_python, as_yaml, load, maker_names
from nemo_cpt.workflow.steps import READS, WRITES, Step, Workflow

if TYPE_CHECKING:
    from nemo_cpt.workflow.running import run as run
    from nemo_cpt.workflow.standing import Chosen as Chosen

_KINDS = {name: do for do, name in maker_names().items()}
_HOMES = {"Chosen": "standing", "run": "running"}
_OF_KINDS = (
    "clean", "download", "evaluate", "export", "fetch", "grow", "grow_tokenizer", "import_", "init", "merge", "prepare",
    "push", "report", "serve", "split", "synthesize", "tokenizer", "train", "tune", "verify",
)  # fmt: skip
__all__ = [*_OF_KINDS, "Chosen", "Step", "Workflow", "as_python", "as_yaml", "call", "load", "run"]


@checked
def call(
    name: str,
    function: str | Callable[..., Any],
    /,
    *,
    reads: str | Sequence[str] | None = (),
    writes: str | Sequence[str] | None = (),
    **parameters: Any,
) -> Step:
    """A step of a function of one's own.

    Args:
        name: the step's.
        function: of a module or of a file; or `FILE.py:FUNCTION`, `module:function`.
        reads: which of its parameters are files that it reads.
        writes: which are files or folders that it makes.
        **parameters: its own.

    Raises:
        CptError: the function has no name by which another process could find it.
    """
    if not isinstance(function, str):
        function = _named(function)
    paths = {key: value for key, value in ((READS, reads), (WRITES, writes)) if value}
    return Step(name, function, paths | parameters)


def _named(function: Callable[..., Any]) -> str:
    if not (inspect.isfunction(function) or inspect.isclass(function)):  # partial(...), an object, a builtin
        raise CptError(
            f"{function!r} is in no file by a name: give the function itself, and what it is called with as the step's "
            "parameters"
        )
    file = inspect.getsourcefile(function)
    if file is None or not function.__qualname__.isidentifier():
        raise CptError(f"{function!r} stands within another function, or in no file: no other process could find it")
    return f"{Path(file).absolute()}:{function.__name__}"


def _maker(do: str) -> Callable[..., Step]:
    def make(name: str, /, **parameters: Any) -> Step:
        return Step(name, do, parameters)

    make.__name__ = make.__qualname__ = do
    make.__doc__ = f"A step that does `{do}`: its name, then the parameters of that."
    return checked(make)


def __getattr__(name: str) -> Any:
    if name in _KINDS:
        return _maker(_KINDS[name])
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
