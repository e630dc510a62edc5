"""Rows of an index."""

from __future__ import annotations

import numpy as np

SAMPLE = np.dtype(
    [
        ("shard", "<i4"),  # row of shards.npy
        ("offset", "<i8"),  # where the bytes of the document (.txt, .json or a .jsonl line) begin in the shard
        ("size", "<i4"),  # how many bytes it has
        ("first_item", "<i8"),  # row of items.npy
        ("num_items", "<i4"),
        ("text_tokens", "<i4"),  # tokens of all items that are not images
        ("num_images", "<i4"),
    ]
)
"""One sample. Its text is read from [offset, offset + size) of its shard."""

SHARD = np.dtype(
    [
        ("name_end", "<i8"),  # place in names.npy after the last byte of its name, which begins where the one before ends
        ("size", "<i8"),  # bytes
        ("modified", "<i8"),  # when it was written last, nanoseconds; -1 where that is not known
        ("digest", "S16"),  # of parts of it; empty where that is not known
    ]
)
"""One shard (`data.sources.shard_table`)."""

ITEM = np.dtype(
    [
        ("is_image", "u1"),
        ("counted", "u1"),  # its tokens are supervised; image: what stands before it may be (the model says whether)
        ("tokens", "<i4"),  # text: its tokens; control token: 1; image: 0 (the model says how many tokens an image is)
        ("offset", "<i8"),  # image: where its bytes begin in the shard
        ("size", "<i4"),  # image: how many bytes it has
        ("width", "<i4"),  # image: pixels
        ("height", "<i4"),
    ]
)
"""One text, control token or image of a sample, in reading order."""

SIZES = np.dtype([("text_tokens", "<i4"), ("num_images", "<i4")])
"""What planning reads of a sample: columns of SAMPLE, apart from the rest, so that a plan touches 8 bytes a sample."""
