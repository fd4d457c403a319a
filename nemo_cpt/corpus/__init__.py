"""Text to Megatron datasets, and blends of them. Names are loaded when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_cpt.corpus import presets as presets
    from nemo_cpt.corpus.blend import Blend as Blend
    from nemo_cpt.corpus.download import fetch as fetch
    from nemo_cpt.corpus.index import Index as Index
    from nemo_cpt.corpus.index import full_prefix as full_prefix
    from nemo_cpt.corpus.index import max_token_id as max_token_id
    from nemo_cpt.corpus.index import read_index as read_index
    from nemo_cpt.corpus.inspection import Inspection as Inspection
    from nemo_cpt.corpus.inspection import inspect as inspect
    from nemo_cpt.corpus.manifest import read_manifest as read_manifest
    from nemo_cpt.corpus.preparation import PrepareReport as PrepareReport
    from nemo_cpt.corpus.preparation import prepare as prepare
    from nemo_cpt.corpus.splits import SplitReport as SplitReport
    from nemo_cpt.corpus.splits import split as split

_HOMES = {
    "Blend": "blend",
    "Index": "index",
    "PrepareReport": "preparation",
    "full_prefix": "index",
    "max_token_id": "index",
    "prepare": "preparation",
    "read_index": "index",
    "read_manifest": "manifest",
    "Inspection": "inspection",
    "SplitReport": "splits",
    "fetch": "download",
    "inspect": "inspection",
    "split": "splits",
}
__all__ = [*sorted(_HOMES), "presets"]


def __getattr__(name: str) -> Any:
    if name == "presets":
        return import_module(f"{__name__}.presets")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
