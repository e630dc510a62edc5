"""Public data sets as they are published, made into shards."""
