"""Code for transformers that is copied into exported models of several families."""
