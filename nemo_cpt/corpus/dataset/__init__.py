"""A Megatron dataset on disk: its index, its manifest, a look into it, and blends of several."""
