"""NeMo's own model on the CPU, as a checkpoint's context describes it and with its weights, in fp32.

Neither NeMo's reader of contexts nor Megatron's of checkpoints is used: both call what the files name. Here the class
is one of NeMo's own by name, its numbers are read as numbers, and the weights by `DistributedReader`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.arrays import cast
from nemo_cpt.checkpoint.distributed_reader import DistributedReader
from nemo_cpt.checkpoint.model_config import FIELDS, constants_of_nemo, is_known_class, read_model_config
from nemo_cpt.checkpoint.nemo_weights import locate
from nemo_cpt.errors import CptError

if TYPE_CHECKING:
    import numpy as np
    import torch


def nemo_logits(nemo: str | Path, prompts: list[list[int]], rounded_to: str | None = None) -> list[torch.Tensor]:
    """The logits that NeMo's model gives, in fp32 on the CPU with Megatron's local layers.

    Args:
        nemo: a NeMo checkpoint; its context says which model.
        prompts: token ids, one list a prompt.
        rounded_to: a dtype that the weights are cast to first, as an export in it has them; None for as they are.

    Returns:
        For each prompt a [tokens, vocabulary] fp32 tensor; the vocabulary may be padded.

    Raises:
        CptError: the context names another class than NeMo's own of Llama, Mistral, Qwen or GPT, or weights are
            missing.
    """
    import torch

    from nemo_cpt.cpu_stack import cpu_stack

    with cpu_stack(), one_process(), torch.no_grad(), _warnings_alone():
        model = _build(Path(nemo), max(map(len, prompts)), rounded_to)
        return [_forward(model, torch.tensor([prompt])) for prompt in prompts]


def _forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    import torch

    length = tokens.shape[1]
    # Megatron's plain attention builds no causal mask itself: True is hidden.
    masked = torch.ones(length, length).tril().logical_not()[None, None]
    return model(tokens, torch.arange(length)[None], masked)[0].float()


def _build(nemo: Path, length: int, rounded_to: str | None) -> Any:
    import torch
    from megatron.core.transformer.utils import openai_gelu
    from nemo.collections.llm.gpt.model.base import local_layer_spec

    from nemo_cpt.cpu_stack import UNFUSED

    recorded = read_model_config(nemo)
    fields = {name: recorded[name] for name in FIELDS if name in recorded}
    if fields.get("window_size"):
        fields["window_size"] = tuple(fields["window_size"])  # Megatron hashes it
    reader = DistributedReader(nemo / "weights")
    stated = constants_of_nemo(recorded)
    # The one function that a class of NeMo's does not say itself.
    if stated.get("activation_func") == openai_gelu.__name__:
        fields["activation_func"] = openai_gelu
    if "max_position_embeddings" not in stated:  # which learnt positions have rows for
        fields["seq_length"] = max(length, 8)
    config = _config_class(recorded, nemo)(
        **fields,
        **UNFUSED,
        transformer_layer_spec=local_layer_spec,
        vocab_size=reader.shapes[layout.PREFIX + layout.EMBEDDING][0],
        params_dtype=torch.float32,
        # Every parameter is replaced below: drawing random ones would take most of the time.
        perform_initialization=False,
    )
    model = config.configure_model(tokenizer=None, pre_process=True, post_process=True).float().eval()
    for name, parameter in model.named_parameters():
        values = _read(reader, name)
        parameter.data = torch.from_numpy((cast(values, name, rounded_to) if rounded_to else values).astype("float32"))
    return model


def _config_class(recorded: Mapping[str, Any], nemo: Path) -> type:
    from nemo.collections.llm.gpt.model.base import GPTConfig

    module, _, name = str(recorded.get("_target_")).rpartition(".")
    found = getattr(import_module(module), name, None) if is_known_class(f"{module}.{name}") else None
    if not isinstance(found, type) or not issubclass(found, GPTConfig):
        raise CptError(
            f"{nemo}/context names the model config {module}.{name}; logits are compared of NeMo's own Llama, Mistral, "
            "Qwen and GPT models. Compare the weights alone (--no-logits)."
        )
    return found


def _read(reader: DistributedReader, parameter: str) -> np.ndarray:
    """A parameter of the model with the local layers, which names the norms as modules of their own."""
    prefix, layers, rest = parameter.partition(layout.LAYERS)
    number, _, name = rest.partition(".")
    name = name.replace("input_layernorm.", f"{layout.QKV}.layer_norm_").replace(
        "pre_mlp_layernorm.", f"{layout.FC1}.layer_norm_"
    )
    key, layer = (f"{prefix}{layers}{name}", int(number)) if layers else (parameter, None)
    full, layer = locate(reader, layout.PREFIX + key, layer)
    if full not in reader.shapes:
        raise CptError(f"{reader.folder} lacks {full}: it is not a checkpoint of the model in its context.")
    return reader.read(full, layer)


@contextlib.contextmanager
def _warnings_alone() -> Iterator[None]:
    """Keep what NeMo tells of its model, such as its rotary scaling, from stdout, where a report goes."""
    from nemo.utils import logging

    before = logging.getEffectiveLevel()
    logging.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.setLevel(before)


@contextlib.contextmanager
def one_process(backend: str = "gloo") -> Iterator[None]:
    """Megatron's process groups for one process, torn down again at the end.

    Raises:
        CptError: there are process groups already: they are somebody's.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if dist.is_initialized():
        raise CptError("A process group is open already; compare checkpoints in a process of its own.")
    # A store in memory: no port, which another process could have.
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
