"""One way to ask a model: evaluation, chat and the server all go through an engine of this package.

`open_engine` takes what users have (a Hugging Face folder, a NeMo checkpoint, a run's folder, the address of an
OpenAI-compatible server) and returns an `Engine`. Importing this package imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_cpt.inference.engine import Engine, Message, Piece, Prompt, Reply, Sampling
    from nemo_cpt.inference.models import hugging_face_folder, open_engine

_HOMES = {
    "Engine": "engine",
    "Message": "engine",
    "Piece": "engine",
    "Prompt": "engine",
    "Reply": "engine",
    "Sampling": "engine",
    "hugging_face_folder": "models",
    "open_engine": "models",
}
__all__ = ["Engine", "Message", "Piece", "Prompt", "Reply", "Sampling", "hugging_face_folder", "open_engine"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _HOMES:
        return getattr(import_module(f"nemo_cpt.inference.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
