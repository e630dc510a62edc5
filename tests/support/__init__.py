"""Helpers that several tests share: small models, batches, processes, references."""
