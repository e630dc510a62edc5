"""Destinations of a run's metrics and pictures, and what is made from them: reports and live progress."""
