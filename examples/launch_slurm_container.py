"""Llama-3.1-8B over Slurm from another machine, over SSH, in a container (the cluster needs Pyxis).

The image is the Dockerfile's, as a file: enroot import -o nemo-cpt.sqsh dockerd://localhost/nemo-cpt

python examples/launch_slurm_container.py
"""

import nemo_run as run

from nemo_cpt.corpus import Blend
from nemo_cpt.executors import slurm, ssh
from nemo_cpt.recipes import llama31_8b

if __name__ == "__main__":
    recipe = llama31_8b.continual_pretrain(
        base="/data/checkpoints/Llama-3.1-8B",
        data=Blend(train={"/data/ds/ja": 0.75, "/data/ds/en": 0.25}, validation={"ja": "/data/ds/ja_validation"}),
        directory="/data/results",
        gpus_per_node=8,
    )
    cluster = slurm(
        "llm",
        "gpu",
        gpus_per_node=8,
        time="6:00:00",
        container_image="/lustre/me/nemo-cpt.sqsh",
        mounts=["/lustre/me/data:/data"],
        setup=["export NCCL_IB_TIMEOUT=22"],
        cpus_per_task=8,
        mem="0",
        exclusive=True,
        tunnel=ssh("login.cluster.example", "me", "/lustre/me/jobs"),
    )
    run.run(recipe, executor=cluster, detach=True)
