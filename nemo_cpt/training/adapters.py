"""Adapters beside an embedding and an output layer that are trained whole, at a learning rate of their own."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections.llm.peft import DoRA, LoRA
from nemo.lightning.pytorch.callbacks.peft import PEFT
from nemo.lightning.pytorch.optim.base import LRSchedulerModule

from nemo_cpt.training.options import check_peft_scheme

# The ends of Megatron's names: in front stand the wrappers' (`module.module.`), which differ by precision and
# parallelism.
WHOLE = ("word_embeddings.weight", "output_layer.weight")


def is_embedding_or_head(name: str, parameter: torch.Tensor | None = None) -> bool:
    """Whether a parameter is the embedding's or the output layer's weight, by its name."""
    return name.endswith(WHOLE)


class _WithEmbeddings:
    """Leaves the embedding and the output layer trainable; checkpoints hold them beside the adapters.

    What a language needs that the base hardly knows, its rarely seen tokens, lies in these two, which adapters on the
    layers do not reach. A merged export takes them from the run; an adapter for `peft` cannot hold them.
    """

    def freeze_model(self, model: torch.nn.Module) -> None:
        """Freeze all but the embedding and the output layer."""
        # NeMo's first: it freezes all and puts the adapters in; only then is there something to thaw.
        super().freeze_model(model)  # type: ignore[misc]
        for name, parameter in model.named_parameters():
            if is_embedding_or_head(name):
                parameter.requires_grad_(True)


@dataclass
class LoRAWithEmbeddings(_WithEmbeddings, LoRA):
    """NeMo's LoRA, with the embedding and the output layer trained whole."""


@dataclass
class DoRAWithEmbeddings(_WithEmbeddings, DoRA):
    """NeMo's DoRA, with the embedding and the output layer trained whole."""


def adapters_class(peft_scheme: str, with_embeddings: bool) -> type[PEFT]:
    """NeMo's class for a kind of adapters, or ours that also trains the embedding and the output layer.

    Args:
        peft_scheme: "lora" or "dora", as NeMo's own recipes have it.
        with_embeddings: whether the embedding and the output layer are trained.

    Raises:
        CptError: there is no such kind.
    """
    classes = {"lora": (LoRA, LoRAWithEmbeddings), "dora": (DoRA, DoRAWithEmbeddings)}
    check_peft_scheme(peft_scheme)
    return classes[peft_scheme][with_embeddings]


class EmbeddingRateOptimizer(nl.MegatronOptimizerModule):
    """Megatron's optimizer, with another learning rate for the embedding and the output layer.

    Args:
        config: see `nl.MegatronOptimizerModule`.
        lr_scheduler: see `nl.MegatronOptimizerModule`; it scales both rates, down to the same `min_lr`.
        embeddings_lr: the peak for the embedding and the output layer.
    """

    def __init__(
        self, config: OptimizerConfig, lr_scheduler: LRSchedulerModule | None = None, embeddings_lr: float = 2e-5
    ) -> None:
        super().__init__(config, lr_scheduler)
        self.embeddings_lr = embeddings_lr
        # Megatron makes a parameter group of its own of what the condition names, with its rate times `lr_mult`.
        self.scale_lr_cond, self.lr_mult = is_embedding_or_head, embeddings_lr / float(config.lr or 1)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Log the rate of everything else as `lr`, beside `embeddings_lr`.

        NeMo 2.7.3 logs the first group's: whichever parameter Megatron comes upon first, which is the embedding.
        """
        groups = self._optimizers[0].param_groups
        # By their peaks, which the schedule keeps; a pipeline stage in the middle has no embedding.
        own = min(groups, key=lambda group: abs(group["initial_lr"] - self.config.lr))
        pl_module.log("lr", own["lr"], batch_size=1, prog_bar=True)
        for other in (group for group in groups if group["initial_lr"] != own["initial_lr"]):
            pl_module.log("embeddings_lr", other["lr"], batch_size=1)
