"""A trained model on the Hugging Face hub, with a card that says what it is."""

from nemo_cpt.publishing.pushing import PushReport, push

__all__ = ["PushReport", "push"]
