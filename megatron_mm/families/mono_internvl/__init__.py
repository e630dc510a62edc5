"""Mono-InternVL (arXiv 2410.08202)."""
