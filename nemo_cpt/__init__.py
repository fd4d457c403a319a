"""Continual pretraining of Llama-3.1-8B and its kin with NeMo 2.0, composed in Python."""

import sys
from types import ModuleType
from typing import Any

from nemo_cpt.errors import CptError, exit_with_the_message

# megatron-core 0.15 builds a CUDA extension at its import, for its inference engine's unified memory, under a lock
# that is a mere file: once a process was killed at that, every later import of NeMo by that user waits for ever.
# Without it Megatron says that unified memory is not available, and takes the GPU's own.
_NO_UNIFIED_MEMORY = ModuleType("megatron.core.inference.unified_memory")
_NO_UNIFIED_MEMORY.has_unified_memory = False  # type: ignore[attr-defined]
_NO_UNIFIED_MEMORY.create_unified_mempool = None  # type: ignore[attr-defined]
sys.modules.setdefault(_NO_UNIFIED_MEMORY.__name__, _NO_UNIFIED_MEMORY)

exit_with_the_message()

__version__ = "0.1.0"
__all__ = ["CptError", "__version__", "load_config"]


def __getattr__(name: str) -> Any:
    """`load_config`, imported when it is asked for: it needs the recipes' catalog, which nothing else here does."""
    if name == "load_config":
        from nemo_cpt.launching.config_file import load_config

        return load_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
