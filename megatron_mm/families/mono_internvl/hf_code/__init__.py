"""Code for transformers that an exported Mono-InternVL contains."""
