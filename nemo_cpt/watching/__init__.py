"""Looking at runs: while they train, and afterwards. Reads files alone, and imports neither torch nor NeMo."""
