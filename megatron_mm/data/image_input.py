"""How an image enters a model: which pixels, and which tokens stand for it in a document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ImageInput:
    """How images enter a model: which pixels, and which tokens stand for them.

    An image is written as `before`, then `tokens` times `token` (the places of its features), then `after`.
    """

    size: int
    """Side of the square that images are resized to, pixels."""
    fill: tuple[int, int, int]
    """Colour that stands for a missing image; the tower's mean, which normalises to zero."""
    tokens: int
    """Places of features of an image."""
    token: str = "<image>"
    """The control token of these places."""
    before: tuple[str, ...] = ()
    """Control tokens in front of them."""
    after: tuple[str, ...] = ()
    """Control tokens behind them."""
    learn_before: bool = False
    """The tokens `before` count in the loss; no other token of an image does."""

    @property
    def places(self) -> int:
        """Tokens of the decoder's sequence that one image takes."""
        return self.tokens + self.places_around

    @property
    def places_around(self) -> int:
        """Tokens before and after those of the features."""
        return len(self.before) + len(self.after)

    @property
    def silent(self) -> range:
        """Of an image's places those that are not to be predicted."""
        return range(len(self.before) if self.learn_before else 0, self.places)

    def ids(self, special_id: Callable[[str], int]) -> list[int]:
        """The token ids of one image.

        Args:
            special_id: the id of a control token (`Tokenizer.special_id`).
        """
        return [*map(special_id, self.before), *[special_id(self.token)] * self.tokens, *map(special_id, self.after)]

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """What the tokenizer must know, each once."""
        return tuple(dict.fromkeys((*self.before, self.token, *self.after)))
