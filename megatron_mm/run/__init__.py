"""What assembles a run out of the rooms below: start, resume, hooks, dry run."""
