"""Text to Megatron datasets, and blends of them. Names are loaded when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_cpt.corpus.dataset import presets as presets
    from nemo_cpt.corpus.dataset.blend import Blend as Blend
    from nemo_cpt.corpus.dataset.index import Index as Index
    from nemo_cpt.corpus.dataset.index import full_prefix as full_prefix
    from nemo_cpt.corpus.dataset.index import max_token_id as max_token_id
    from nemo_cpt.corpus.dataset.index import read_index as read_index
    from nemo_cpt.corpus.dataset.inspection import Inspection as Inspection
    from nemo_cpt.corpus.dataset.inspection import inspect as inspect
    from nemo_cpt.corpus.dataset.manifest import read_manifest as read_manifest
    from nemo_cpt.corpus.fetching.fetch import fetch as fetch
    from nemo_cpt.corpus.preparing.preparation import PrepareReport as PrepareReport
    from nemo_cpt.corpus.preparing.preparation import prepare as prepare
    from nemo_cpt.corpus.splitting.splits import SplitReport as SplitReport
    from nemo_cpt.corpus.splitting.splits import split as split

_HOMES = {
    "Blend": "dataset.blend",
    "Index": "dataset.index",
    "PrepareReport": "preparing.preparation",
    "full_prefix": "dataset.index",
    "max_token_id": "dataset.index",
    "prepare": "preparing.preparation",
    "read_index": "dataset.index",
    "read_manifest": "dataset.manifest",
    "Inspection": "dataset.inspection",
    "SplitReport": "splitting.splits",
    "fetch": "fetching.fetch",
    "inspect": "dataset.inspection",
    "split": "splitting.splits",
}
__all__ = [*sorted(_HOMES), "presets"]


# Lazily (PEP 562): `prepare` alone pulls in NumPy and tokenizers, which `nemo-cpt --help` must not wait for.
def __getattr__(name: str) -> Any:
    if name == "presets":
        return import_module(f"{__name__}.dataset.presets")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
