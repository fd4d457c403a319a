"""The data module of a run: a weighted blend to train on, and named validation sets that are watched one by one."""

from typing import Any, Optional

from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.collections import llm
from nemo.collections.llm.gpt.data.utils import _reconfigure_limit_batches

from nemo_cpt.corpus import Blend
from nemo_cpt.corpus.dataset.blend import check_distinct
from nemo_cpt.errors import CptError
from nemo_cpt.training.datasets import TRAIN, VALIDATION, FirstSamples, gpt_dataset


class NamedSetsDataModule(llm.PreTrainingDataModule):
    """What our data modules share: training sets by weight, and validation sets that are gone through one by one.

    NeMo's own module mixes all validation data into one number, in which forgetting the old language hides behind
    learning the new one. `ValidationLossBySet` reports each set's loss.

    Attributes:
        training_sets: weight of each set that is trained on, by full prefix.
        validation_sets: prefix of each named validation set, in the order in which a validation goes through them.
        validation_weights: for each validation set the weight of each of its global batches in its mean loss.
        first_validation: micro batches of the validation before the first step; 0 for none.
    """

    init_global_step: int
    first_validation: int = 0
    training_sets: dict[str, float]
    validation_sets: dict[str, str]
    validation_weights: dict[str, list[float]]

    @property
    def training_texts(self) -> Any:
        """Megatron's dataset of the texts that are trained on, once it is built; None without any."""
        return self._train_ds

    @property
    def validation_names(self) -> list[str]:
        """The validation sets' names."""
        return list(self.validation_sets)

    @property
    def prefixes(self) -> list[str]:
        """Of all sets, each one once."""
        return list(dict.fromkeys([*self.training_sets, *self.validation_sets.values()]))

    def _create_dataloader(self, dataset: Any, mode: str, **kwargs: Any) -> Any:
        """A loader, of which only training's counts from where it was made.

        NeMo 2.7.3 counts what was consumed from the last loader of any kind on: where training was not validated
        before its first step, a checkpoint that follows its first validation would send it back in the data.
        """
        counted_from = self.init_global_step
        loader = super()._create_dataloader(dataset, mode=mode, **kwargs)
        if mode != "train":
            self.init_global_step = self.data_sampler.init_global_step = counted_from
        return loader

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
        trainer = self.trainer
        trainer.limit_train_batches = _reconfigure_limit_batches(trainer.limit_train_batches, self._train_ds)
        # Lightning counts micro batches, and knows of one validation set: the sets lie one behind the other in it.
        trainer.limit_val_batches = sum(map(len, self.validation_weights.values())) * get_num_microbatches()
        if trainer.num_sanity_val_steps:  # the losses before training: the same validation as all later ones
            trainer.num_sanity_val_steps = self.first_validation = trainer.limit_val_batches

    def _text(self, weights: dict[str, float], samples: int, split: int) -> Any:
        """Sequences of prepared texts; see `gpt_dataset`."""
        return gpt_dataset(
            weights,
            samples,
            split,
            random_seed=self.seed,
            sequence_length=self.seq_length,
            tokenizer=self.tokenizer,
            path_to_cache=self.index_mapping_dir,
            reset_position_ids=self.reset_position_ids,
            create_attention_mask=self.create_attention_mask,
            reset_attention_mask=self.reset_attention_mask,
            eod_mask_loss=self.eod_mask_loss,
            num_dataset_builder_threads=self.num_dataset_builder_threads,
        )


def whole_batches(limit_val_batches: int | float) -> int:
    """The global batches to validate on from each set.

    Raises:
        CptError: it is a share.
    """
    if not isinstance(limit_val_batches, int):
        raise CptError(
            f"limit_val_batches is {limit_val_batches!r}: give a whole number, "
            "the global batches to validate on from each validation set"
        )
    return limit_val_batches


class BlendDataModule(NamedSetsDataModule):
    """NeMo's PreTrainingDataModule over a `Blend`: one training blend, one validation set for each name.

    A validation runs `trainer.limit_val_batches` global batches of every set, one set after the other, the same samples
    each time.

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
        self.training_sets, self.validation_sets = self.blend.shares(), self.blend.validation_paths()
        super().__init__(paths=self.blend.paths(), **kwargs)

    def build(
        self,
        trainer_max_steps: int,
        trainer_val_check_interval: int,
        trainer_limit_val_batches: int | float,
        trainer_limit_test_batches: int | float,
    ) -> None:
        """Build the training blend for `max_steps` global batches, and every validation set for one validation."""
        del trainer_val_check_interval, trainer_limit_test_batches
        needed = trainer_max_steps * self.global_batch_size
        samples = needed if self.num_train_samples is None else self.num_train_samples
        # Behind the last one Lightning would begin again with the first.
        if samples < needed:
            raise CptError(
                f"data.num_train_samples is {samples}, and {trainer_max_steps} steps of {self.global_batch_size} "
                f"sequences take {needed}: give so many or more, whose order is drawn at once, or leave it away"
            )
        self._train_ds = self._text(self.training_sets, samples, TRAIN)
        self._validation_ds = self._build_validation(whole_batches(trainer_limit_val_batches))
        self._test_ds = None

    def _build_validation(self, global_batches: int) -> FirstSamples | None:
        self.validation_weights = {name: [1.0] * global_batches for name in self.validation_sets}
        count = global_batches * self.global_batch_size
        # With limit_val_batches=0 nothing is validated, as without any set.
        if not count or not self.validation_sets:
            return None
        sets = [self._text({prefix: 1.0}, count, VALIDATION) for prefix in self.validation_sets.values()]
        return FirstSamples([(each, count) for each in sets])


def blend_of(paths: Any, validation: dict[str, str] | None = None, weighting: str = "share") -> Blend:
    """The `Blend` of a recipe's `data` fields.

    Raises:
        CptError: `paths` is no list of a weight and a prefix in turn, or names one dataset twice.
    """
    return Blend(train=weights_of(paths), validation=validation or {}, weighting=weighting)


def weights_of(paths: Any) -> dict[str, float]:
    """The weight of each prefix in a list of both in turn.

    Raises:
        CptError: it is no such list, or names one dataset twice.
    """
    if isinstance(paths, str) or not isinstance(paths, list | tuple) or len(paths) % 2:
        raise CptError(
            f"data.paths is {paths!r}: give weights and prefixes in turn, such as [0.75, 'ds/ja', 0.25, 'ds/en'], or "
            "give the recipe data=Blend(train={'ds/ja': 0.75, 'ds/en': 0.25})"
        )
    # Before the dict below, where the second of two equal prefixes would silently replace the first.
    check_distinct(map(str, paths[1::2]))
    try:
        return {str(prefix): float(weight) for weight, prefix in zip(paths[::2], paths[1::2], strict=True)}
    except ValueError as error:
        raise CptError(f"data.paths is {paths!r}: each prefix needs a number before it ({error})") from None
