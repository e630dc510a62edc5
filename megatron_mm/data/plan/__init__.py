"""Which samples are in which sequence on which process."""
