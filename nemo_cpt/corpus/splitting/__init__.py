"""Held-out sets."""
