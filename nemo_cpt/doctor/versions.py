"""Which versions work together: the declared ranges, and what no range can say."""

import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

PYTHONS = ((3, 11), (3, 12))
PROJECT = Path(__file__).parents[2] / "pyproject.toml"  # of a checkout; an installed package has none


@dataclass(frozen=True)
class Package:
    """A package that the library requires.

    Attributes:
        name: the distribution's.
        works: versions that work, as pip writes them; empty for any.
        otherwise: what happens with others.
        optional: whether runs without a GPU do without it.
        extras: what to install with it, as pip writes it ("[pytorch]").
    """

    name: str
    works: str
    otherwise: str = ""
    optional: bool = False
    extras: str = ""

    @property
    def cure(self) -> str:
        """The command that installs a version that works."""
        return f"pip install '{self.name}{self.extras}{self.works}'"


STACK = (
    "torch",
    "transformer_engine",
    "megatron-core",
    "nemo_toolkit",
    "nemo_run",
    "lightning",
    "transformers",
    "huggingface_hub",
    "numpy",  # Megatron Core asks for 1, and misses one name in 2: training/patches.py gives it
)
"""Each has a line of its own in the report."""

OTHERS = (
    "pyarrow",
    "pandas",
    "zarr",
    "sentencepiece",
    "matplotlib",
    "orjson",
    "zstandard",
    "isal",
    "rensa",
    "xxhash",
    "fastokens",
    "openai",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "prompt_toolkit",
)
"""For corpora, plots, chat, serving and old checkpoints: a training ran on the GPU without them, or with later ones.

What is required and neither here nor in STACK is imported by every run or by the command line; no run goes without.
"""

OTHERWISE = {
    "transformer_engine": "recipes for GPUs use its layers",
    "megatron-core": "0.16 dropped dist_checkpointing.strategies.tensorstore (NeMo uses it)",
    "nemo_toolkit": "3.0 has no nemo.collections.llm",
    "nemo_run": "the executors here build on its inner parts",
    "lightning": "NeMo 2.7 pins it",
    "transformers": "NeMo 2.7 was written for 4",
    "huggingface_hub": "transformers 4 refuses 1.0",
    "leptonai": "`import nemo_run` fails with later ones",
    "nvidia-resiliency-ext": "NeMoLogger(ckpt=...) fails with later ones",
    "sentencepiece": "it wants protobuf 7, the rest of the stack has 5",
}
"""What happens outside the declared range."""


def required() -> dict[str, Package]:
    """Return what the library requires on this platform, with its extra for GPUs; empty where nothing declares it."""
    from packaging.requirements import Requirement

    found = {}
    for requirement in map(Requirement, _declared()):
        name, marker = requirement.name, requirement.marker
        optional = marker is not None and not marker.evaluate({"extra": ""})
        # Extras other than "gpu" are no part of a training.
        if marker is None or not optional or marker.evaluate({"extra": "gpu"}):
            # Metadata's own order is alphabetical: "<3,>=2".
            works = ",".join(sorted(map(str, requirement.specifier), key=lambda bound: bound.startswith("<")))
            extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            found[name] = Package(name, works, OTHERWISE.get(name, ""), optional, extras)
    return found


def _declared() -> list[str]:
    """The checkout's requirements: an editable installation's metadata stay those of the day it was made."""
    try:
        project = tomllib.loads(PROJECT.read_text())["project"]
        for_gpus = [f"{each}; extra == 'gpu'" for each in project["optional-dependencies"]["gpu"]]
        return [*project["dependencies"], *for_gpus]
    except FileNotFoundError:
        pass
    try:
        return requires("nemo_cpt") or []
    except PackageNotFoundError:  # its files alone are on the path
        return []


_COMMON = {
    "megatron-core": "0.15.3",
    "nemo_toolkit": "2.7.3",
    "nemo_run": "0.11.1",
    "lightning": "2.4.0",
    "transformers": "4.57.6",
    "huggingface_hub": "0.36.2",
}
MEASURED = {
    "CPU": {**_COMMON, "torch": "2.13.0", "numpy": "1.26.4"},
    "GPU": {**_COMMON, "torch": "2.11.0", "transformer_engine": "2.11.0", "numpy": "2.5"},
}
"""Combinations that the project's tests and figures come from; "2.5" stands for any 2.5.x."""

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""The driver branch that a CUDA major version needs at least (NVIDIA, "CUDA Compatibility", minor version table)."""

SHM_GIB = 16
"""What NCCL and data loaders of a node's ranks are given in NVIDIA's containers' documentation and in our executors."""
