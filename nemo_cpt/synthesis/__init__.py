"""Questions with answers out of a corpus: by rules, from templates with slots, or with a model."""

from nemo_cpt.synthesis.sets import SynthesisReport, synthesize

__all__ = ["SynthesisReport", "synthesize"]
