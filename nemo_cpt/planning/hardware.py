"""What the planner knows of GPUs: memory that a process can use, ceilings of arithmetic and of bandwidth."""

import difflib
import math
from dataclasses import dataclass

from nemo_cpt.errors import CptError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU's ceilings, from the vendor's data sheets.

    Attributes:
        name: as `nvidia-smi` has it, without "NVIDIA".
        memory_gib: what a process finds on an empty card, in GiB: less than the card is sold with.
        bf16_tflops: dense bf16 products, in 1e12 operations a second.
        fp8: whether it has fp8 products.
        bandwidth_tb_s: device memory, in 1e12 bytes a second.
        link_gb_s: to the other GPUs of the node, each way, in 1e9 bytes a second (NVLink, else PCIe).
        measured: whether the planner's speeds were measured on it.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    bandwidth_tb_s: float
    fp8: bool = True
    link_gb_s: float = 25.0
    measured: bool = False


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="H200", memory_gib=139.8, bf16_tflops=989, bandwidth_tb_s=4.8, link_gb_s=450, measured=True),
        Gpu(name="H100", memory_gib=79.1, bf16_tflops=989, bandwidth_tb_s=3.35, link_gb_s=450),
        Gpu(name="A100-80GB", memory_gib=79.1, bf16_tflops=312, bandwidth_tb_s=2.0, fp8=False, link_gb_s=300),
        Gpu(name="A100-40GB", memory_gib=39.4, bf16_tflops=312, bandwidth_tb_s=1.55, fp8=False, link_gb_s=300),
        Gpu(name="RTX 6000 Ada", memory_gib=47.4, bf16_tflops=364, bandwidth_tb_s=0.96),
        Gpu(name="L40S", memory_gib=44.4, bf16_tflops=362, bandwidth_tb_s=0.864),
        Gpu(name="RTX A6000", memory_gib=47.4, bf16_tflops=155, bandwidth_tb_s=0.768, fp8=False),
        Gpu(name="RTX 4090", memory_gib=23.5, bf16_tflops=165, bandwidth_tb_s=1.01),
    )
}
DEFAULT = GPUS["H200"]
USABLE_GIB = {24: 23.5, 40: 39.4, 48: 47.4, 80: 79.1, 141: 139.8}
"""What a process finds on an empty card, by the memory that it is sold with (the cards above)."""


def usable_gib(gpu_memory_gib: float) -> float:
    """Return the memory that a process finds on a card; of a rare size, 98 % of it.

    Args:
        gpu_memory_gib: as the card is sold (48, 80, 141), or its total as nvidia-smi has it (47.99, 79.6, 140.4).

    Raises:
        CptError: the size is none.
    """
    if not 0 < gpu_memory_gib < math.inf:
        raise CptError(f"a GPU's memory of {gpu_memory_gib:g} GiB: give the size of the card, such as 48 or 80")
    # People give what is on the box, scripts what nvidia-smi prints: both mean the same card.
    sold = min(USABLE_GIB, key=lambda size: abs(size - gpu_memory_gib))
    return USABLE_GIB[sold] if abs(sold - gpu_memory_gib) < 0.7 else 0.98 * gpu_memory_gib


def of_size(gpu_memory_gib: float) -> Gpu | None:
    """Return the first GPU of a memory, as sold or as nvidia-smi has it; None if the planner knows none of that size.

    Raises:
        CptError: the size is none.
    """
    usable = usable_gib(gpu_memory_gib)
    return next((each for each in GPUS.values() if each.memory_gib == usable), None)


def of_device(name: str) -> Gpu | None:
    """Return the GPU that a driver's name is of, such as "NVIDIA H100 80GB HBM3"; None if the planner knows it not."""
    # Whole words of ours within the driver's: "NVIDIA A100-SXM4-80GB" is an A100-80GB, and an L40 is no L40S.
    words = set(name.replace("-", " ").split())
    return next((each for each in GPUS.values() if set(each.name.replace("-", " ").split()) <= words), None)


def gpu(name: str | None) -> Gpu:
    """Return a GPU by name, the H200, on which everything was measured, if none is given.

    Raises:
        CptError: there is none of that name; the message lists those that there are.
    """
    if name is None:
        return DEFAULT
    # As nvidia-smi, a shop or a person writes it.
    wanted = name.lower().replace("nvidia", "").replace("-", " ").strip()
    for known in GPUS.values():
        if known.name.lower().replace("-", " ") == wanted:
            return known
    near = difflib.get_close_matches(name, GPUS, n=2)
    meant = f" (near: {', '.join(near)})" if near else ""
    raise CptError(f"the planner knows no GPU {name!r}{meant}: {', '.join(GPUS)}")
