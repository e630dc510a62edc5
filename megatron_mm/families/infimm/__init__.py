"""InfiMM (arXiv 2403.01487)."""
