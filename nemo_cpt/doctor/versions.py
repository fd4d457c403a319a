"""Which versions work together: the table that the doctor compares an environment with. Data only."""

from dataclasses import dataclass

PYTHONS = ((3, 11), (3, 12))


@dataclass(frozen=True)
class Package:
    """A package of the stack.

    Attributes:
        name: the distribution's.
        works: versions that work, as pip writes them.
        otherwise: what happens with others.
        optional: whether runs without a GPU do without it.
        install: what to install, where that is not the name with `works`.
    """

    name: str
    works: str
    otherwise: str = ""
    optional: bool = False
    install: str = ""

    @property
    def cure(self) -> str:
        """The command that installs a version that works."""
        return f"pip install '{self.install or self.name}{self.works}'"


STACK = (
    Package("torch", ">=2.6"),
    Package(
        "transformer_engine",
        ">=2.11,<3",
        "recipes for GPUs use its layers",
        optional=True,
        install="transformer_engine[pytorch]",
    ),
    Package("megatron-core", ">=0.15.3,<0.16", "0.16 dropped dist_checkpointing.strategies.tensorstore (NeMo uses it)"),
    Package("nemo_toolkit", ">=2.7.3,<3", "3.0 has no nemo.collections.llm"),
    Package("nemo_run", ">=0.11.1,<0.12", "the executors here build on its inner parts"),
    Package("lightning", ">=2.4,<2.5", "NeMo 2.7 pins it"),
    Package("transformers", ">=4.57,<5", "NeMo 2.7 was written for 4"),
    Package("huggingface_hub", ">=0.36,<1", "transformers 4 refuses 1.0"),
    Package("numpy", ">=1.26"),  # Megatron Core asks for 1, and misses one name in 2: training/patches.py gives it
)
"""Each has a line of its own in the report."""

IMPORTED = (
    Package("leptonai", "<0.28", "`import nemo_run` fails with later ones"),
    Package("nvidia-resiliency-ext", "<0.5", "NeMoLogger(ckpt=...) fails with later ones"),
    *(Package(name, ">=0") for name in ("einops", "datasets", "tiktoken", "tensorstore", "nvidia-modelopt")),
    *(Package(name, ">=0") for name in ("defusedxml", "packaging")),
    Package("safetensors", ">=0.5"),
    Package("ml_dtypes", ">=0.5"),
    Package("tokenizers", ">=0.22"),
    Package("requests", ">=2.32"),
    Package("pyyaml", ">=6"),
    Package("rich", ">=13"),
    Package("typer", ">=0.15"),
)
"""Imported by every run or by the command line, some of them undeclared by NeMo; no run goes without."""

OTHERS = (
    Package("pyarrow", "<22"),
    Package("pandas", "<3"),
    Package("zarr", "<3"),
    Package("sentencepiece", "<0.2.3", "it wants protobuf 7, the rest of the stack has 5"),
    Package("matplotlib", ">=3.9"),
    Package("orjson", ">=3.10"),
    Package("zstandard", ">=0.23"),
    Package("isal", ">=1.7"),
    Package("rensa", ">=0.5,<0.6"),
    Package("xxhash", ">=3.5"),
    Package("fastokens", ">=0.3.5,<0.4"),
    Package("openai", ">=1.60,<3"),
    Package("fastapi", ">=0.115"),
    Package("uvicorn", ">=0.30"),
    Package("prometheus_client", ">=0.20"),
    Package("prompt_toolkit", ">=3.0.40"),
)
"""For corpora, plots, chat, serving and old checkpoints: a training ran on the GPU without them, or with later ones."""

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
