"""A model that knows nothing yet: a NeMo checkpoint of random weights, for a training from scratch to start from."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from nemo_cpt.arguments import checked
from nemo_cpt.checkpoint import layout
from nemo_cpt.checkpoint.architecture import Architecture, parse_config
from nemo_cpt.checkpoint.arrays import BLOCK_BYTES, DTYPES
from nemo_cpt.checkpoint.context import HF_FOLDER
from nemo_cpt.checkpoint.folders import copy_small_files, require_tokenizer, small_files
from nemo_cpt.checkpoint.nemo_writer import Tensors, write_nemo
from nemo_cpt.checkpoint.provenance import Provenance, write_provenance
from nemo_cpt.checkpoint.tokenizer_ids import count_token_ids
from nemo_cpt.corpus.atomic_folders import new_folder
from nemo_cpt.errors import CptError, near_paths
from nemo_cpt.made import Making, stamps
from nemo_cpt.records import AsDict, restored

# GPT-3's sizes (arXiv 2005.14165, table 2.1; its 1.3B with 16 heads of 128), with Llama's layers: a gated MLP two
# thirds as wide, to a multiple of 256 (arXiv 2302.13971). `tiny` is for a CPU.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4},
    "124M": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12},
    "350M": {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16},
    "1.3B": {"num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16},
}
SHAPES = {"llama": 2048, "gpt2": 1024}  # with the longest sequence where none is given
_STD = 0.02  # GPT-2's; what writes into the residual stream has it divided by the root of the writings' number
_RESIDUAL = ("o_proj.weight", "down_proj.weight", "c_proj.weight")


@dataclass(frozen=True)
class UntrainedReport(AsDict):
    """What was made.

    Attributes:
        dest: the NeMo checkpoint.
        params: the size's name.
        shape: one of `SHAPES`.
        parameters: values in all.
        vocabulary_size: rows of the embedding, which is the output layer too.
        seed: of the weights.
        bytes_written: of the weights.
        seconds: wall time.
        status: `written`, or `unchanged` where the same was there already.
    """

    dest: str
    params: str
    shape: str
    parameters: int
    vocabulary_size: int
    seed: int
    bytes_written: int
    seconds: float
    status: str = "written"


@checked
def make_untrained(
    dest: str | Path,
    tokenizer: str | Path,
    params: str = "124M",
    *,
    shape: str = "llama",
    max_position_embeddings: int | None = None,
    seed: int = 1234,
    progress: Callable[[int, int], None] | None = None,
) -> UntrainedReport:
    """Write a model of random weights, Llama- or GPT-2-shaped, with a tokenizer's rows.

    Weights are normal with a deviation of 0.02, those of the projections back into the residual stream of 0.02 /
    sqrt(2 x layers) (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; Megatron does the
    same); norms are ones, biases zeros. The output layer is the embedding, rope's base 10,000. Dropout is 0 in either
    shape. The checkpoint is like an imported one: planned, trained from, resumed and exported by the same commands.

    Args:
        dest: the checkpoint's folder; one that these very arguments made is left as it is.
        tokenizer: folder of the tokenizer, as `nemo-cpt tokenizer train` makes it.
        params: one of `SIZES`.
        shape: "llama", or "gpt2": LayerNorm, biases, an MLP four times as wide without a gate, learnt positions.
        max_position_embeddings: the longest sequence; of "gpt2" rows of its own. By default what `SHAPES` says.
        seed: of the weights.
        progress: called with (bytes done, bytes in all).

    Raises:
        CptError: there is no such size, shape or tokenizer, the tokenizer names no end of a text, the seed or the
            longest sequence is out of range, `dest` holds something else. Nothing is left at `dest` then.
    """
    start, tokenizer = time.monotonic(), Path(tokenizer)
    check_options(params, shape, max_position_embeddings, seed)
    positions = SHAPES[shape] if max_position_embeddings is None else max_position_embeddings
    config = _config(params, shape, positions, tokenizer)
    options = {"params": params, "shape": shape, "max_position_embeddings": positions, "seed": seed}
    making = Making("init", {"tokenizer": stamps(small_files(tokenizer))}, options)
    if found := making.done(Path(dest)):
        return restored(UntrainedReport, found, dest=str(dest), status="unchanged")
    arch = parse_config(config, "the model's config.json")
    weights = _Weights(arch, seed)
    size = sum(map(weights.nbytes, weights.shapes))
    # There is no file that they are read from: messages name the place where they go.
    tensors = Tensors(weights.read, weights.blocks, path=lambda name: Path(dest), nbytes=weights.nbytes)
    with new_folder(dest, size) as folder:
        _write_small_files(folder / HF_FOLDER, tokenizer, config)
        write_nemo(folder, tensors, arch, progress)
        report = UntrainedReport(
            dest=str(dest),
            params=params,
            shape=shape,
            parameters=sum(map(prod, weights.shapes.values())),
            vocabulary_size=arch.vocab_size,
            seed=seed,
            bytes_written=size,
            seconds=round(time.monotonic() - start, 3),
        )
        making.note(folder, report.as_dict())
    return report


def check_options(params: str, shape: str, max_position_embeddings: int | None, seed: int) -> None:
    """Check the options of `make_untrained` that need no tokenizer.

    Raises:
        CptError: there is no such size or shape, or a number is out of range.
    """
    if params not in SIZES:
        raise CptError(f"params is {params!r}; it can be {', '.join(SIZES)}")
    if shape not in SHAPES:
        raise CptError(f"shape is {shape!r}; it can be {', '.join(SHAPES)}")
    positions = SHAPES[shape] if max_position_embeddings is None else max_position_embeddings
    if seed < 0 or positions < 1:
        raise CptError(f"seed is {seed} and max_position_embeddings {positions}: give 0 or more, and 1 or more")


def _config(params: str, shape: str, positions: int, tokenizer: Path) -> dict[str, Any]:
    """The model's config.json: the shape's fields, and the tokenizer's size and special ids."""
    from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer

    if not tokenizer.is_dir():
        raise CptError(
            f"There is no tokenizer folder {tokenizer}{near_paths(tokenizer)}: nemo-cpt tokenizer train makes one."
        )
    require_tokenizer(tokenizer)
    described = load_tokenizer(str(tokenizer))
    if described.eos is None:
        raise CptError(f"the tokenizer {tokenizer} names no eos_token: the model could not learn where a text ends")
    # Ids may have gaps, and a config may count more tokens than there are: a row for each that can come.
    rows = max(described.highest + 1, count_token_ids(tokenizer) or 0)
    special = {f"{kind}_token_id": token[1] for kind in ("bos", "eos", "pad") if (token := getattr(described, kind))}
    return shape_fields(params, shape, positions, rows) | special


def shape_fields(params: str, shape: str, max_position_embeddings: int | None, vocabulary_size: int) -> dict[str, Any]:
    """What a model's config.json says of its shape, before there is a tokenizer; the arguments of `make_untrained`.

    Raises:
        CptError: there is no such size or shape, or the longest sequence is out of range.
    """
    check_options(params, shape, max_position_embeddings, seed=0)
    positions = SHAPES[shape] if max_position_embeddings is None else max_position_embeddings
    return {
        **(_gpt2 if shape == "gpt2" else _llama)(SIZES[params], positions),
        "vocab_size": vocabulary_size,
        "initializer_range": _STD,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def _write_small_files(folder: Path, tokenizer: Path, config: Mapping[str, Any]) -> None:
    """The Hugging Face side of the checkpoint: what an export will copy."""
    copy_small_files(tokenizer, folder, in_checkpoint=True)
    special = {name: value for name, value in config.items() if name.endswith("_token_id")}
    for name, content in (("config.json", config), ("generation_config.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_provenance(folder, Provenance(from_scratch=True))


def _llama(size: Mapping[str, int], positions: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **size,
        "num_key_value_heads": size["num_attention_heads"],
        "max_position_embeddings": positions,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }


def _gpt2(size: Mapping[str, int], positions: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": size["num_hidden_layers"],
        "n_embd": size["hidden_size"],
        "n_head": size["num_attention_heads"],
        "n_inner": None,  # four times the hidden size: without a gate, about as many weights as Llama's MLP
        "n_positions": positions,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        # Said, since transformers takes 0.1 where a file is silent.
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }


class _Weights:
    """Random tensors by name: the same for a seed in whatever order they are asked for."""

    def __init__(self, arch: Architecture, seed: int) -> None:
        self.shapes = {slot.name: slot.shape for slot in layout.slots(arch)}
        self._seed, self._dtype = seed, DTYPES[str(arch.dtype)]
        self._residual_std = _STD / (2 * arch.num_hidden_layers) ** 0.5

    def nbytes(self, name: str) -> int:
        return prod(self.shapes[name]) * self._dtype.itemsize

    def read(self, name: str) -> np.ndarray:
        return np.concatenate(list(self.blocks(name)))

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        shape = self.shapes[name]
        if len(shape) == 1:  # a norm's or a bias
            yield (np.zeros if name.endswith(".bias") else np.ones)(shape, self._dtype)
            return
        # By the tensor's name, and not by hash(), which is another in each process.
        chance = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        std = self._residual_std if name.endswith(_RESIDUAL) else _STD
        # In fp32, in which the block is drawn before it is rounded.
        step = max(1, BLOCK_BYTES // (4 * shape[1]))
        for row in range(0, shape[0], step):
            values = chance.standard_normal((min(step, shape[0] - row), shape[1]), np.float32)
            yield (values * np.float32(std)).astype(self._dtype)
