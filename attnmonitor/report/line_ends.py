"""Names at the ends of the lines of a tracker's chart, in place of a legend.

Trackers show a chart at about 420 × 300 pixels. A legend of a dozen entries takes half of that; at the end of its line
a name takes a strip at the right, and no colors need to be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from attnmonitor.report.traces import Chart, base_layout
from attnmonitor.summary.style import spread_apart

__all__ = ["labeled_layout"]

_HEIGHT = 300  # pixels, of a tracker's panel
_FONT = 10
_CHARACTER, _LINE = 5.7, 12.5  # pixels, of that font
_TOP, _BOTTOM, _LEFT = 46, 24, 44  # margins
_ROOM = 0.04  # of the range of values, above and below them


def labeled_layout(title: str, note: str, traces: Sequence[Chart], labels: Mapping[str, str], axis: Chart) -> Chart:
    """Layout of a chart whose lines have their names at their ends, moved apart where they would overlap.

    Args:
        title: What is drawn.
        note: What the bands are; in small print below the title.
        traces: The lines, with their numbers.
        labels: What to write at the end of a line, by the name of its trace.
        axis: The vertical axis.
    """
    layout = base_layout(f"{title}<br><span style='font-size: {_FONT}px'>{note}</span>")
    layout["title"]["font"]["size"] = 12
    scale = np.log10 if axis["type"] == "log" else np.asarray
    values = [np.array([np.nan if y is None else y for y in trace["y"]], dtype=np.float64) for trace in traces]
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = [np.where(np.isfinite(scaled := scale(y)), scaled, np.nan) for y in values]
    known = np.concatenate([y[~np.isnan(y)] for y in drawn]) if drawn else np.empty(0)
    if not known.size:
        return {**layout, "yaxis": axis}
    low, high = float(known.min()), float(known.max())
    room = _ROOM * ((high - low) or abs(high) or 1.0)
    low, high = low - room, high + room
    ends = [
        ((y[~np.isnan(y)][-1] - low) / (high - low), labels[trace["name"]], trace["line"]["color"])
        for trace, y in zip(traces, drawn, strict=True)
        if trace["name"] in labels and not np.isnan(y).all()
    ]
    ends.sort()
    heights = spread_apart(np.array([height for height, _, _ in ends]), _LINE / (_HEIGHT - _TOP - _BOTTOM))
    longest = max((len(text) for _, text, _ in ends), default=0)
    return {
        **layout,
        "showlegend": False,
        "margin": {"l": _LEFT, "r": math.ceil(8 + _CHARACTER * longest), "t": _TOP, "b": _BOTTOM},
        "yaxis": {**axis, "range": [low, high], "automargin": False},
        "annotations": [
            _name_at(height, text, color) for height, (_, text, color) in zip(heights.tolist(), ends, strict=True)
        ],
    }


def _name_at(height: float, text: str, color: str) -> Chart:
    where = {"xref": "paper", "x": 1, "xanchor": "left", "xshift": 3, "yref": "paper", "y": height, "yanchor": "middle"}
    return {**where, "text": text, "font": {"size": _FONT, "color": color}, "showarrow": False}
