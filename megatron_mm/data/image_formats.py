"""What preparation and decoding agree on about encoded images."""

from __future__ import annotations

MAX_PIXELS = 64_000_000
"""Larger images are refused by their header, before a decoder allocates anything for them."""
