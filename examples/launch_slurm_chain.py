"""A run longer than the partition's limit, where requeueing is not wanted: four jobs, one behind the other.

python examples/launch_slurm_chain.py
"""

import nemo_run as run

from nemo_cpt.executors import slurm
from nemo_cpt.recipes import llama31_8b

if __name__ == "__main__":
    recipe = llama31_8b.continual_pretrain(max_steps=600)
    run.run(recipe, executor=slurm("llm", "gpu", gpus_per_node=8, time="4:00:00", chain=4), detach=True)
