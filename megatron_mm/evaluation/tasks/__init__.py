"""Benchmarks: what each reads, asks and scores. `registry.TASKS` is all of them."""
