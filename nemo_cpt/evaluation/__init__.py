"""What an exported model can do, measured with plain transformers."""
