"""Reading and decoding ahead of the step."""
