"""`events.jsonl`: what happened to a run, with the step and the time: starts, resumes, skipped steps, warnings, ends.

Every warning that the main process logs is an event, so code that logs a warning need not know about this file. `extra={"kind": "slow"}`
gives it a kind other than `warning`:

    logger.warning("rank %d is slow", rank, extra={"kind": "slow"})

A resume does not remove earlier events, because restarts are part of what they record.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

LOGGER = "megatron_mm"
_ALIKE = 10
"""Maximum number of warnings of the same text, apart from numbers and names, that become events; the log has all of them."""
_PENDING = 200


class Warnings(logging.Handler):
    """Keeps warnings until a receiver is set, and then passes them on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.pending: list[tuple[str, str]] = []
        """(kind, text) of warnings that have not been passed on yet."""
        self._take: Callable[[str, str], None] | None = None
        self._alike: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        template = str(record.msg)
        self._alike[template] += 1
        count = self._alike[template]
        if count > _ALIKE:
            return
        more = " (further ones like this are only in the log)" if count == _ALIKE else ""
        kind, text = str(getattr(record, "kind", "warning")), record.getMessage() + more
        if self._take is not None:
            self._take(kind, text)
        elif len(self.pending) < _PENDING:
            self.pending.append((kind, text))

    def pass_to(self, take: Callable[[str, str], None]) -> None:
        """Pass the kept warnings, and all later ones, to `take(kind, text)`."""
        self._take = take
        for kind, text in self.pending:
            take(kind, text)
        self.pending = []


def listen() -> Warnings:
    """Keep warnings from here on. Any earlier handler is removed."""
    stop()
    found = Warnings()
    logging.getLogger(LOGGER).addHandler(found)
    return found


def listening() -> Warnings | None:
    """The handler that `listen` added; None if there is none."""
    return next((handler for handler in logging.getLogger(LOGGER).handlers if isinstance(handler, Warnings)), None)


def stop() -> None:
    """Stop keeping warnings."""
    logger = logging.getLogger(LOGGER)
    for handler in [handler for handler in logger.handlers if isinstance(handler, Warnings)]:
        logger.removeHandler(handler)
