"""LoRA on one GPU in NVIDIA's container on this machine.

python examples/launch_docker.py
"""

import nemo_run as run

from nemo_cpt.executors import docker
from nemo_cpt.recipes import llama31_8b

if __name__ == "__main__":
    recipe = llama31_8b.continual_pretrain_single_gpu()
    run.run(recipe, executor=docker(image="nvcr.io/nvidia/nemo:25.07", gpus=1))
