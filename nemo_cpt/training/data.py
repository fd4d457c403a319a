"""The data module of a run: a weighted blend to train on, and named validation sets that are watched one by one."""

from typing import Any, Optional

from nemo.collections import llm
from nemo.collections.llm.gpt.data.utils import _reconfigure_limit_batches

from nemo_cpt.corpus import Blend
from nemo_cpt.corpus.dataset.blend import check_distinct
from nemo_cpt.errors import CptError
from nemo_cpt.training.datasets import TRAIN, VALIDATION, FirstSamples, gpt_dataset


class BlendDataModule(llm.PreTrainingDataModule):
    """NeMo's PreTrainingDataModule over a `Blend`: one training blend, one validation set for each name.

    A validation runs `trainer.limit_val_batches` global batches of every set, one set after the other, the same samples
    each time; `ValidationLossBySet` reports each set's loss. NeMo's own module mixes all validation data into one
    number, in which forgetting the old language hides behind learning the new one.

    Args:
        paths: weights and prefixes of the training sets in turn, Megatron's form: `[0.75, "ds/ja", 0.25, "ds/en"]`.
            A list, because NeMo-Run's YAML and command line take the slash in a mapping's key for syntax.
        validation: prefix of each named validation set, as in `Blend.validation`; may be empty.
        weighting: what a weight counts, as in `Blend.weighting`.
        **kwargs: see NeMo's `PreTrainingDataModule` (seq_length, micro_batch_size, global_batch_size, tokenizer, …).

    Raises:
        CptError: a file of the blend is missing, a weight is not positive, or a prefix is a dict in a string.
    """

    def __init__(
        self,
        paths: list[Any],
        validation: Optional[dict[str, str]] = None,  # noqa: UP045  NeMo-Run cannot parse `| None`
        weighting: str = "share",
        **kwargs: Any,
    ):
        self.blend = blend_of(paths, validation, weighting)
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
        samples = self.num_train_samples or trainer_max_steps * self.global_batch_size
        self._train_ds = gpt_dataset(self.blend.shares(), samples, TRAIN, **self._dataset_config())
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
            gpt_dataset({prefix: 1.0}, count, VALIDATION, **self._dataset_config())
            for prefix in self.blend.validation_paths().values()
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the position in the data; of a finished run one batch short of its end, which the sampler refuses."""
        last = max(len(self._train_ds) - self.global_batch_size, 0)
        super().load_state_dict({**state_dict, "consumed_samples": min(state_dict["consumed_samples"], last)})

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


def blend_of(paths: Any, validation: dict[str, str] | None = None, weighting: str = "share") -> Blend:
    """The `Blend` of a recipe's `data` fields.

    Raises:
        CptError: `paths` is no list of a weight and a prefix in turn, or names one dataset twice.
    """
    if isinstance(paths, str) or not isinstance(paths, list | tuple) or len(paths) % 2:
        raise CptError(
            f"data.paths is {paths!r}: give weights and prefixes in turn, such as [0.75, 'ds/ja', 0.25, 'ds/en'], or "
            "give the recipe data=Blend(train={'ds/ja': 0.75, 'ds/en': 0.25})"
        )
    check_distinct(map(str, paths[1::2]))
    try:
        train = {str(prefix): float(weight) for weight, prefix in zip(paths[::2], paths[1::2], strict=True)}
    except ValueError as error:
        raise CptError(f"data.paths is {paths!r}: each prefix needs a number before it ({error})") from None
    return Blend(train=train, validation=dict(validation or {}), weighting=weighting)
