"""Recognises passwords and keys in text, so that no file of a run contains one."""

from __future__ import annotations

import re

_SECRET = re.compile(
    r"://[^/\s]*:[^/\s]*@"  # a password in a URL
    r"|(?:^|[?&\s])[\w-]*(?:key|token|secret|passw|signature|credential)[\w-]*="  # a parameter of a URL or of a command
    r"|\bAKIA[0-9A-Z]{12,}|\bhf_[A-Za-z0-9]{20,}",  # keys of S3 and of the Hugging Face hub
    re.IGNORECASE,
)


def contains_secret(text: str) -> bool:
    """Whether a text contains a password in a URL, a parameter named like a credential, or a key of S3 or the Hugging Face hub.

    >>> [contains_secret(text) for text in ("https://me:pass@host/x", "s3://bucket/x?X-Amz-Signature=1f", "/data/tokens=32k", "s3://bucket/x")]
    [True, True, False, False]
    """
    return _SECRET.search(text) is not None
