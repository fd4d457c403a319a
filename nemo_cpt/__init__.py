"""Continual pretraining of Llama-3.1-8B and its kin with NeMo 2.0, composed in Python."""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_cpt.errors import CptError, exit_with_the_message

# megatron-core 0.15 compiles a CUDA extension when it is imported, for an inference that nothing here asks for. A
# process that is killed meanwhile leaves PyTorch's lock, for which every later import waits, for ever and without a
# word. As where the compilation fails, there is none.
_unified_memory = ModuleType("megatron.core.inference.unified_memory")
vars(_unified_memory).update(has_unified_memory=False, create_unified_mempool=None)
sys.modules.setdefault(_unified_memory.__name__, _unified_memory)
# For processes started from here that import Megatron first: with nvcc on the PATH but no GPU, PyTorch finds no
# architecture to build for and ends the import with an IndexError; a failed build would only be a warning.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")

exit_with_the_message()

__version__ = "0.1.0"
__all__ = ["CptError", "__version__", "load_config"]


def __getattr__(name: str) -> Any:
    """`load_config`, imported when it is asked for: it needs the recipes' catalog, which nothing else here does."""
    if name == "load_config":
        from nemo_cpt.launching.config_file import load_config

        return load_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
