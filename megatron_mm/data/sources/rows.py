"""Row types of an index."""

from __future__ import annotations

import numpy as np

SAMPLE = np.dtype(
    [
        ("shard", "<i4"),  # row of shards.npy
        ("offset", "<i8"),  # first byte of the document (.txt, .json or a .jsonl line) in the shard
        ("size", "<i4"),  # of the document, in bytes
        ("first_item", "<i8"),  # row of items.npy
        ("num_items", "<i4"),
        ("text_tokens", "<i4"),  # tokens of all items that are not images
        ("num_images", "<i4"),
    ]
)
"""One sample. Its document is bytes [offset, offset + size) of its shard."""

SHARD = np.dtype(
    [
        ("name_end", "<i8"),  # index in names.npy after the last byte of its name, which begins where the previous name ends
        ("size", "<i8"),  # bytes
        ("modified", "<i8"),  # time of last modification in nanoseconds; -1 if unknown
        ("digest", "S16"),  # digest of parts of its contents; empty if unknown
    ]
)
"""One shard (`data.sources.shard_table`)."""

ITEM = np.dtype(
    [
        ("is_image", "u1"),
        ("counted", "u1"),  # its tokens are supervised; image: only its control tokens can be, depending on the model family
        ("tokens", "<i4"),  # text: number of its tokens; control token: 1; image: 0 (the number depends on the model)
        ("offset", "<i8"),  # image: first byte in the shard
        ("size", "<i4"),  # image: bytes
        ("width", "<i4"),  # image: pixels
        ("height", "<i4"),
    ]
)
"""One text, control token or image of a sample, in reading order."""

SIZES = np.dtype([("text_tokens", "<i4"), ("num_images", "<i4")])
"""The columns of SAMPLE that planning reads, stored separately so that a plan reads only 8 bytes per sample."""
