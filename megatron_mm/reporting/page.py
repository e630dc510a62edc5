"""The frame of a report: style for light and dark mode, and the script that shows the values under the pointer.

The page is self-contained, so it can be mailed, and opened without a network.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --ink:#1c2330; --soft:#5b6678; --paper:#fff; --card:#f7f8fa; --rule:#dfe3ea; --hot:#c8321f;
 --cold:#1f62c8; --c0:#2563b8; --c1:#d9662b; --c2:#2b8a5a; --c3:#9b3fa5; --c4:#b08a00; --c5:#008c9e; --c6:#c23b5a;
 --c7:#6b7280; --c8:#6fae2e; --warn:#b3541e }
@media (prefers-color-scheme: dark) {
 :root { --ink:#e4e8ef; --soft:#98a3b5; --paper:#14171d; --card:#1c2129; --rule:#323a47; --hot:#ff7a66; --cold:#6aa5ff;
 --c0:#6ea8ff; --c1:#ff9a5c; --c2:#5cc992; --c3:#d98be2; --c4:#e0bc3f; --c5:#4ccbdc; --c6:#ff86a3; --c7:#a4adba; --c8:#a5d65a;
 --warn:#ffb27a } }
* { box-sizing: border-box }
body { font: 14px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 84em; padding: 1.5em 1.2em 4em; color: var(--ink);
 background: var(--paper) }
h1 { font-size: 1.5em; margin: 0 0 .2em }
h2 { font-size: 1.2em; margin: 2.2em 0 .6em; padding-bottom: .3em; border-bottom: 1px solid var(--rule) }
h3 { font-size: 1em; margin: 1.2em 0 .4em }
nav { display: flex; flex-wrap: wrap; gap: .2em 1.1em; margin: .8em 0 } nav a { color: var(--c0); text-decoration: none }
nav a:hover { text-decoration: underline }
.unit, .note { color: var(--soft); font-size: 12px; font-weight: 400 } p.unit { margin: .1em 0 0 }
.missing { color: var(--soft); font-style: italic } .warn { color: var(--warn) }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5em, 1fr)); gap: .6em; margin: .6em 0 1em }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .5em .8em }
.tile b { display: block; font-size: 1.3em; font-variant-numeric: tabular-nums } .tile span { color: var(--soft); font-size: 12px }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30em, 100%), 1fr)); gap: 1em }
.chart { margin: 0; padding: .7em .8em .6em; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; min-width: 0 }
.chart figcaption { font-weight: 600 } .plot { position: relative }
svg { display: block; width: 100%; height: auto; overflow: visible } svg text { font-size: 11px; fill: var(--soft) }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round } circle { fill: var(--c) }
.band { fill: var(--c); fill-opacity: .18 } .area { fill: var(--c); fill-opacity: .75 }
.grid { stroke: var(--rule); stroke-width: 1 } .axis { stroke: var(--soft) } .frame { fill: none; stroke: var(--rule) }
.cursor { stroke: var(--soft); stroke-dasharray: 2 2 } .mark { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 1 3 }
.mark.resume { stroke: var(--c2); stroke-dasharray: 4 3 } .mark.alert { stroke: var(--hot) }
.tip { position: absolute; top: 0; pointer-events: none; background: var(--paper); border: 1px solid var(--rule); border-radius: 6px;
 padding: .3em .6em; font-size: 12px; white-space: nowrap; box-shadow: 0 2px 8px #0003; font-variant-numeric: tabular-nums; z-index: 2 }
.tip i, .legend button::before, .chip::before { content: ""; display: inline-block; width: .75em; height: .75em; border-radius: 2px;
 background: var(--c); margin-right: .4em }
.legend { display: flex; flex-wrap: wrap; gap: .1em .9em; margin-top: .2em }
.legend button { all: unset; cursor: pointer; font-size: 12px; color: var(--ink) }
.legend button:focus-visible { outline: 2px solid var(--c0) }
.legend button.off { opacity: .4; text-decoration: line-through } [hidden] { display: none !important }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25em .8em .25em 0; border-bottom: 1px solid var(--rule); vertical-align: top } th { color: var(--soft);
 font-weight: 600 } td.n, th.n { text-align: right } td code { font-size: 12px; overflow-wrap: anywhere }
.captions { display: grid; grid-template-columns: repeat(auto-fill, minmax(14em, 1fr)); gap: .8em }
.caption { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .6em; font-size: 13px }
.caption img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated; float: left; margin-right: .7em;
 border-radius: 4px }
details { margin: .5em 0 } summary { cursor: pointer; color: var(--c0) }
@media print { .charts { grid-template-columns: 1fr 1fr } .chart { break-inside: avoid } nav { display: none } }
"""

SCRIPT = """
for (const figure of document.querySelectorAll('.chart[data-chart]')) {
  const data = JSON.parse(figure.dataset.chart), svg = figure.querySelector('svg'), tip = figure.querySelector('.tip');
  const cursor = figure.querySelector('.cursor'), [least, most, begin, end] = data.x, off = new Set();
  const show = v => v === null ? 'not finite' : Math.abs(v) >= 1e4 ? v.toLocaleString('en', {maximumFractionDigits: 0}) : String(v);
  const nearest = (xs, at) => { let a = 0, b = xs.length - 1; while (b - a > 1) { const m = a + b >> 1; xs[m] < at ? a = m : b = m }
    return Math.abs(xs[a] - at) <= Math.abs(xs[b] - at) ? a : b };
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), scale = 640 / box.width;
    const at = least + ((event.clientX - box.left) * scale - begin) / (end - begin) * (most - least);
    if (at < least || at > most) return leave();
    let step = null; const rows = [];
    data.s.forEach((s, n) => { if (off.has(n) || !s.x.length) return; const i = nearest(s.x, at);
      if (step === null || Math.abs(s.x[i] - at) < Math.abs(step - at)) step = s.x[i];
      const row = document.createElement('div'), dot = document.createElement('i'); dot.style.setProperty('--c', `var(--c${s.c})`);
      row.append(dot, `${s.n}  ${show(s.y[i])}`); rows.push(row) });
    if (step === null) return;
    const head = document.createElement('b'); head.textContent = `step ${Math.round(step).toLocaleString('en')}`;
    tip.replaceChildren(head, ...rows); tip.hidden = false;
    const x = begin + (step - least) / (most - least) * (end - begin); cursor.setAttribute('d', `M${x} 10V228`);
    const px = x / scale; tip.style.left = px > box.width / 2 ? `${Math.max(0, px - tip.offsetWidth - 10)}px` : `${px + 10}px`;
  });
  const leave = () => { tip.hidden = true; cursor.setAttribute('d', '') };
  svg.addEventListener('pointerleave', leave);
  for (const button of figure.querySelectorAll('.legend button')) button.addEventListener('click', () => {
    const n = Number(button.dataset.s), gone = button.classList.toggle('off'); gone ? off.add(n) : off.delete(n);
    button.setAttribute('aria-pressed', String(!gone)); svg.querySelector(`g[data-s="${n}"]`).toggleAttribute('hidden', gone) });
}
"""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    body: str


def missing(text: str) -> str:
    """The text in place of something that a run does not have."""
    return f'<p class="missing">{html.escape(text)}</p>'


def charts(*found: str) -> str:
    """Charts side by side; an empty string if all are empty."""
    shown = [one for one in found if one]
    return f'<div class="charts">{"".join(shown)}</div>' if shown else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table of cells that are already HTML.

    Args:
        numbers: indices of the right-aligned columns.
    """
    head = "".join(f'<th class="n">{cell}</th>' if n in numbers else f"<th>{cell}</th>" for n, cell in enumerate(header))
    lines = [
        "<tr>" + "".join(f'<td class="n">{cell}</td>' if n in numbers else f"<td>{cell}</td>" for n, cell in enumerate(row)) + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        lead: HTML below the title.
    """
    links = "".join(f'<a href="#{section.anchor}">{html.escape(section.title)}</a>' for section in sections)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>{lead}<nav>{links}</nav>",
        *(f'<section id="{section.anchor}"><h2>{html.escape(section.title)}</h2>{section.body}</section>' for section in sections),
        f"<script>{SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"
