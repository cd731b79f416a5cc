"""Colors and tick positions that all charts share, in matplotlib and in Plotly.

Each color has one meaning: a perceptually uniform map (*viridis*) shows values, gray the other heads, blue the bands
over all heads, the color-blind safe palette of Okabe and Ito single heads, and vermilion only alarms.
"""

from __future__ import annotations

import math

__all__ = [
    "ALARM_COLOR",
    "AXIS_INK",
    "BAND_COLOR",
    "FAINT_INK",
    "HEAD_COLORS",
    "INK",
    "OTHER_HEADS_COLOR",
    "PAPER_GRAY",
    "log_ticks",
]

ALARM_COLOR = "#D55E00"
HEAD_COLORS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
OTHER_HEADS_COLOR = "#8a929c"
BAND_COLOR = "#35608d"
INK, FAINT_INK, AXIS_INK, PAPER_GRAY = "#22262b", "#6a7078", "#b9bec5", "#e4e6e9"


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
