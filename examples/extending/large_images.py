"""A preprocessor that is not in the package: it leaves out samples whose first image is small.

megatron-mm train debug_mm1 --data.preprocessors examples/extending/large_images.py:large_images --data.mixture pairs=1.0 \\
    --run-dir runs/large --data.path data/demo
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_mm.data.sources.source import DocumentSizes, ImageSizes, Items, Source

PIXELS = 100
"""Of the shorter side; the demo's pictures have 64 to 160."""


class LargeImages:
    """The samples of a source that have an image, and whose first image has `PIXELS` a side at least."""

    def __init__(self, source: Source) -> None:
        found = source.image_sizes(slice(None))
        documents, first = np.unique(found.document, return_index=True)
        large = np.minimum(found.widths, found.heights)[first] >= PIXELS
        self.source, self.rows = source, documents[large]

    def __len__(self) -> int:
        return len(self.rows)

    def sizes(self, rows: np.ndarray | slice) -> DocumentSizes:
        return self.source.sizes(self.rows[rows])

    def image_sizes(self, rows: np.ndarray | slice) -> ImageSizes:
        return self.source.image_sizes(self.rows[rows])

    def items(self, row: int) -> Items:
        return self.source.items(int(self.rows[row]))

    def document(self, row: int) -> bytes:
        return self.source.document(int(self.rows[row]))

    def image(self, row: int, number: int) -> bytes:
        return self.source.image(int(self.rows[row]), number)

    def __getattr__(self, name: str) -> Any:
        """Its name, kind, tokenizer and templates."""
        return getattr(self.source, name)


def large_images(source: Source) -> Source:
    return LargeImages(source)
