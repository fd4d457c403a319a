"""LoRA beside an embedding and an output layer that are trained whole, at a learning rate of their own."""

from dataclasses import dataclass

import torch
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections.llm.peft.lora import LoRA
from nemo.lightning.pytorch.optim.base import LRSchedulerModule

WHOLE = ("word_embeddings.weight", "output_layer.weight")


def is_embedding_or_head(name: str, parameter: torch.Tensor | None = None) -> bool:
    """Whether a parameter is the embedding's or the output layer's weight, by its name."""
    return name.endswith(WHOLE)


@dataclass
class LoRAWithEmbeddings(LoRA):
    """LoRA that leaves the embedding and the output layer trainable; checkpoints hold them beside the adapters.

    What a language needs that the base hardly knows, its rarely seen tokens, lies in these two, which adapters on the
    layers do not reach. A merged export takes them from the run; an adapter for `peft` cannot hold them.
    """

    def freeze_model(self, model: torch.nn.Module) -> None:
        """Freeze all but the embedding and the output layer."""
        super().freeze_model(model)
        for name, parameter in model.named_parameters():
            if is_embedding_or_head(name):
                parameter.requires_grad_(True)


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
        self.scale_lr_cond, self.lr_mult = is_embedding_or_head, embeddings_lr / float(config.lr or 1)
