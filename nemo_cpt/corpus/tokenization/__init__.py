"""Texts to ids: the reference tokenizer, its files, and the faster encoder that stands in for it."""
