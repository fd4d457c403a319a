"""Patches of NeMo 2.7's DoRA where a layer is shared by several GPUs. `patches.apply` calls them."""

from collections.abc import Callable
from typing import Any

import torch

from nemo_cpt.training.patching import replace


def take_dora_norms_of_whole_rows() -> None:
    """Take the norm of a weight's row over all tensor-parallel ranks that hold a part of it.

    `DoRALinear._get_weight_norm` (nemo_toolkit 2.7.3, `collections/llm/peft/dora.py`) takes each rank's part for the
    row of `linear_proj` and `linear_fc2`, which are cut along their inputs. Every rank then begins with magnitudes of
    its own and scales the same sum by another factor: the ranks' hidden states, which have to be equal, part company,
    and a checkpoint holds the first rank's magnitudes alone.
    """
    from nemo.collections.llm.peft import dora

    replace(dora.DoRALinear, "_get_weight_norm", lambda original: _norms_of_whole_rows)
    replace(dora.ParallelLinearDoRAAdapter, "init_weight_magnitude", _with_parallel_attributes)


@torch.no_grad()
def _norms_of_whole_rows(self: Any) -> torch.Tensor:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    into, out = self.adapter.linear_in.weight, self.adapter.linear_out.weight
    # Row-parallel layers (linear_proj, linear_fc2) are cut along the inputs, that is within each row of the weight.
    rows_are_cut = self.adapter.input_is_parallel
    if rows_are_cut:
        out = gather_from_tensor_model_parallel_region(out.T).T
    else:
        into = gather_from_tensor_model_parallel_region(into.T).T
    weight = self.to_wrap.weight + self.scaling * out @ into
    norms = torch.linalg.norm(weight, dim=1, dtype=torch.float32)
    if rows_are_cut:
        # Squares add up over a row's parts, norms do not.
        squares = norms.square()
        torch.distributed.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
        norms = squares.sqrt()
    return norms.to(weight.dtype)


def _with_parallel_attributes(init: Callable[[Any, torch.Tensor], None]) -> Callable[[Any, torch.Tensor], None]:
    """Tell Megatron which magnitudes are cut among the ranks, and which get a part of their gradient on each."""
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

    def init_weight_magnitude(self: Any, value: torch.Tensor) -> None:
        init(self, value)
        if self.input_is_parallel:
            # Megatron sums such gradients over the ranks: with sequence parallelism each has seen its part of the
            # sequence.
            self.weight_magnitude.sequence_parallel = self.config.sequence_parallel
        else:
            set_tensor_model_parallel_attributes(self.weight_magnitude, True, 0, 1)

    return init_weight_magnitude


def save_dora_magnitudes_like_their_rows() -> None:
    """Save the magnitudes of `linear_fc1` in the order of its rows: all of the gate, then all of the up projection.

    `ParallelLinearDoRAAdapter.sharded_state_dict` (nemo_toolkit 2.7.3, `collections/llm/peft/dora.py`) leaves them in
    the order of the ranks, each with its part of both. Megatron saves the weight, and NeMo `linear_out`, by halves: a
    run that is resumed at another tensor-parallel size scales rows by other rows' magnitudes.
    """
    from nemo.collections.llm.peft import dora

    replace(dora.ParallelLinearDoRAAdapter, "sharded_state_dict", _by_halves)


def _by_halves(sharded: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    def sharded_state_dict(self: Any, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        tensors, key = sharded(self, prefix, sharded_offsets, metadata), f"{prefix}weight_magnitude"
        if "linear_fc1" in self.base_linear_name:
            # The same factory that Megatron uses for the weight, so that rows and magnitudes are cut alike.
            tensors[key] = apply_swiglu_sharded_factory(tensors[key], sharded_offsets)
        return tensors

    return sharded_state_dict
