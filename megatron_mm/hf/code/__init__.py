"""Code that exported models of several families carry, for transformers."""
