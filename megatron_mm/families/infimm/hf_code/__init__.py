"""Code that an exported InfiMM carries, for transformers."""
