"""Cells of tables of measurements: numbers as people write them, and the reason why a cell cannot be read.

A cell is empty, or it is read, or it costs its row, with a reason: a guess in place of a value that somebody wrote would be counted as an
error of the planner. Words that say that a value is not known ("n/a", "unknown", "-") are empty cells.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


class UnusableRow(Exception):
    """A row that cannot be planned: it lacks something, or a cell of it cannot be read."""


_UNKNOWN = re.compile(
    r"[-\u2010-\u2015?.*/\s]*|#?n[./]?a\.?n?|none|null|nil|tbd|auto|default|unk|(unknown|undisclosed|unspecified|unreported|unpublished)"
    r"|not (available|given|known|published|reported|specified|stated|used|applicable|set|disclosed)",
    flags=re.IGNORECASE,
)
_OFF = re.compile(r"no|off|false|disabled", flags=re.IGNORECASE)
_ABOUT = r"(?:[~\u2248\u223c]|(?:about|approx(?:imately|\.)?|ca\.?|circa|around)\s)?\s*"
_NUMBER = r"[-+]?(?:\d{1,3}(?:[,_' ]\d{3})+(?![\d])(?:\.\d*)?|\d+(?:[.,]\d*)?|\.\d+)(?:e[+-]?\d+)?"
_SPREAD = re.compile(r"(\u00b1|\+/?-)\s*[\d.,]+")
"""A deviation after a value: "1.2 +- 0.1"."""


def tidy(text: str) -> str:
    """Return a cell without surrounding or unusual spaces and signs; an empty text if it says that the value is not known."""
    text = re.sub(r"[\u00a0\u2007\u2009\u202f\t ]+", " ", text).replace("\u2212", "-").strip(" '\"`")
    return "" if _UNKNOWN.fullmatch(text) else text


def text_of(cells: Mapping[str, str], *names: str) -> str:
    """Return several cells of a row as one text in small letters, in which words may be searched."""
    return " ".join(cells.get(name, "") for name in names).lower()


@dataclass(frozen=True)
class Whole:
    """What a column of whole numbers may contain."""

    most: float = 1e6
    least: int = 1
    """A 0 in a column that begins at 0 means that the thing is not used."""
    thousand: int = 1024
    """What "K" after a number means."""
    wrong_units: str = r"(?!)"
    """Regular expression for words that say that the number counts something else."""


_TOKENS = r"\btok"
WHOLE: dict[str, Whole] = {
    "layers": Whole(2000),
    "hidden": Whole(),
    "heads": Whole(),
    "kv_heads": Whole(),
    "head_dim": Whole(4096),
    "ffn": Whole(),
    "vocab": Whole(1e8, thousand=1000),
    "seq": Whole(1e8),
    "experts": Whole(10_000, 0),
    "topk": Whole(10_000, 0),
    "moe_ffn": Whole(least=0),
    "shared_ffn": Whole(least=0),
    "n_gpus": Whole(wrong_units=r"node|machine|host|server|pod|rack"),
    "tp": Whole(),
    "pp": Whole(),
    "cp": Whole(),
    "dp": Whole(),
    "vpp": Whole(200, 0),
    "ep": Whole(least=0),
    "etp": Whole(least=0),
    "mbs": Whole(wrong_units=_TOKENS),
    "gbs": Whole(wrong_units=_TOKENS),
    "grad_accum": Whole(10_000),
}
"""Columns of whole numbers."""


def count(cells: Mapping[str, str], name: str) -> int | None:
    """Read a cell as a positive whole number: "~4", "TP4", "4 GPUs", "1,024", "8x8" and, of lengths, "4K".

    Returns None if the cell is empty or says that the thing is not used. Raises UnusableRow if it contains anything else.
    """
    text, kind = tidy(cells.get(name, "")), WHOLE[name]
    if not text or _OFF.fullmatch(text):
        return None
    wanted = f"a whole number, {kind.least} to {kind.most:,.0f}"
    text = re.sub(rf"(?:{name.replace('_', '[_ ]')}|top)\s*[-_=:]?\s*(?=\d)", "", text, count=1, flags=re.IGNORECASE)
    product = re.match(rf"{_ABOUT}(\d+)\s*[x\u00d7*]\s*(\d+)(?![\d.,]|\s*G?i?B)", text, flags=re.IGNORECASE)
    if product:
        value, rest = float(int(product[1]) * int(product[2])), text[product.end() :]
    else:
        value, rest = _number(name, text, wanted)
    rest = re.sub(r"\(.*?\)|\[.*?\]|\b\d+ ?Gi?B\b", "", rest).strip()
    scale = re.match(r"(k|m)i?\b", rest, flags=re.IGNORECASE)
    if scale:
        value *= kind.thousand ** (1 if scale[1].lower() == "k" else 2)
        rest = rest[scale.end() :].strip()
    if re.search(r"(?<![A-Za-z\d])[-+]?\d|%", rest) or (rest and not re.match(r"[A-Za-z.:;,/\u00d7]", rest)):
        raise _unreadable(cells, name, f"{wanted}: give one number")
    if re.search(kind.wrong_units, rest, flags=re.IGNORECASE):
        raise _unreadable(cells, name, f"{wanted}, of {'sequences' if kind.wrong_units == _TOKENS else 'GPUs'}")
    if value != round(value) or not kind.least <= value <= kind.most:
        raise _unreadable(cells, name, wanted)
    return round(value) or None


@dataclass(frozen=True)
class Measured:
    """What a column of measured values may contain."""

    units: Mapping[str, float]
    """Unit, in small letters, without spaces and what it is per -> factor."""
    per: str
    """Regular expression for what the unit is per."""
    wanted: str


_PER_GPU = r"((/|per)(s|sec|second|gpu|device|chip|accelerator))*"
_TOKEN_UNITS = ("", "tok", "toks", "token", "tokens", "t", "tps", "tgs")
MEASURED: dict[str, Measured] = {
    "step_time_s": Measured(
        {
            **dict.fromkeys(("", "s", "sec", "secs", "second", "seconds"), 1.0),
            **dict.fromkeys(("ms", "msec", "msecs", "millisecond", "milliseconds"), 1e-3),
            **dict.fromkeys(("us", "\u00b5s", "\u03bcs", "microsecond", "microseconds"), 1e-6),
            **dict.fromkeys(("min", "mins", "minute", "minutes"), 60.0),
        },
        r"(/|per|a)(step|it|iter|iteration|batch)",
        "a positive number of seconds, or a number with s, ms or min",
    ),
    "tokens_per_s_per_gpu": Measured(
        {scale + unit: factor for scale, factor in (("", 1.0), ("k", 1e3), ("m", 1e6)) for unit in _TOKEN_UNITS},
        _PER_GPU,
        "a positive number of tokens per second and GPU, or one with k or M",
    ),
    "tflops_causal_half": Measured(
        {
            f"{scale}{unit}": factor
            for scale, factor in (("", 1.0), ("t", 1.0), ("p", 1e3), ("g", 1e-3))
            for unit in ("", "f", "flop", "flops")
        },
        _PER_GPU,
        "a positive number of TFLOP/s per GPU",
    ),
    "mem_gib": Measured(
        {"": 1.0, "g": 1.0, "gib": 1.0, "gb": 1e9 / GIB, "mib": 2**-10, "mb": 1e6 / GIB, "tib": 1024.0, "tb": 1e12 / GIB},
        _PER_GPU,
        "a positive number, or a number with GiB, GB, MiB or MB",
    ),
    "state_gb": Measured({"": 1.0, "gb": 1.0}, _PER_GPU, "a positive number of GB"),
}
"""Columns of measured values."""


def measured(cells: Mapping[str, str], name: str) -> float | None:
    """Read a measured value, in the column's unit: "1.2", "~1,024", "1234 ms", "1.2 +- 0.1 s"; None if the cell is empty.

    Raises UnusableRow if the cell contains anything else, another unit or a number that is not positive.
    """
    text, kind = tidy(cells.get(name, "")), MEASURED[name]
    if not text:
        return None
    value, rest = _number(name, text, kind.wanted)
    rest = _SPREAD.sub("", re.sub(r"\(.*?\)|\[.*?\]", "", rest))
    unit = re.sub(rf"{kind.per}$", "", re.sub(r"[\s.]+", "", rest).lower())
    factor = kind.units.get(unit)
    if factor is None or not 0 < value < math.inf:
        raise _unreadable(cells, name, kind.wanted)
    return value * factor


def has_unit(cells: Mapping[str, str], name: str) -> bool:
    """Return whether a cell states its own unit."""
    return bool(re.search(r"[A-Za-z]{2}", re.sub(r"\(.*?\)|(about|approx|circa|around)\w*", "", tidy(cells.get(name, "")))))


def word(cells: Mapping[str, str], name: str, allowed: str, wanted: str) -> str:
    """Return a cell in small letters, or an empty text. Raises UnusableRow if it contains no match of a regular expression.

    Args:
        allowed: regular expression for a part of the text.
        wanted: what the cell may contain, for the error.
    """
    text = tidy(cells.get(name, "")).lower()
    if text and not re.search(allowed, text):
        raise _unreadable(cells, name, wanted)
    return text


_FORMATS = (
    r"fp-?[468]|float-?[48]|int-?[48]|e[45]m[23]|hybrid|bf-?16|bfloat|fp-?16|float-?16|\bf16|half|mixed|\bamp|fp-?32|tf-?32|float-?32"
    r"|single|^16\b|16-bit"
)


def precision_of(cells: Mapping[str, str]) -> str:
    """Return a row's precision in small letters, "fp8" for "FP-8". Raises UnusableRow if it names no format that the planner knows."""
    text = re.sub(r"\b(bf|fp|tf|int|float)[- ]?(?=\d)", r"\1", tidy(cells.get("precision", "")).lower())
    if text and not re.search(_FORMATS, text):
        raise _unreadable(cells, "precision", "a format such as bf16, fp16, fp32, FP8 or NVFP4")
    return text


_NO = re.compile(r"0(\.0*)?|no|n|false|f|off|(un|not |non-?)gated|(squared[- ]?)?(relu|gelu)(\^?2)?")
_YES = re.compile(r"1(\.0*)?|yes|y|true|t|on|gated|silu|\w*glu")


def flag(cells: Mapping[str, str], name: str) -> bool | None:
    """Read a cell that says yes or no, or whether an MLP is gated; None if it is empty. Raises UnusableRow if it says neither."""
    text = re.sub(r"\(.*?\)", "", tidy(cells.get(name, "")).lower()).strip()
    if text and not _NO.fullmatch(text) and not _YES.fullmatch(text):
        raise _unreadable(cells, name, "1 or 0")
    return bool(_YES.fullmatch(text)) if text else None


def _number(name: str, text: str, wanted: str) -> tuple[float, str]:
    """Return the number at the beginning of a text, and what follows it. A comma is decimal unless groups of three digits follow it."""
    match = re.match(rf"{_ABOUT}({_NUMBER})", text, flags=re.IGNORECASE)
    if match is None:
        raise _unreadable({name: text}, name, wanted)
    number = match[1]
    if re.search(r"\d[,_' ]\d{3}(?!\d)", number):
        number = re.sub(r"[,_' ]", "", number)
    return float(number.replace(",", ".")), text[match.end() :]


def _unreadable(cells: Mapping[str, str], name: str, wanted: str) -> UnusableRow:
    return UnusableRow(f"{name} is {cells[name]!r}, but must be {wanted}")
