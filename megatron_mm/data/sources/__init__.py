"""Shards and indexes."""
