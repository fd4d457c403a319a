"""One way to ask a model: evaluation, chat and the server all go through an engine of this package.

`open_engine` takes what users have (a Hugging Face folder, a NeMo checkpoint, a run's folder, the address of an
OpenAI-compatible server) and returns an `Engine`. Importing this package imports neither torch nor transformers.
"""

from typing import TYPE_CHECKING

from nemo_cpt.importing import on_first_use

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
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
