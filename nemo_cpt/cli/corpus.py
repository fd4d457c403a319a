"""Commands of `nemo-cpt`: corpus."""
