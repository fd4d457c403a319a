"""Commands of `nemo-cpt`: checkpoint."""
