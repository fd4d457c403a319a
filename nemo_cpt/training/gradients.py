"""A guard: every parameter that is to be trained gets a gradient in the first step."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_cpt.errors import CptError
from nemo_cpt.training.callbacks import wrapped_model

NAMED_AT_MOST = 8


class EveryTrainableParameterHasGradient(pl.Callback):
    """Stops the run after its first step when a trainable parameter received no gradient.

    A parameter outside the autograd graph keeps its initial value without a sign in the loss: LoRA with full recompute
    lost 80 of 128 adapters so (see `nemo_cpt.training.patches`). A gradient of zeros counts as received: the first
    matrix of a LoRA adapter has one, as the second is zero. Costs a hook a parameter, for the first step alone.

    Raises:
        CptError: at the end of the first step, naming the parameters that got none.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, torch.nn.Parameter] = {}
        self._hooks: list[Any] = []
        self._done = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Watch every trainable parameter of this rank's part of the model: NeMo has added the adapters by now."""
        if not self._done:
            self.watch(wrapped_model(trainer, pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Check once, after the first step, which parameters are still waiting."""
        if not self._done:
            self._done = True
            self.check()

    def watch(self, model: torch.nn.Module) -> None:
        """Start to wait for the gradient of every parameter of `model` that requires one."""
        for name, parameter in _trainable(model):
            self._waiting[name] = parameter
            # Hooks, because Megatron adds gradients to buffers of its own: `.grad` is None also where one was received.
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._received(name)))

    def check(self) -> None:
        """Raise CptError if a watched parameter has received no gradient yet; stop watching."""
        while self._hooks:
            self._hooks.pop().remove()
        missing, self._waiting = list(self._waiting), {}
        if missing:
            shown = ", ".join(missing[:NAMED_AT_MOST]) + (" ..." if len(missing) > NAMED_AT_MOST else "")
            raise CptError(
                f"{len(missing)} trainable parameters received no gradient in the first step and would never be "
                f"trained: {shown}. Freeze them if that is meant. Otherwise the job runs without the patches of "
                "nemo_cpt.training.patches (call its apply() before the model is built), or with a recompute "
                "setting that they do not cover: try recompute_granularity=None."
            )

    def _received(self, name: str) -> Any:
        return lambda parameter: self._waiting.pop(name, None)


def _trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
