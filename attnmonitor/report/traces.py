"""Parts of Plotly figures, as plain dictionaries: lines, bands, axes, grids of small charts.

A trace holds its numbers (`points`) where the figure goes to a tracker. On the page it names them (`named_numbers`),
because there one copy of the numbers serves all figures and every choice of a head; the page's script puts them in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnmonitor.metrics.catalog import is_log
from attnmonitor.summary.style import (
    ALARM_COLOR,
    AXIS_INK,
    FAINT_INK,
    GRID_COLOR,
    INK,
    OTHER_HEADS_COLOR,
    log_ticks,
)

__all__ = [
    "MEDIAN",
    "QUANTILES",
    "Chart",
    "axis",
    "bands",
    "base_layout",
    "heading",
    "line",
    "log_axis_ticks",
    "named_numbers",
    "other_heads",
    "other_points",
    "points",
    "small_charts",
    "upright_line",
    "value_axis",
]

Chart = dict[str, Any]

MEDIAN = "median head"
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_STEP_HOVER = "%{y:.5~g}<br>step %{x:,}<extra></extra>"


def points(steps: NDArray[np.int64], curve: NDArray[np.float64]) -> Chart:
    """The samples in which a curve has a number."""
    known = np.isfinite(curve)
    mode = "lines" if known.sum() > 1 else "lines+markers"
    return {"mode": mode, "x": steps[known].tolist(), "y": _short(curve[known])}


def other_points(names: Sequence[str], steps: NDArray[np.int64], curves: NDArray[np.float64]) -> Chart:
    """The curves ``(num_samples, num_heads)`` one after the other, with a gap between them."""
    return {
        "mode": "lines",
        "x": [*steps.tolist(), None] * len(names),
        "y": [number for curve in curves.T for number in (*_short(curve), None)],
        "text": [name for name in names for _ in range(len(steps) + 1)],
    }


def named_numbers(metric: str, num_samples: int, **where: Any) -> Chart:
    """Numbers that the page's script puts in: ``columns=[…]`` of the heads' values, or a ``band`` by its index."""
    return {"mode": "lines" if num_samples > 1 else "lines+markers", "meta": {"metric": metric, **where}}


def line(name: str, color: str, numbers: Chart, *, width: float, dash: str = "solid", **more: Any) -> Chart:
    """One named line."""
    style = {"color": color, "width": width, "dash": dash}
    hover = "%{fullData.name}: " + _STEP_HOVER
    return {"type": "scatter", "name": name, "line": style, "hovertemplate": hover, **numbers, **more}


def other_heads(numbers: Chart, *, color: str = OTHER_HEADS_COLOR, width: float = 0.8, **more: Any) -> Chart:
    """Many heads as one line with gaps, which browsers draw faster than many lines."""
    style, hover = {"color": color, "width": width}, "%{text}: " + _STEP_HOVER
    return {"type": "scatter", "line": style, "hovertemplate": hover, "showlegend": False, **numbers, **more}


def bands(numbers: Sequence[Chart], color: str) -> list[Chart]:
    """Range, quartiles and median over the heads: five lines in the order of `QUANTILES`, filled between."""
    if not numbers:
        return []
    least, low, median, high, most = numbers
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))

    def edge(name: str, edge_numbers: Chart, **more: Any) -> Chart:
        return line(name, f"rgba({red},{green},{blue},0.3)", edge_numbers, width=0, **more)

    def fill(alpha: float) -> Chart:
        return {"fill": "tonexty", "fillcolor": f"rgba({red},{green},{blue},{alpha})"}

    return [
        edge("least of all heads", least, showlegend=False),
        edge("all heads", most, **fill(0.13)),
        edge("lower quartile", low, showlegend=False),
        edge("half of the heads", high, **fill(0.3)),
        line(MEDIAN, color, median, width=1.6),
    ]


def upright_line(step: int, color: str, *, xref: str = "x", yref: str = "paper", dash: str = "dot") -> Chart:
    """A thin upright line over the whole height of a chart."""
    style = {"color": color, "width": 1, "dash": dash}
    return {"type": "line", "xref": xref, "yref": yref, "x0": step, "x1": step, "y0": 0, "y1": 1, "line": style}


def base_layout(title: str) -> Chart:
    """What the layouts of all charts share."""
    return {
        "title": {"text": title, "font": {"size": 14}, "x": 0.01, "xanchor": "left"},
        "legend": {"orientation": "h", "y": -0.14, "font": {"size": 10}},
        "margin": {"l": 48, "r": 12, "t": 44, "b": 24},
        "plot_bgcolor": "white",
        "template": {"layout": {}},
    }


def axis(**more: Any) -> Chart:
    """An axis with a faint grid and few ticks."""
    return {"gridcolor": GRID_COLOR, "linecolor": AXIS_INK, "zeroline": False, "automargin": True, "nticks": 5, **more}


def value_axis(metric: str, ends: tuple[float, float] | None, **more: Any) -> Chart:
    """The axis of a metric's values, from the least to the greatest value drawn; None where nothing is."""
    log_scale = is_log(metric) and ends is not None
    ticks = log_axis_ticks(*ends) if log_scale and ends is not None else {}
    return axis(tickformat="~g", type="log" if log_scale else "linear", **ticks, **more)


def log_axis_ticks(low: float, high: float) -> Chart:
    """Round tick values on a logarithmic axis; none where there are too few, and Plotly chooses."""
    ticks = log_ticks(low, high)
    return {"tickvals": ticks} if len(ticks) >= 3 else {}


def small_charts(headings: Sequence[Chart], axes: Sequence[tuple[Chart, Chart]], columns: int, gaps: Chart) -> Chart:
    """The part of a layout that places small charts in rows, with headings and axes."""
    grid = {"rows": math.ceil(len(axes) / columns), "columns": columns, "pattern": "independent", **gaps}
    layout: Chart = {"grid": grid, "annotations": []}
    for index, (small_heading, (x_axis, y_axis)) in enumerate(zip(headings, axes, strict=True)):
        number = str(index + 1) if index else ""
        layout |= {f"xaxis{number}": x_axis, f"yaxis{number}": y_axis}
        layout["annotations"].append({**small_heading, "xref": f"x{number} domain", "yref": f"y{number} domain"})
    return layout


def heading(text: str, *, note: str = "", alarmed: bool = False, size: int = 10) -> Chart:
    """The heading of a small chart."""
    return {
        "text": text + (f' <span style="color:{FAINT_INK}">{note}</span>' if note else ""),
        "x": 0,
        "y": 1,
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": size, "color": ALARM_COLOR if alarmed else INK},
    }


def _short(values: NDArray[np.float64]) -> list[float | None]:
    """Five digits, which is more than a chart shows; a gap where there is no number."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
