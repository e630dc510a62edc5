"""A captured forward and backward pass with one set of activations, which one micro-batch at a time may use."""

from __future__ import annotations

import weakref


class User:
    """Kept by autograd for as long as it may call a backward pass."""


class GraphCopy:
    """In use from its forward to its backward pass, or until autograd drops the pass, as after a step that was interrupted."""

    _user: weakref.ref[User] | None = None

    @property
    def is_free(self) -> bool:
        return self._user is None or self._user() is None

    def begin(self) -> User:
        """Note that the forward pass is about to run. The result must be kept until the backward pass."""
        user = User()
        self._user = weakref.ref(user)
        return user

    def check(self, user: User) -> None:
        """Raise RuntimeError unless this is the backward pass that belongs to the activations."""
        if self._user is None or self._user() is not user:
            raise RuntimeError("the activations of a graph were used for a backward pass already: a backward pass runs once")

    def end(self) -> None:
        """Note that the backward pass has run."""
        self._user = None
