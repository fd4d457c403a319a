"""Llama-3.1-8B on a cloud's machine of 8 H100, through SkyPilot (pip install skypilot); ships the committed code.

python examples/launch_skypilot.py
"""

import nemo_run as run

from nemo_cpt.executors import skypilot
from nemo_cpt.recipes import llama31_8b

if __name__ == "__main__":
    recipe = llama31_8b.continual_pretrain()
    cloud = skypilot(
        "H100",
        gpus_per_node=8,
        container_image="docker:nvcr.io/nvidia/nemo:25.07",
        mounts=["checkpoints:/nemo_run/code/checkpoints", "ds:/nemo_run/code/ds"],
        setup=["pip install nemo_cpt"],
    )
    run.run(recipe, executor=cloud)
