"""A run longer than the partition's limit, where requeueing is not wanted: five jobs, one behind the other.

600 steps take 19 hours by `nemo-cpt plan llama31_8b max_steps=600 --gpu H100`, and took the recorded run's software 24.

python examples/launch_slurm_chain.py
"""

import nemo_run as run

from nemo_cpt.executors import slurm
from nemo_cpt.recipes import llama31_8b

if __name__ == "__main__":
    recipe = llama31_8b.continual_pretrain(max_steps=600)
    cluster = slurm("llm", "gpu", gpus_per_node=8, cpus_per_task=8, mem="0", time="6:00:00", chain=5)
    run.run(recipe, executor=cluster, detach=True)
