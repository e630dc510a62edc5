"""Numbers for people: with the unit that fits their size."""

from __future__ import annotations

import math

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def scaled(value: float, unit: str) -> str:
    """A number with three digits and the prefix of its unit that fits.

    >>> [scaled(value, "B") for value in (0, 12, 1234, 4.3e11)], scaled(3.82e13, "FLOP")
    (['0 B', '12 B', '1.23 kB', '430 GB'], '38.2 TFLOP')
    """
    if not math.isfinite(value):
        return f"{value} {unit}"
    power = 0
    while power + 1 < len(_PREFIXES) and abs(value) >= 999.5:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {_PREFIXES[power]}{unit}"


def size(num_bytes: float) -> str:
    """Bytes in kB, MB, GB and so on, which are powers of 1000."""
    return scaled(num_bytes, "B")


def spans(*seconds: float) -> tuple[list[str], str]:
    """Times in a common unit that fits the first: (numbers, name of the unit).

    >>> spans(36.0, 30.0), spans(864000.0, 950400.0)
    ((['36', '30'], 's'), (['10.0', '11.0'], 'days'))
    """
    for least, divisor, name in ((172800, 86400, "days"), (7200, 3600, "hours"), (120, 60, "minutes")):
        if seconds[0] >= least:
            return [f"{value / divisor:.1f}" for value in seconds], name
    return [f"{value:.3g}" for value in seconds], "s"
