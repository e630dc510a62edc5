"""The items of a document in reading order, and the only function that turns them into token ids.

Both preparation and the loader use `encode_items`, so a run gets the numbers of tokens that the plan expects.

Worked example: a rendered chat is one string for SentencePiece, of which only the answer is supervised. "USER: a ball? ASSISTANT:" and "
red" are two items, the second of which continues the first. If they were tokenized separately, SentencePiece would add a space before "red"
and produce a different token than in the whole string. So they are tokenized together,

    ▁USER : ▁a ▁ball ? ▁ASS IST ANT : ▁red

and the tokens are divided again: each belongs to the item that contains its last character. A token that crosses the border therefore
belongs to the second item, because a model that has read only the first item has not seen it yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mm.data.text.tokenizer import Tokenizer


class BadDocument(ValueError):
    """A document that cannot be used; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Text:
    """A text."""

    text: str
    counted: bool = True
    """The tokens are supervised."""
    continues: bool = False
    """The text is tokenized together with the text before it, as one string."""


@dataclass(frozen=True)
class Control:
    """A control token, such as </s>, which no text can produce."""

    token: str
    counted: bool = False
    """The token is supervised."""


@dataclass(frozen=True)
class ImageReference:
    """An image, named by the extension of the tar member that contains it."""

    extension: str
    counted: bool = True
    """The control tokens before the features are supervised if the family learns them (`ImageInput.learn_before`). Features never are."""


Item = Text | Control | ImageReference


def encode_items(items: Sequence[Item], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of each item except images, in order.

    Raises ValueError if the tokenizer lacks a control token.
    """
    written = [item for item in items if not isinstance(item, ImageReference)]
    ids: list[list[int]] = [[tokenizer.special_id(item.token)] if isinstance(item, Control) else [] for item in written]
    alone, together = _runs(items)
    for first, found in zip(alone, tokenizer.encode_batch([_text(written[first]) for first in alone]), strict=True):
        ids[first] = found
    for run in together:
        ids[run.start : run.stop] = tokenizer.encode_together([_text(written[number]) for number in run])
    return ids


def _runs(items: Sequence[Item]) -> tuple[list[int], list[range]]:
    """Return which texts are tokenized alone and which together, by their numbers among the items that are not images."""
    runs: list[range] = []
    number, open_run = 0, False
    for item in items:
        if isinstance(item, ImageReference):
            open_run = False
            continue
        if isinstance(item, Text) and item.continues and open_run:
            runs[-1] = range(runs[-1].start, number + 1)
        elif isinstance(item, Text):
            runs.append(range(number, number + 1))
        open_run = isinstance(item, Text)
        number += 1
    return [run.start for run in runs if len(run) == 1], [run for run in runs if len(run) > 1]


def _text(item: Item) -> str:
    assert isinstance(item, Text), "a run holds only texts"
    return item.text
