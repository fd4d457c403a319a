"""Llama-3.1-8B on two pods of Kubernetes, through Kubeflow's Training Operator (pip install kubernetes).

docker build --tag registry.example/nemo-cpt:1 . && docker push registry.example/nemo-cpt:1
kubectl create secret generic tokens --from-literal=HF_TOKEN=...
python examples/launch_kubernetes.py
"""

import nemo_run as run

from nemo_cpt.corpus import Blend
from nemo_cpt.executors import kubernetes
from nemo_cpt.recipes import llama31_8b

if __name__ == "__main__":
    recipe = llama31_8b.continual_pretrain(
        base="/data/checkpoints/Llama-3.1-8B",
        data=Blend(train={"/data/ds/ja": 0.75, "/data/ds/en": 0.25}, validation={"ja": "/data/ds/ja_validation"}),
        directory="/data/results",
        num_nodes=2,
    )
    cluster = kubernetes(
        "registry.example/nemo-cpt:1", 8, workdir_pvc="jobs", nodes=2, claims={"/data": "corpus"}, secret="tokens"
    )
    run.run(recipe, executor=cluster)
