"""Where metrics and pictures of a run go."""
