"""Offline: from shards to an index."""
