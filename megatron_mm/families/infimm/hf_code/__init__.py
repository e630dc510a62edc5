"""Code for transformers that an exported InfiMM contains."""
