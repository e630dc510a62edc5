"""What several tests share: small models, batches, processes, references."""
