"""In which numbers a model in this process computes, known before it is loaded."""

from dataclasses import dataclass
from pathlib import Path

from nemo_cpt.checkpoint.architecture import read_json
from nemo_cpt.errors import CptError


@dataclass(frozen=True)
class Arithmetic:
    """What decides a model's numbers beside its weights.

    Attributes:
        device: its kind: "cpu", "cuda", ...
        precision: of the weights as they are loaded: "float32", "bfloat16", ...
    """

    device: str
    precision: str

    def __str__(self) -> str:
        return f"{self.precision} on {self.device}"


def arithmetic_of(folder: Path, device: str | None = None) -> Arithmetic:
    """What `TransformersEngine` computes a Hugging Face folder in; the device need not be here.

    Raises:
        CptError: PyTorch knows no such device.
    """
    kind = device_kind(device or default_device())
    config = read_json(folder / "config.json")
    stated = config.get("dtype") or config.get("torch_dtype")  # transformers' order where both are given
    return Arithmetic(kind, precision_on(kind) or str(stated or "its weights' type").removeprefix("torch."))


def default_device() -> str:
    """The GPU where there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_kind(device: str) -> str:
    """The kind of a device, such as "cuda" of "cuda:1".

    Raises:
        CptError: PyTorch knows no such device.
    """
    import torch

    try:
        return torch.device(device).type
    except RuntimeError:
        raise CptError(f"device is {device!r}: give cpu, cuda, cuda:1 or another of PyTorch's") from None


def precision_on(kind: str) -> str | None:
    """The precision that models are loaded in on a kind of device; None for config.json's."""
    return "float32" if kind == "cpu" else None  # in bf16 a CPU is several times slower
