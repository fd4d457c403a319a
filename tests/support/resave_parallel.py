"""Load an imported checkpoint into Megatron's model at TP 2 x PP 2, four gloo processes, and save it from there.

Run by nemo_jobs.py.
"""

from pathlib import Path
from typing import Any

TENSOR, PIPELINE, PADDED_VOCAB = 2, 2, 384


def resave(rank: int, source: Path, dest: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nemo_cpt.cpu_stack import cpu_stack

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(dest / "store"), TENSOR * PIPELINE)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=TENSOR * PIPELINE, store=store)
    with cpu_stack():
        parallel_state.initialize_model_parallel(TENSOR, PIPELINE)
        model_parallel_cuda_manual_seed(rank)
        model = build(source)
        content = dist_checkpointing.load_content_metadata(str(source / "weights"))
        sharded = model.sharded_state_dict(prefix="module.", metadata=content)
        loaded = dist_checkpointing.load({"model": sharded}, str(source / "weights"))["model"]
        model.load_state_dict({name.removeprefix("module."): value for name, value in loaded.items()})
        sharded = model.sharded_state_dict(prefix="module.", metadata=content)
        dist_checkpointing.save(sharded, str(dest / "weights"), content_metadata=content)
    torch.distributed.barrier()


def build(source: Path) -> Any:
    import fiddle as fdl
    import torch
    from nemo.collections.llm.gpt.model.base import local_layer_spec
    from nemo.lightning import io

    from nemo_cpt.cpu_stack import UNFUSED

    description = io.load_context(source / "context", subpath="model.config", build=False)
    parallel = {
        "tensor_model_parallel_size": TENSOR,
        "pipeline_model_parallel_size": PIPELINE,
        "pipeline_dtype": torch.bfloat16,
    }
    for name, value in {**UNFUSED, **parallel, "vocab_size": PADDED_VOCAB}.items():
        setattr(description, name, value)
    description.transformer_layer_spec = local_layer_spec
    return fdl.build(description).configure_model(tokenizer=None).bfloat16()
