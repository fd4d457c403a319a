"""The data module of a run: a weighted blend to train on, and named validation sets that are watched one by one."""

from typing import Any

from nemo.collections import llm
from nemo.collections.llm.gpt.data.utils import _reconfigure_limit_batches

from nemo_cpt.corpus import Blend, full_prefix
from nemo_cpt.errors import CptError
from nemo_cpt.training.datasets import TRAIN, VALIDATION, FirstSamples, gpt_dataset


class BlendDataModule(llm.PreTrainingDataModule):
    """NeMo's PreTrainingDataModule over a `Blend`: one training blend, one validation set for each name.

    A validation runs `trainer.limit_val_batches` global batches of every set, one set after the other, the same samples
    each time; `ValidationLossBySet` reports each set's loss. NeMo's own module mixes all validation data into one
    number, in which forgetting the old language hides behind learning the new one.

    Args:
        train: weight of each Megatron prefix, as in `Blend.train`.
        validation: Megatron prefix of each named validation set, as in `Blend.validation`; may be empty.
        **kwargs: see NeMo's `PreTrainingDataModule` (seq_length, micro_batch_size, global_batch_size, tokenizer, …).

    Raises:
        CptError: a file of the blend is missing, a weight is not positive, or a prefix is a dict in a string.
    """

    def __init__(self, train: dict[str, float], validation: dict[str, str] | None = None, **kwargs: Any):
        self.blend = Blend(train=dict(train), validation=dict(validation or {}))
        self.blend.check()
        super().__init__(paths=self.blend.paths(), **kwargs)

    @property
    def validation_names(self) -> list[str]:
        """The validation sets' names, in the order in which a validation goes through them."""
        return list(self.blend.validation)

    def build(
        self,
        trainer_max_steps: int,
        trainer_val_check_interval: int,
        trainer_limit_val_batches: int | float,
        trainer_limit_test_batches: int | float,
    ) -> None:
        """Build the training blend for `max_steps` global batches, and every validation set for one validation."""
        del trainer_val_check_interval, trainer_limit_test_batches
        weights = {full_prefix(prefix): weight for prefix, weight in self.blend.train.items()}
        samples = self.num_train_samples or trainer_max_steps * self.global_batch_size
        self._train_ds = gpt_dataset(weights, samples, TRAIN, **self._dataset_config())
        self._validation_ds = self._build_validation(trainer_limit_val_batches)
        self._test_ds = None

    def _build_validation(self, global_batches: int | float) -> FirstSamples | None:
        if not isinstance(global_batches, int):
            raise CptError(
                f"limit_val_batches is {global_batches!r}: give a whole number, "
                "the global batches to validate on from each validation set"
            )
        count = global_batches * self.global_batch_size
        if not count or not self.blend.validation:
            return None
        sets = [
            gpt_dataset({full_prefix(prefix): 1.0}, count, VALIDATION, **self._dataset_config())
            for prefix in self.blend.validation.values()
        ]
        return FirstSamples(sets, count)

    def _dataset_config(self) -> dict[str, Any]:
        return {
            "random_seed": self.seed,
            "sequence_length": self.seq_length,
            "tokenizer": self.tokenizer,
            "path_to_cache": self.index_mapping_dir,
            "reset_position_ids": self.reset_position_ids,
            "create_attention_mask": self.create_attention_mask,
            "reset_attention_mask": self.reset_attention_mask,
            "eod_mask_loss": self.eod_mask_loss,
            "num_dataset_builder_threads": self.num_dataset_builder_threads,
        }

    def val_dataloader(self) -> Any:
        """The validation sets, one after the other; nothing to validate on gives an empty list."""
        return self._create_dataloader(self._validation_ds, mode="validation") if self._validation_ds else []

    def test_dataloader(self) -> Any:
        """No test set: evaluation reads the exported model."""
        return []

    def reconfigure_limit_batches(self) -> None:
        """Turn the trainer's limits from global batches of each set into microbatches of all sets."""
        trainer, sets = self.trainer, len(self.blend.validation)
        trainer.limit_train_batches = _reconfigure_limit_batches(trainer.limit_train_batches, self._train_ds)
        trainer.limit_val_batches = _reconfigure_limit_batches(trainer.limit_val_batches, self._validation_ds) * sets
        if trainer.num_sanity_val_steps:  # the losses before training: the same validation as all later ones
            trainer.num_sanity_val_steps = trainer.limit_val_batches
