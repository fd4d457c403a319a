"""Llama-3.1-8B over Slurm from its login node, in the current virtual environment, on two nodes.

The environment, the current folder and ~/.nemo_run must be on a file system that the nodes share. The job requeues
itself ahead of its time limit and after preemption, and goes on where it stopped.

    HF_TOKEN=... python examples/launch_slurm.py
"""

import nemo_run as run

from nemo_cpt.corpus import Blend
from nemo_cpt.executors import slurm
from nemo_cpt.recipes import llama31_8b

if __name__ == "__main__":
    recipe = llama31_8b.continual_pretrain(
        base="checkpoints/Llama-3.1-8B",
        data=Blend(
            train={"ds/ja": 0.75, "ds/en": 0.25}, validation={"ja": "ds/ja_validation", "en": "ds/en_validation"}
        ),
        num_nodes=2,
        gpus_per_node=8,
    )
    cluster = slurm("llm", "gpu", nodes=2, gpus_per_node=8, cpus_per_task=8, mem="0", time="4:00:00")
    run.run(recipe, executor=cluster, detach=True)
