"""Charts as inline SVG: lines, stacked areas and heat maps that need nothing from outside the page.

Charts are drawn here, so a page is complete without scripts. The points of a chart are stored in an attribute, from which `page.SCRIPT`
shows the values under the pointer. Colours are variables of the page's style, so that they work in light and dark mode.

If a curve has more points than a chart has room for, groups of neighbouring points are drawn as their mean, on top of a band from their
minimum to their maximum. So a spike of one step stays visible among a million.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_mm.reporting.run_files import Curve

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 32
MAX_POINTS = 480
"""Maximum number of points of a drawn curve."""
NUM_COLOURS = 9
"""Colours of the page's style; the phases of a step need all of them."""
_LOG_RATIO = 20.0
"""A chart of positive values is logarithmic if the greatest is more than this many times the least."""


@dataclass(frozen=True)
class Series:
    """A named curve of a chart."""

    name: str
    curve: Curve
    colour: int
    """Number of one of the page's colours."""
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A step at which something happened: a vertical line."""

    step: int
    text: str
    kind: str = "event"
    """event, resume or alert."""


@dataclass(frozen=True)
class _Drawn:
    """A curve reduced to at most MAX_POINTS points."""

    steps: np.ndarray
    mean: np.ndarray
    least: np.ndarray
    most: np.ndarray


def _few(curve: Curve) -> _Drawn:
    steps, values = curve.steps.astype(float), curve.values
    if len(steps) <= MAX_POINTS:
        return _Drawn(steps, values, values, values)
    edges = np.linspace(0, len(steps), MAX_POINTS + 1).astype(int)
    parts = [slice(a, b) for a, b in pairwise(edges.tolist())]
    finite = np.isfinite(values)

    def over(function: Any) -> np.ndarray:
        return np.array([function(values[p][finite[p]]) if finite[p].any() else math.nan for p in parts])

    return _Drawn(np.array([steps[p].mean() for p in parts]), over(np.mean), over(np.min), over(np.max))


@dataclass(frozen=True)
class _Axis:
    """Maps values to positions on the page."""

    least: float
    most: float
    log: bool
    begin: float
    end: float

    def place(self, values: Any) -> Any:
        if self.log:
            values, least, most = np.log10(values), math.log10(self.least), math.log10(self.most)
        else:
            least, most = self.least, self.most
        return self.begin + (values - least) / ((most - least) or 1.0) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        if not self.log:
            return nice_ticks(self.least, self.most)
        powers = range(math.floor(math.log10(self.least)), math.ceil(math.log10(self.most)) + 1)
        factors = (1, 2, 5) if len(powers) <= 3 else (1,)
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if self.least <= value <= self.most]
        return found[:: max(1, math.ceil(len(found) / 7))] if len(found) > 1 else nice_ticks(self.least, self.most)


def nice_ticks(least: float, most: float, *, count: int = 5) -> list[float]:
    """Round numbers between two values.

    >>> nice_ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not most > least:
        return [least]
    raw = (most - least) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(least / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(most / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters: 1234567 is 1.23M.

    >>> [short(v) for v in (0, 0.00012, 0.5, 12.345, 1234, 5_000_000, 2.5e13)]
    ['0', '1.2e-4', '0.5', '12.3', '1,234', '5M', '25T']
    """
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size == 0:
        return "0"
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (2e4, "k")):
        if size >= limit:
            scaled = value / {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}[letter]
            return f"{scaled:.3g}{letter}" if abs(scaled) < 1000 else f"{scaled:,.0f}{letter}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}"


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    unit: str = "",
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
    most: float | None = None,
) -> str:
    """Lines over steps as an HTML figure; an empty string if no series has a finite value.

    Args:
        unit: unit of the values, in a few words.
        from_zero: whether the value axis begins at 0.
        most: greatest possible value, at which the axis ends.
    """
    series = [one for one in series if np.isfinite(one.curve.values).any()]
    if not series:
        return ""
    drawn = [_few(one.curve) for one in series]
    x, y = _axes(drawn, from_zero=from_zero, limit=most)
    parts = [*_grid(x, y), *_marks(marks, x)]
    for number, (one, points) in enumerate(zip(series, drawn, strict=True)):
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        shapes = [_band(points, x, y)] if points.least is not points.mean else []
        shapes.append(f'<path class="line" d="{_path(points.steps, points.mean, x, y)}"{dash}/>')
        dots = np.isfinite(points.mean) if len(points.steps) < 40 else _alone(points.mean)
        shapes += [f'<circle r="2.4" cx="{cx:.1f}" cy="{cy:.1f}"/>' for cx, cy in _places(points.steps[dots], points.mean[dots], x, y)]
        parts.append(f'<g data-s="{number}" style="--c:var(--c{one.colour % NUM_COLOURS})">{"".join(shapes)}</g>')
    return _figure(title, unit, parts, series, drawn, x, y)


def stacked_chart(series: Sequence[Series], *, title: str, unit: str = "", marks: Sequence[Mark] = ()) -> str:
    """Stacked areas of curves that have the same steps; an empty string if there is nothing to draw."""
    if not series or not len(series[0].curve):
        return ""
    drawn = [_few(Curve(one.curve.steps, np.nan_to_num(one.curve.values))) for one in series]
    sums = np.cumsum([points.mean for points in drawn], axis=0)
    steps = drawn[0].steps
    if len(steps) == 1:
        steps, sums = np.array([steps[0] - 0.5, steps[0] + 0.5]), np.repeat(sums, 2, axis=1)
    x = _Axis(float(steps[0]), float(steps[-1]), False, LEFT, WIDTH - RIGHT)
    y = _Axis(0.0, float(sums[-1].max()) * 1.04 or 1.0, False, HEIGHT - BOTTOM, TOP)
    parts = list(_grid(x, y))
    below = np.zeros_like(steps)
    for number, (one, above) in enumerate(zip(series, sums, strict=True)):
        forth = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.place(steps), y.place(above), strict=True))
        back = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.place(steps[::-1]), y.place(below[::-1]), strict=True))
        parts.append(
            f'<g data-s="{number}" style="--c:var(--c{one.colour % NUM_COLOURS})"><polygon class="area" points="{forth} {back}"/></g>'
        )
        below = above
    parts += _marks(marks, x)
    return _figure(title, unit, parts, series, drawn, x, y)


def heat_map(values: np.ndarray, *, title: str, rows: Sequence[str], row_title: str, column_title: str, note: str = "") -> str:
    """A table of numbers around 1 as colours: blue is less, red is more.

    Args:
        values: [rows, columns].
    """
    num_rows, columns = values.shape
    wide, high = (WIDTH - LEFT - RIGHT) / columns, min(26.0, 220.0 / num_rows)
    height = TOP + high * num_rows + BOTTOM
    parts = []
    for r, row in enumerate(values):
        parts.append(f'<text x="{LEFT - 6}" y="{TOP + (r + 0.5) * high + 4:.1f}" text-anchor="end">{html.escape(rows[r])}</text>')
        for c, value in enumerate(row.tolist()):
            away = max(-1.0, min(1.0, value - 1.0)) if math.isfinite(value) else 0.0
            colour = "var(--hot)" if away > 0 else "var(--cold)"
            parts.append(
                f'<rect x="{LEFT + c * wide:.1f}" y="{TOP + r * high:.1f}" width="{max(0.5, wide - 0.6):.1f}" height="{high - 1:.1f}" '
                f'fill="{colour}" fill-opacity="{abs(away):.2f}"><title>{html.escape(row_title)} {html.escape(rows[r])}, '
                f"{html.escape(column_title)} {c}: {value:.2f}</title></rect>"
            )
    parts += [
        f'<text x="{LEFT + (c + 0.5) * wide:.1f}" y="{height - BOTTOM + 15:.1f}" text-anchor="middle">{c}</text>'
        for c in range(0, columns, max(1, columns // 16))
    ]
    parts.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{num_rows * high:.1f}"/>')
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)} <span class="unit">{html.escape(note)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
        f'<p class="unit">rows: {html.escape(row_title)}, columns: {html.escape(column_title)}</p></figure>'
    )


# ----------------------------------------------------------------------------------------------------------------- parts


def _axes(drawn: Sequence[_Drawn], *, from_zero: bool, limit: float | None) -> tuple[_Axis, _Axis]:
    steps = np.concatenate([points.steps for points in drawn])
    values = np.concatenate([part[np.isfinite(part)] for points in drawn for part in (points.least, points.most)])
    least, most = float(values.min()), float(values.max())
    log = not from_zero and least > 0 and most / least > _LOG_RATIO
    if log:
        least, most = least / 1.1, most * 1.1
    else:
        room = 0.05 * (most - least) or 0.05 * abs(most) or 1.0
        least, most = (min(0.0, least) if from_zero or 0 <= least < room else least - room), most + room
        most = most if limit is None else min(most, max(limit, most - room))
    first, last = float(steps.min()), float(steps.max())
    if first == last:
        first, last = first - 0.5, last + 0.5
    return _Axis(first, last, False, LEFT, WIDTH - RIGHT), _Axis(least, most, log, HEIGHT - BOTTOM, TOP)


def _grid(x: _Axis, y: _Axis) -> Iterable[str]:
    for value in y.ticks():
        place = float(y.place(value))
        yield f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{short(value)}</text>'
    for value in [tick for tick in x.ticks() if tick == round(tick)]:  # steps are whole
        yield f'<text x="{float(x.place(value)):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{short(value)}</text>'
    yield f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>'
    yield f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'


def _marks(marks: Sequence[Mark], x: _Axis) -> list[str]:
    return [
        f'<path class="mark {mark.kind}" d="M{float(x.place(mark.step)):.1f} {TOP}V{HEIGHT - BOTTOM}"><title>step {mark.step}: '
        f"{html.escape(mark.text)}</title></path>"
        for mark in marks
        if x.least <= mark.step <= x.most
    ]


def _places(steps: np.ndarray, values: np.ndarray, x: _Axis, y: _Axis) -> list[tuple[float, float]]:
    shown = np.isfinite(values) & ((values > 0) if y.log else True)
    return list(zip(x.place(steps[shown]).tolist(), y.place(values[shown]).tolist(), strict=True))


def _alone(values: np.ndarray) -> np.ndarray:
    """Mask of the values with a gap on both sides, which no line goes through."""
    finite = np.pad(np.isfinite(values), 1)
    return finite[1:-1] & ~finite[:-2] & ~finite[2:]


def _path(steps: np.ndarray, values: np.ndarray, x: _Axis, y: _Axis) -> str:
    """A line with gaps where a value is not finite."""
    parts, pen = [], "M"
    for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        if not math.isfinite(value) or (y.log and value <= 0):
            pen = "M"
            continue
        parts.append(f"{pen}{float(x.place(step)):.1f} {float(y.place(value)):.1f}")
        pen = "L"
    return "".join(parts)


def _band(points: _Drawn, x: _Axis, y: _Axis) -> str:
    forth = _places(points.steps, points.most, x, y)
    back = _places(points.steps, points.least, x, y)[::-1]
    corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in (*forth, *back))
    return f'<polygon class="band" points="{corners}"/>'


def _round(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]


def _attribute(text: str) -> str:
    """JSON for a single-quoted attribute, which is shorter than if every double quote were escaped."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("'", "&#39;")


def _figure(title: str, unit: str, parts: Sequence[str], series: Sequence[Series], drawn: Sequence[_Drawn], x: _Axis, y: _Axis) -> str:
    legend = "".join(
        f'<button type="button" data-s="{number}" style="--c:var(--c{one.colour % NUM_COLOURS})">{html.escape(one.name)}</button>'
        for number, one in enumerate(series)
    )
    data = {
        "x": [x.least, x.most, x.begin, x.end],
        "s": [
            {"n": one.name, "c": one.colour % NUM_COLOURS, "x": [round(v, 1) for v in points.steps.tolist()], "y": _round(points.mean)}
            for one, points in zip(series, drawn, strict=True)
        ],
    }
    about = ", ".join(filter(None, [unit, "logarithmic" if y.log else ""]))
    return (
        f"<figure class=\"chart\" data-chart='{_attribute(json.dumps(data, separators=(',', ':')))}'>"
        f'<figcaption>{html.escape(title)} <span class="unit">{html.escape(about)}</span></figcaption>'
        f'<div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}'
        f'<path class="cursor" d=""/></svg><div class="tip" hidden></div></div>'
        f'<div class="legend">{legend}</div></figure>'
    )
