"""A plot of ratios as SVG: a dot and its spread for each line, on a logarithmic axis, for light and dark pages."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple


class Line(NamedTuple):
    """One peer's ratios, one for each round, and what is wanted of their median."""

    label: str
    values: Sequence[float]
    floor: float | None = None
    aim: float | None = None


class Group(NamedTuple):
    title: str
    lines: Sequence[Line]


# Colours are written out for both kinds of page: some programs that show pictures know no variables.
_LIGHT = {
    "PAGE": "#ffffff",
    "INK": "#1f2328",
    "FAINT": "#59636e",
    "GRID": "#d1d9e0",
    "DOT": "#0969da",
    "LOW": "#bc4c00",
}
_DARK = {"PAGE": "#0d1117", "INK": "#f0f6fc", "FAINT": "#9198a1", "GRID": "#3d444d", "DOT": "#4493f8", "LOW": "#f0883e"}
_COLOURS = """
text { fill: INK } .faint { fill: FAINT } .page { fill: PAGE } .grid { stroke: GRID } .one { stroke: FAINT }
.dot, .fine { fill: DOT } .spread { stroke: DOT } .low .dot, .under { fill: LOW } .low .spread { stroke: LOW }
.floor { stroke: INK } .aim { stroke: INK }
"""
_SHAPES = """
text { font: 12px system-ui, sans-serif } .title { font-size: 15px; font-weight: 600 } .group { font-weight: 600 }
.spread { stroke-width: 2.5; stroke-opacity: .45 } .floor { stroke-width: 2 } .aim { fill: none; stroke-width: 1.3 }
"""


def _coloured(colours: Mapping[str, str]) -> str:
    return re.sub("[A-Z]{3,}", lambda name: colours[name[0]], _COLOURS)


_STYLE = f"{_SHAPES}{_coloured(_LIGHT)}@media (prefers-color-scheme: dark) {{{_coloured(_DARK)}}}"
_LEFT, _RIGHT, _LINE, _TOP = 190, 800, 19, 64
_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def _number(value: float) -> str:
    return f"×{value:.0f}" if value >= 10 else f"×{value:.2g}"


def plot(title: str, groups: Sequence[Group]) -> str:
    """The picture; lines whose median is below their floor have another colour."""
    numbers = [bound for group in groups for line in group.lines for bound in (*line.values, *line[2:]) if bound]
    low = max(step for step in _STEPS if step <= max(0.1, min([*numbers, 1])))
    high = min((step for step in _STEPS if step >= max([*numbers, 2])), default=_STEPS[-1])
    scale = (_RIGHT - _LEFT) / math.log(high / low)

    def x(value: float) -> float:
        return round(_LEFT + math.log(min(max(value, low), high) / low) * scale, 1)

    height = _TOP + sum(_LINE * (len(group.lines) + 1) + 8 for group in groups) + 34
    bottom = height - 34
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 870 {height}" width="870" height="{height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect class="page" width="870" height="{height}"/><text class="title" x="16" y="26">{escape(title)}</text>',
    ]
    for step in _STEPS:
        if low <= step <= high:
            out.append(
                f'<line class="{"one" if step == 1 else "grid"}" x1="{x(step)}" x2="{x(step)}" y1="{_TOP - 6}"'
                f' y2="{bottom}"/>'
                f'<text class="faint" x="{x(step)}" y="{_TOP - 12}" text-anchor="middle">×{step:g}</text>'
            )
    y = _TOP
    for group in groups:
        y += _LINE
        out.append(
            f'<rect class="page" x="12" y="{y - 13}" width="{7.2 * len(group.title):.0f}" height="18"/>'
            f'<text class="group" x="16" y="{y}">{escape(group.title)}</text>'
        )
        for line in group.lines:
            y += _LINE
            middle, least, most = statistics.median(line.values), min(line.values), max(line.values)
            out.append(f'<g class="{"low" if line.floor and middle < line.floor else "kept"}">')
            out.append(f'<text x="{_LEFT - 14}" y="{y}" text-anchor="end">{escape(line.label)}</text>')
            out.append(f'<line class="spread" x1="{x(least)}" x2="{x(most)}" y1="{y - 4}" y2="{y - 4}"/>')
            if line.floor:
                out.append(
                    f'<line class="floor" x1="{x(line.floor)}" x2="{x(line.floor)}" y1="{y - 10}" y2="{y + 2}"/>'
                )
            if line.aim:
                at = x(line.aim)
                out.append(f'<path class="aim" d="M{at} {y - 9.5}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>')
            out.append(f'<circle class="dot" cx="{x(middle)}" cy="{y - 4}" r="4.5"/>')
            out.append(f'<text x="{_RIGHT + 14}" y="{y}">{_number(middle)}</text></g>')
        y += 8
    legend = (
        '<tspan class="fine">●</tspan> median of the rounds, and its spread (<tspan class="under">●</tspan> below the'
    )
    legend += " floor) · ┃ floor · ◇ aim · right of ×1 we do more"
    out += [f'<text class="faint" x="16" y="{height - 12}">{legend}</text>', "</svg>"]
    return "\n".join(out) + "\n"
