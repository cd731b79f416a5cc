"""What training logs, over the steps of the heads' curves: losses, and the learning rate dotted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnmonitor.plots.curves import label_ends, mark_events, over_steps, point_marker
from attnmonitor.plots.style import figure_of, new_axes, strip, title
from attnmonitor.record.training_log import Curve
from attnmonitor.sample import AlertEvent
from attnmonitor.summary.logged import logged_title
from attnmonitor.summary.style import FAINT_INK, INK, OTHER_HEADS_COLOR

__all__ = ["loss"]


def loss(logged: Mapping[str, Curve], *, events: Sequence[AlertEvent] = (), ax: Axes | None = None) -> Figure:
    """Losses and the learning rate over training, with the steps at which alarms of heads began and ended.

    Args:
        logged: Pairs of step and value by name, as `RunRecord.logged` gives them: losses and a learning rate.
        events: Alarms that began and cleared.
        ax: Axes to draw into; by default a new figure.

    Returns:
        The figure.
    """
    ax = new_axes() if ax is None else ax
    over_steps(ax)
    rates = {name: curve for name, curve in logged.items() if logged_title(name) == "learning rate"}
    losses = {name: curve for name, curve in logged.items() if name not in rates}
    title(ax, " and ".join(losses or rates), f"dotted: {', '.join(rates)}" if losses and rates else "")
    ends = []
    for (name, curve), color in zip(losses.items(), (INK, FAINT_INK), strict=False):
        steps, values = np.array(curve, dtype=np.float64).T
        ax.plot(steps, values, color=color, linewidth=1.6, marker=point_marker(steps))
        if np.isfinite(values).any():
            ends.append((float(values[np.isfinite(values)][-1]), name, color))
    for curve in rates.values():
        beside = ax.twinx() if losses else ax
        beside.plot(*np.array(curve, dtype=np.float64).T, color=OTHER_HEADS_COLOR, linewidth=1.2, linestyle=":")
        if losses:
            strip(beside)
            beside.set_axis_off()
    mark_events(ax, events)
    ax.set_ylim(*ax.get_ylim())
    label_ends(ax, ends)
    return figure_of(ax)
