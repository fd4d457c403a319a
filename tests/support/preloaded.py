"""Imported by the server that the tests' jobs are forked from: NeMo, once for all of them."""

import gc
from importlib import import_module

from nemo_cpt.importing import uncollected

# NeMo, and what every job imports on its way to its first checkpoint.
MODULES = (
    "nemo_cpt.recipes.tiny",
    "nemo_cpt.doctor.preflight",
    "nemo_cpt.evaluation.bits_per_byte",
    "nemo_cpt.executors.runner",
    "nemo_cpt.planning.save_window",
    "nemo_run.run.torchx_backend.schedulers.slurm",
    "megatron.core.datasets.helpers",
    "torch.utils.serialization",
    "multiprocessing.managers",
)

with uncollected():
    for module in MODULES:
        import_module(module)
gc.freeze()  # a collection in a job would walk over all this, and copy the pages that it shares
