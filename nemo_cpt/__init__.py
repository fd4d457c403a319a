"""Continual pretraining of Llama-3.1-8B and its kin with NeMo 2.0, composed in Python."""

import os
from pathlib import Path
from typing import Any

from nemo_cpt.errors import CptError, exit_with_the_message

# megatron-core 0.15 builds a CUDA extension when it is imported. With nvcc on the PATH but no GPU, PyTorch finds no
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
