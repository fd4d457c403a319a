"""Llama-3.1-8B on a cloud's machine of 8 H100, through SkyPilot (pip install skypilot).

It ships the committed code of this checkout and installs that, in an image built from the Dockerfile, as
docs/launching.md has it.

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
        container_image="docker:registry.example/nemo-cpt:1-root",
        mounts=["checkpoints:/nemo_run/code/checkpoints", "ds:/nemo_run/code/ds"],
    )
    run.run(recipe, executor=cloud)
