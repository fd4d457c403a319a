"""Llama-3.1-8B on this machine: one process a GPU, under torchrun.

python examples/launch_local.py
"""

import nemo_run as run

from nemo_cpt.corpus import Blend
from nemo_cpt.executors import local
from nemo_cpt.recipes import llama31_8b

if __name__ == "__main__":
    recipe = llama31_8b.continual_pretrain(
        base="checkpoints/Llama-3.1-8B",
        data=Blend(
            train={"ds/ja": 0.75, "ds/en": 0.25}, validation={"ja": "ds/ja_validation", "en": "ds/en_validation"}
        ),
        gpus_per_node=8,
    )
    run.run(recipe, executor=local(gpus=8, max_restarts=2))
