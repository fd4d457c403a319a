"""Texts to a Megatron dataset: the job, its processes and its journal."""
