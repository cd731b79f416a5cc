"""Colors and tick positions that all charts share, in matplotlib and in Plotly.

Each color has one meaning: a perceptually uniform map (*viridis*) shows values, gray the other heads, blue the bands
over all heads, the color-blind safe palette of Okabe and Ito single heads, black the head
that a reader has chosen, and vermilion only alarms.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ALARM_COLOR",
    "AXIS_INK",
    "BAND_COLOR",
    "CHOSEN_COLOR",
    "DARK_COLORS",
    "FAINT_INK",
    "GRID_COLOR",
    "HEAD_COLORS",
    "INK",
    "OTHER_HEADS_COLOR",
    "PAPER_GRAY",
    "RUN_COLORS",
    "STATE_COLORS",
    "VIRIDIS",
    "color_heads",
    "head_color",
    "kind_color",
    "log_ticks",
    "spread_apart",
]

ALARM_COLOR = "#D55E00"
# One for each kind of fault, so that a kind has one color in every run.
_KIND_SHADES = {
    "logit_blowup": ALARM_COLOR,
    "key_sink": "#8C3D00",
    "dead_head": "#F2A46B",
    "rank_collapse": "#B5472F",
    "non_finite": "#5C2600",
    "broken_start": "#D98B8B",
    "mass": "#A8174E",
    "twin_heads": "#E08A2E",
    "silent_head": "#C75B7A",
}
RUN_COLORS = ("#0072B2", "#CC79A7", "#009E73", "#6A5ACD")  # runs drawn in one chart
HEAD_COLORS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CHOSEN_COLOR = "#000000"  # the head that a reader has chosen
OTHER_HEADS_COLOR = "#8a929c"
VIRIDIS = ("#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")
BAND_COLOR = "#35608d"
STATE_COLORS = {"alarm": ALARM_COLOR, "healthy": "#1F6F4A", "unknown": "#7A5600"}
INK, FAINT_INK, AXIS_INK, PAPER_GRAY = "#22262b", "#6a7078", "#b9bec5", "#e4e6e9"
GRID_COLOR = "#eceef0"
DARK_COLORS = {
    "white": "#15181c",
    INK: "#e4e7eb",
    FAINT_INK: "#9aa2ac",
    AXIS_INK: "#4c535c",
    PAPER_GRAY: "#2b3037",
    GRID_COLOR: "#262b31",
    OTHER_HEADS_COLOR: "#747c87",
    CHOSEN_COLOR: "#ffffff",
    BAND_COLOR: "#7fb0e0",
    "rgba(53,96,141,": "rgba(127,176,224,",  # the same where it is transparent
    "#8C3D00": "#c06a2c",
    "#5C2600": "#9a5a30",
}
"""What takes the place of a color on a dark page; colors of heads, runs and alarms stay what they are."""


def head_color(head: int) -> str:
    """Return the color of a head, from its index among all heads of the model.

    So it is the same in the charts of all metrics, at every sample and in every run of the model.
    """
    return HEAD_COLORS[head % len(HEAD_COLORS)]


def kind_color(kind: str) -> str:
    """Return the color of a kind of fault where several stand side by side, the same in every run.

    Kinds of a user's own rules share the shades of the others.
    """
    shades = list(_KIND_SHADES.values())
    return _KIND_SHADES.get(kind, shades[zlib.crc32(kind.encode()) % len(shades)])


def color_heads(order: Iterable[int], most: int) -> dict[int, str]:
    """Return the first ``most`` heads of ``order`` that differ in `head_color`, each with its color.

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
    """Return round values from ``low`` to ``high`` for ticks of a logarithmic axis, three or more where possible.

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


def spread_apart(heights: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """Return ascending heights moved as little as needed to lie ``gap`` apart and, while they fit, between 0 and 1.

    Example:
        >>> spread_apart(np.array([0.0, 0.01, 0.75]), 0.125).tolist()
        [0.0, 0.125, 0.75]
    """
    order = np.arange(len(heights)) * gap
    upwards = np.maximum.accumulate(heights - order) + order
    ceiling = 1 - order[::-1]
    return np.asarray(np.minimum(upwards, np.maximum(ceiling, order)))
