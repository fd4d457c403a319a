"""Will a recipe fit, how long will it take, and what would fit: from the recipe alone, without a GPU.

`plan(recipe)` answers for a recipe as it is; `fit(recipe, gpu_memory_gib=48)` changes it until it fits and is fast.
Neither builds a model, nor imports torch or NeMo by itself. docs/planning.md holds the measured errors.
"""

from nemo_cpt.planning.hardware import GPUS, Gpu
from nemo_cpt.planning.memory import HostMemory, StageMemory
from nemo_cpt.planning.plans import Plan, plan, plan_workload
from nemo_cpt.planning.recipe_reader import read
from nemo_cpt.planning.search import ALLOWED, Change, Fit, fit, fit_workload
from nemo_cpt.planning.throughput import Speed
from nemo_cpt.planning.workload import Workload

__all__ = [
    "ALLOWED",
    "GPUS",
    "Change",
    "Fit",
    "Gpu",
    "HostMemory",
    "Plan",
    "Speed",
    "StageMemory",
    "Workload",
    "fit",
    "fit_workload",
    "plan",
    "plan_workload",
    "read",
]
