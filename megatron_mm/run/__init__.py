"""Assembles a run from the packages below: start, resume, hooks, dry run."""
