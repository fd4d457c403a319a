"""Continual pretraining of Llama-3.1-8B and its kin with NeMo 2.0, composed in Python."""

from nemo_cpt.errors import CptError

__version__ = "0.1.0"
__all__ = ["CptError", "__version__"]
