"""`prepare tokenizer`: train a SentencePiece model on the training texts of a data set."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from megatron_mm.data.prepare.find import absolute, find_sources, shards_of
from megatron_mm.data.prepare.kinds import detect_kind, iterate_samples
from megatron_mm.data.prepare.samples import document_of, parse_member
from megatron_mm.data.sources.index_files import META
from megatron_mm.data.sources.shards import BrokenShard
from megatron_mm.data.text.chat import Rendering, chat_template
from megatron_mm.data.text.items import BadDocument, Text
from megatron_mm.data.text.keys import USUAL, Keys
from megatron_mm.data.text.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)


def prepare_tokenizer(path: Path, *, out: Path, vocab_size: int, keys: Keys = USUAL, overwrite: bool = False) -> str:
    """Train a tokenizer on the training texts under a path, and warn if they are too few for `vocab_size`. Returns a line to print.

    Raises ValueError if `out` is another tokenizer and `overwrite` is not set.
    """
    found = find_sources(path, ignore=("*",))
    sources = [source for source in found if source.parent.name != "heldout"]
    if out.exists() and not overwrite:
        logger.info("%s exists: it is kept, unless the tokenizer that is now trained is the same", out)
    trained = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        tokenizer = train_tokenizer(_all_texts(sources, keys), trained, vocab_size=vocab_size)
        if out.exists() and not overwrite and out.read_bytes() != trained.read_bytes():
            raise ValueError(
                f"{out} is another tokenizer{_users(out, found)}: choose another --out FILE, or replace it with --overwrite, run "
                "`megatron-mm prepare index` again, and start new runs"
            )
        trained.replace(out)
    finally:
        trained.unlink(missing_ok=True)
    if tokenizer.vocab_size < vocab_size:
        logger.warning(
            "the texts of %s are enough for only %s of the %s tokens of --vocab-size: text will be split into more tokens than a tokenizer "
            "of that size needs. Train it on more text, or give `prepare index` and `train` the tokenizer of an existing model",
            *(path, f"{tokenizer.vocab_size:,}", f"{vocab_size:,}"),
        )
    return f"{out}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}"


def _users(tokenizer: Path, sources: Sequence[Path]) -> str:
    """Return, for an error, which sources were indexed with a tokenizer."""
    fingerprint = hashlib.sha256(tokenizer.read_bytes()).hexdigest()[:16]
    names = []
    for source in sources:
        with suppress(OSError, ValueError, AttributeError):  # it has no index, or a damaged one
            if json.loads((source / "index" / META).read_text()).get("tokenizer") == fingerprint:
                names.append("/".join(absolute(source).parts[-2:]))
    return f", with which {', '.join(names)} {'was' if len(names) == 1 else 'were'} indexed" if names else ""


def _all_texts(sources: list[Path], keys: Keys) -> Iterator[str]:
    plain = Rendering(chat_template("plain"))
    for source in sources:
        shards = shards_of(source)
        detected = detect_kind(shards, keys=keys)
        for shard in shards:
            try:
                for sample in iterate_samples(shard, key_ends=detected.key_ends):
                    try:
                        items = parse_member(detected.kind, document_of(detected.kind, sample, keys), plain, keys=keys)
                        yield from (item.text for item in items if isinstance(item, Text))
                    except BadDocument:
                        continue  # counted when the source is indexed
            except BrokenShard as error:
                logger.warning("%s", error)
