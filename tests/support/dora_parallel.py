"""NeMo's DoRA on a model at TP 1 and TP 2: logits, gradients of the magnitudes, and the adapters' checkpoints.

Run by nemo_jobs.py. At TP 1 the adapters are drawn; at TP 2 they are read from that checkpoint, and saved once more.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

RANK = 4  # of the adapters


def forward(rank: int, tensor_parallel: int, patched: bool, base: Path, dest: Path, in_parts: bool = False) -> None:
    """Save in `dest`: the rank's part of the logits, the magnitudes' gradients, and the adapters.

    `in_parts` is sequence parallelism: between the layers each rank has its part of the sequence.
    """
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nemo_cpt.cpu_stack import cpu_stack
    from nemo_cpt.training import dora_patches

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(dest / "store"), tensor_parallel)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=tensor_parallel, store=store)
    with cpu_stack():
        parallel_state.initialize_model_parallel(tensor_parallel)
        model_parallel_cuda_manual_seed(rank)
        if patched:
            dora_patches.take_dora_norms_of_whole_rows()
            dora_patches.save_dora_magnitudes_like_their_rows()
        model = with_dora(build(base, tensor_parallel, in_parts))
        content = dist_checkpointing.load_content_metadata(str(base / "weights"))
        if tensor_parallel == 1:
            draw(model)
        else:
            load(model, adapters(model, content), dest.with_name("tp1"))
        torch.save(run(model), dest / f"rank{rank}.pt")
        dist_checkpointing.save(adapters(model, content), str(dest / "weights"), content_metadata=content)
    torch.distributed.barrier()
    if rank == 0:
        describe(dest, base)


def build(base: Path, tensor_parallel: int, in_parts: bool) -> Any:
    """The model of `base` with its weights, in fp32."""
    import fiddle as fdl
    import torch
    from megatron.core import dist_checkpointing
    from nemo.collections.llm.gpt.model.base import local_layer_spec
    from nemo.lightning import io

    from nemo_cpt.cpu_stack import UNFUSED

    description = io.load_context(base / "context", subpath="model.config", build=False)
    settings = {
        "tensor_model_parallel_size": tensor_parallel,
        "sequence_parallel": in_parts,
        "params_dtype": torch.float32,
        "bf16": False,
    }
    for name, value in {**UNFUSED, **settings}.items():
        setattr(description, name, value)
    description.transformer_layer_spec = local_layer_spec
    with _norms_of_parts():
        model = fdl.build(description).configure_model(tokenizer=None).float()
    content = dist_checkpointing.load_content_metadata(str(base / "weights"))
    load(model, model.sharded_state_dict(prefix="module.", metadata=content), base)
    return model.float()


@contextlib.contextmanager
def _norms_of_parts() -> Iterator[None]:
    """Megatron's plain norm refuses sequence parallelism, as nobody adds up its gradient: here it is frozen."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    make = WrappedTorchNorm.__new__

    def make_for_parts(kind: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        whole = copy.copy(config)
        whole.sequence_parallel = False
        return make(kind, whole, *args, **kwargs)

    with mock.patch.object(WrappedTorchNorm, "__new__", make_for_parts):
        yield


def load(model: Any, sharded: dict[str, Any], checkpoint: Path) -> None:
    """Read the tensors of `sharded`."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load({"model": sharded}, str(checkpoint / "weights"))["model"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in loaded.items()}, strict=False)


def with_dora(model: Any) -> Any:
    """What NeMo's PEFT does to a model: freeze it, then add the adapters."""
    from nemo.collections.llm import fn
    from nemo.collections.llm.peft import DoRA

    model.requires_grad_(False)
    return fn.walk(model, DoRA(dim=RANK).transform)


def draw(model: Any) -> None:
    """Adapters as after some training."""
    import torch

    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("weight_magnitude"):
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif ".adapter." in name:
            torch.nn.init.normal_(parameter, std=0.05)


def adapters(model: Any, content: Any) -> dict[str, Any]:
    """The sharded tensors that NeMo saves of a run."""
    sharded = model.sharded_state_dict(prefix="module.", metadata=content)
    return {name: each for name, each in sharded.items() if ".adapter." in name and "_extra_state" not in name}


def run(model: Any) -> dict[str, Any]:
    """This rank's logits for tokens 5 to 44, and the gradients of the magnitudes that every rank has."""
    import torch

    tokens, masked = torch.arange(5, 45)[None], torch.ones(40, 40).tril().logical_not()[None, None]
    inputs = tokens, torch.arange(40)[None], masked
    with torch.no_grad():
        logits = model.eval()(*inputs)[0]
    model(*inputs, labels=tokens.roll(-1, 1)).sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if name.endswith("weight_magnitude") and ("linear_proj" in name or "linear_fc2" in name):
            if getattr(parameter, "sequence_parallel", False):  # Megatron adds these up at the end of a step
                torch.distributed.all_reduce(parameter.grad)
            found[name] = parameter.grad
    return {"logits": logits, "gradients": found}


def describe(dest: Path, base: Path) -> None:
    """What NeMo writes beside the weights of adapters. DoRA's alpha is its default, which a context does not record."""
    (dest / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(base)}))
    (dest / "context").mkdir()
    (dest / "context" / "io.json").write_text(json.dumps(transform_context("DoRA", {})))


def transform_context(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's io.json that describes its adapters."""
    called = {"type": "pyref", "module": f"nemo.collections.llm.peft.{kind.lower()}", "name": kind}
    transform = {
        "items": [[f"Attr(name='{name}')", {"type": "leaf", "value": value}] for name, value in arguments.items()],
        "metadata": {"type": "ref", "key": "metadata_1"},
        "paths": ["<root>.model.model_transform"],
    }
    return {"objects": {"lora_1": transform, "metadata_1": {"items": [["Attr(name='fn_or_cls')", called]]}}}
