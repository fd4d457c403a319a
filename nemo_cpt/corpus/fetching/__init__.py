"""Corpora from the network."""
