"""Code that an exported Mono-InternVL carries, for transformers."""
