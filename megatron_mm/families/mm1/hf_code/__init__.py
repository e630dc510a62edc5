"""Code for transformers that an exported MM1 contains."""
