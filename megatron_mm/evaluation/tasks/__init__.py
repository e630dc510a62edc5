"""Benchmarks: the files, prompts and scores of each. `registry.TASKS` lists all of them."""
