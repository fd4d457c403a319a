"""NeMo's own model on the CPU, built from a checkpoint's context and filled by Megatron's own loader, in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_cpt.checkpoint.layout import PREFIX
from nemo_cpt.errors import CptError

if TYPE_CHECKING:
    import torch


def nemo_logits(nemo: str | Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The logits that NeMo's model gives, in fp32 on the CPU with Megatron's local layers.

    Args:
        nemo: a NeMo checkpoint; its context says which model, Megatron's loader reads its weights.
        prompts: token ids, one list a prompt.

    Returns:
        For each prompt a [tokens, vocabulary] fp32 tensor; the vocabulary may be padded.
    """
    import torch

    from nemo_cpt.training.cpu import cpu_stack

    with cpu_stack(), one_process(), torch.no_grad():
        model = _build(Path(nemo), max(map(len, prompts)))
        return [_forward(model, torch.tensor([prompt])) for prompt in prompts]


def _forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    import torch

    length = tokens.shape[1]
    masked = torch.ones(length, length).tril().logical_not()[None, None]
    return model(tokens, torch.arange(length)[None], masked)[0].float()


def _build(nemo: Path, length: int) -> Any:
    import fiddle as fdl
    import torch
    from nemo.collections.llm.gpt.model.base import local_layer_spec
    from nemo.lightning import io

    from nemo_cpt.training.cpu import UNFUSED

    description = io.load_context(nemo / "context", subpath="model.config", build=False)
    parallel = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    overrides = {
        **UNFUSED,
        **dict.fromkeys(parallel, 1),
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": False,
        "transformer_layer_spec": local_layer_spec,
        "seq_length": max(length, 8),
        "vocab_size": _padded_vocab(nemo),
        "params_dtype": torch.float32,
        "bf16": False,
        "fp16": False,
        "fp8": None,
        "recompute_granularity": None,
        "perform_initialization": False,
    }
    for name, value in overrides.items():
        setattr(description, name, value)
    model = fdl.build(description).configure_model(tokenizer=None, pre_process=True, post_process=True).float().eval()
    _load(model, nemo / "weights")
    return model


def _padded_vocab(nemo: Path) -> int:
    from nemo_cpt.checkpoint.distributed_reader import DistributedReader
    from nemo_cpt.checkpoint.layout import EMBEDDING

    return DistributedReader(nemo / "weights").shapes[PREFIX + EMBEDDING][0]


def _load(model: Any, weights: Path) -> None:
    from megatron.core import dist_checkpointing

    content = dist_checkpointing.load_content_metadata(str(weights))
    sharded = model.sharded_state_dict(prefix=PREFIX, metadata=content)
    loaded = dist_checkpointing.load({"model": sharded}, str(weights))["model"]
    state = {name.removeprefix(PREFIX): value for name, value in loaded.items()}
    problems = model.load_state_dict(state, strict=False)
    missing = [name for name in problems.missing_keys if not name.endswith("_extra_state")]
    if missing:
        raise CptError(f"{weights} lacks {', '.join(missing)}: it is not a checkpoint of the model in its context.")


@contextlib.contextmanager
def one_process(backend: str = "gloo") -> Iterator[None]:
    """Megatron's process groups for one process; torn down again unless they were there before."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if dist.is_initialized():
        raise CptError("A process group is open already; compare checkpoints in a process of its own.")
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
