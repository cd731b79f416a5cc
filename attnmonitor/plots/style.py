"""Axes, titles and ticks of the figures that matplotlib draws."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from attnmonitor.summary.style import AXIS_INK, FAINT_INK, GRID_COLOR, INK, log_ticks


def new_axes() -> Axes:
    """Axes on a new figure outside pyplot's list of figures."""
    return new_figure(8, 4.2).add_subplot()


def new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot's list of figures, ``width`` × ``height`` inches, with a margin around what is drawn."""
    margin = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)  # inches; matplotlib's 0.04 lets titles touch the edge
    return Figure(figsize=(width, height), layout=margin)


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Draw a figure and return its pixels, ``(height, width, 3)``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # once, where `savefig` draws twice
    return np.asarray(canvas.buffer_rgba())[..., :3]


def figure_of(ax: Axes) -> Figure:
    """The figure that ``ax`` is drawn on, also where it belongs to a sub-figure."""
    figure = ax.get_figure(root=True)
    assert figure is not None, "ax: these axes were removed from their figure; pass axes that belong to one"
    return figure


def title(ax: Axes, text: str, note: str = "") -> None:
    """Write a title above ``ax``, with a note in small print at its right."""
    ax.set_title(text, loc="left", fontsize=11, fontweight="bold", color=INK)
    if note:
        ax.set_title(note, loc="right", fontsize=8, color=FAINT_INK)


def strip(ax: Axes) -> None:
    """Reduce the axes to two thin lines, small labels and a faint grid."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(AXIS_INK)
    ax.tick_params(labelsize=8, color=AXIS_INK)
    ax.grid(True, axis="y", color=GRID_COLOR, linewidth=0.8)
    ax.set_axisbelow(True)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(fontsize=9, color=FAINT_INK)


def fix_y_axis(ax: Axes) -> None:
    """Fix the limits of the y axis; on a logarithmic axis, label a few round values with plain numbers."""
    low, high = ax.get_ylim()
    if ax.get_yscale() == "log":
        ticks = round_values(low, high, log=True)
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(low, high)


def round_values(low: float, high: float, *, log: bool) -> list[float]:
    """A few round values from ``low`` to ``high`` for ticks."""
    ticks = log_ticks(low, high) if log else []
    return ticks if len(ticks) >= 3 else [float(x) for x in MaxNLocator(4).tick_values(low, high) if low <= x <= high]
