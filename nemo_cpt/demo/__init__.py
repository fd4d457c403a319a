"""`make demo`: the whole road on a CPU."""
