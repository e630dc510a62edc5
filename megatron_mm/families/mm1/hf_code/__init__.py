"""Code that an exported MM1 carries, for transformers."""
