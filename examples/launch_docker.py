"""LoRA on one GPU in a container on this machine, of the image that the Dockerfile builds.

docker build --tag localhost/nemo-cpt .
python examples/launch_docker.py
"""

import nemo_run as run

from nemo_cpt.executors import docker
from nemo_cpt.recipes import llama31_8b

if __name__ == "__main__":
    recipe = llama31_8b.continual_pretrain_single_gpu()
    run.run(recipe, executor=docker(gpus=1))
