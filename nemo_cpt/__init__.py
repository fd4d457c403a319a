"""Continual pretraining of Llama-3.1-8B and its kin with NeMo 2.0, composed in Python."""

import os
from pathlib import Path

from nemo_cpt.errors import CptError, exit_with_the_message

# megatron-core 0.15 builds a CUDA extension when it is imported. With nvcc on the PATH but no GPU, PyTorch finds no
# architecture to build for and ends the import with an IndexError; a failed build would only be a warning.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")

exit_with_the_message()

__version__ = "0.1.0"
__all__ = ["CptError", "__version__"]
