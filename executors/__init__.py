"""Where a recipe runs: each function returns an executor of NeMo-Run, for `run.run`, `run.Experiment` and `nemo`.

Importing this package imports neither torch nor NeMo nor NeMo-Run.
"""

from nemo_cpt.executors.docker import docker
from nemo_cpt.executors.kubernetes import kubernetes
from nemo_cpt.executors.local import local
from nemo_cpt.executors.skypilot import skypilot
from nemo_cpt.executors.slurm import slurm, ssh

__all__ = ["docker", "kubernetes", "local", "skypilot", "slurm", "ssh"]
