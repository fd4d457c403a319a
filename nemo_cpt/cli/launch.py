"""Commands of `nemo-cpt`: launch."""
