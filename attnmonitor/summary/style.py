"""Colors and tick positions that all charts share, in matplotlib and in Plotly.

Each color has one meaning: a perceptually uniform map (*viridis*) shows values, gray the other heads, blue the bands
over all heads, the color-blind safe palette of Okabe and Ito single heads, black the head
that a reader has chosen, and vermilion only alarms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = [
    "ALARM_COLOR",
    "ALARM_SHADES",
    "AXIS_INK",
    "BAND_COLOR",
    "CHOSEN_COLOR",
    "FAINT_INK",
    "HEAD_COLORS",
    "INK",
    "OTHER_HEADS_COLOR",
    "PAPER_GRAY",
    "STATE_COLORS",
    "color_heads",
    "head_color",
    "log_ticks",
]

ALARM_COLOR = "#D55E00"
ALARM_SHADES = (ALARM_COLOR, "#8C3D00", "#F2A46B", "#B5472F", "#5C2600", "#D98B8B")  # kinds of faults side by side
HEAD_COLORS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CHOSEN_COLOR = "#000000"  # the head that a reader has chosen
OTHER_HEADS_COLOR = "#8a929c"
BAND_COLOR = "#35608d"
STATE_COLORS = {"alarm": ALARM_COLOR, "healthy": "#1F6F4A", "unknown": "#7A5600"}
INK, FAINT_INK, AXIS_INK, PAPER_GRAY = "#22262b", "#6a7078", "#b9bec5", "#e4e6e9"


def head_color(head: int) -> str:
    """Color of a head, from its index among all heads of the model.

    So it is the same in the charts of all metrics, at every sample and in every run of the model.
    """
    return HEAD_COLORS[head % len(HEAD_COLORS)]


def color_heads(order: Iterable[int], most: int) -> dict[int, str]:
    """The first ``most`` heads of ``order`` that differ in `head_color`, each with its color.

    Args:
        order: Indices among all heads of the model, most important first.
        most: How many are colored at most.

    Example:
        >>> color_heads([7, 2, 3], most=5)
        {7: '#CC79A7', 3: '#E69F00'}
    """
    head_of: dict[str, int] = {}
    for head in order:
        if len(head_of) < most:
            head_of.setdefault(head_color(head), head)
    return {head: color for color, head in head_of.items()}


def log_ticks(low: float, high: float) -> list[float]:
    """Round values from ``low`` to ``high`` for ticks of a logarithmic axis, three or more where the range has them.

    Both ends are positive.

    Example:
        >>> log_ticks(0.8, 30)
        [1.0, 3.0, 10.0, 30.0]
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [mantissa * 10.0**decade for decade in decades for mantissa in mantissas]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks
