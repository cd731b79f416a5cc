"""Scales, layouts and lines that the figures of a page share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnmonitor.metrics.catalog import is_log
from attnmonitor.report.traces import Chart, axis, base_layout, line, named_numbers, upright_line, value_axis
from attnmonitor.summary.style import ALARM_COLOR, CHOSEN_COLOR, FAINT_INK, INK

__all__ = [
    "Numbers",
    "Scales",
    "alarm_marks",
    "chosen_lines",
    "fixed_value_axis",
    "segment_line",
    "shared_scales",
    "step_layout",
]

Numbers = Mapping[str, Any]  # what `run_numbers` returns


@dataclass(frozen=True)
class Scales:
    """Axes and color scales that all runs of a page share.

    Attributes:
        steps: Range of the axis of optimizer steps.
        ends: Least and greatest value drawn, by metric.
        limits: Ends of the color scale, by metric.
    """

    steps: tuple[float, float]
    ends: Mapping[str, tuple[float, float]]
    limits: Mapping[str, tuple[float, float]]


def shared_scales(runs: Sequence[Numbers]) -> Scales:
    """Scales on which every run of the page has room, so that runs can be compared by eye."""
    on_steps = [run["steps"] for run in runs] + [curve["steps"] for run in runs for curve in run["logged"].values()]
    steps = [step for each in on_steps for step in (each[:1] + each[-1:])] or [0, 1]
    margin = 0.015 * (max(steps) - min(steps)) or 1

    def widest(key: str) -> dict[str, tuple[float, float]]:
        found: dict[str, tuple[float, float]] = {}
        for run in runs:
            for name, metric in run["metrics"].items():
                if metric[key] is not None:
                    low, high = found.get(name, metric[key])
                    found[name] = (min(low, metric[key][0]), max(high, metric[key][1]))
        return found

    return Scales((min(steps) - margin, max(steps) + margin), widest("ends"), widest("limits"))


def step_layout(title: str, height: float, scales: Scales, segments: Sequence[int] = ()) -> Chart:
    """Layout of a figure over optimizer steps, with a line at the first step of each segment."""
    layout = base_layout(title)
    layout["title"]["font"]["size"] = 13
    layout["legend"]["traceorder"] = "normal"
    return {
        **layout,
        "height": height,
        "margin": {"l": 60, "r": 20, "t": 34 if title else 12, "b": 44},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": "white",
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        "xaxis": axis(tickformat=",d", range=scales.steps, title={"text": "optimizer step"}),
        "shapes": [segment_line(step) for step in segments],
    }


def segment_line(step: int, xref: str = "x", yref: str = "paper") -> Chart:
    """A dotted line where a segment begins: numbers do not continue across it."""
    return upright_line(step, FAINT_INK, xref=xref, yref=yref)


def fixed_value_axis(name: str, scales: Scales, **more: Any) -> Chart:
    """The axis of a metric, fixed on the range that all runs of the page share."""
    ends = scales.ends.get(name)
    if ends is None:
        return value_axis(name, None, **more)
    low, high = (math.log10(end) for end in ends) if is_log(name) else ends
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.1
    return value_axis(name, ends, range=[low - margin, high + margin], **more)


def chosen_lines(name: str, metric: Numbers, *, width: float, **more: Any) -> Chart:
    """The line of the chosen head, by whether it ever had an alarm; the script chooses."""
    numbers = named_numbers(name, len(metric["frames"]))
    return {
        "healthy": line("", CHOSEN_COLOR, numbers, width=width, **more),
        "alarmed": line("", ALARM_COLOR, numbers, width=1.4 * width, **more),
    }


def alarm_marks(size: int) -> Chart:
    """Marks on a curve where an alarm began and ended, and the shade between them; the script places them."""

    def mark(name: str, symbol: str) -> Chart:
        marker = {"symbol": symbol, "size": size, "color": ALARM_COLOR, "line": {"width": 1.5, "color": ALARM_COLOR}}
        hover = {"hovertemplate": "%{text}<extra></extra>"}
        return {"type": "scatter", "mode": "markers", "name": name, "marker": marker, "cliponaxis": False, **hover}

    shade = {"type": "rect", "layer": "below", "line": {"width": 0}, "fillcolor": ALARM_COLOR, "opacity": 0.09}
    return {
        "began": mark("alarm began", "triangle-up"),
        "ended": mark("alarm ended", "triangle-up-open"),
        "shade": {**shade, "xref": "x", "yref": "paper", "y0": 0, "y1": 1},
    }
