"""Curves of heads over training: thin and gray or as quantile bands, with a few named heads on top.

Named are the heads with alarms and those furthest from the rest; the name stands at the end of the curve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from attnmonitor.metrics.catalog import is_log, metric_scope, metric_title, metric_unit
from attnmonitor.plots.style import figure_of, fix_y_axis, new_axes, new_figure, strip, title
from attnmonitor.sample import AlertEvent, LayerCoverage, Scope, heads_concerned, scoped_head_name, still_firing
from attnmonitor.summary.names import count_text, short_layer_names
from attnmonitor.summary.outliers import outlier_heads
from attnmonitor.summary.style import ALARM_COLOR, BAND_COLOR, OTHER_HEADS_COLOR, color_heads, head_color, spread_apart

__all__ = ["bands", "label_ends", "mark_events", "measured_samples", "over_steps", "point_marker", "trajectories"]

Events = Sequence[AlertEvent]
Coverage = Mapping[str, LayerCoverage]


def trajectories(
    values: Mapping[str, ArrayLike],
    steps: ArrayLike,
    *,
    metric: str | None = None,
    events: Events = (),
    coverage: Coverage | None = None,
    num_named: int = 5,
    ax: Axes | None = None,
) -> Figure:
    """Every head's curve over training in gray; heads with alarms and those furthest from the rest in color, named.

    Args:
        values: For each layer ``(num_samples, num_heads)``, as `RunRecord.trajectories` gives them.
        steps: Optimizer steps done, ``(num_samples,)``.
        metric: Name from the catalog, for title, unit and scale.
        events: Alarms that began and cleared: a triangle at the top of the chart where one began.
        coverage: Lets an alarm about a KV head color its query heads and the other way round.
        num_named: How many curves are named.
        ax: Axes to draw into; by default a new figure.

    Returns:
        The figure.
    """
    ax = _time_axes(ax, metric)
    steps, values = measured_samples(steps, values)
    num_curves = sum(curves.shape[1] for curves in values.values())
    for curves in values.values():
        points = np.stack(np.broadcast_arrays(steps[:, None], curves), axis=-1)  # (num_samples, num_heads, 2)
        lines = LineCollection(list(points.swapaxes(0, 1)), colors=OTHER_HEADS_COLOR, linewidths=0.6, rasterized=True)
        lines.set_alpha(max(0.12, min(0.6, 30 / num_curves)))
        ax.add_collection(lines, autolim=False)
        if len(steps) == 1:  # a line of one point is not drawn
            ax.plot(*points.reshape(-1, 2).T, ".", color=OTHER_HEADS_COLOR, markersize=4)
        ax.update_datalim(points.reshape(-1, 2))  # autolim of matplotlib 3.10 takes their logarithms on a log scale
    title(ax, metric_title(metric), f"each of {count_text(num_curves, 'head')}")
    ax.autoscale_view()
    _name_heads(ax, steps, values, metric, events, coverage, num_named)
    return figure_of(ax)


def bands_over(metrics: Mapping[str, Mapping[str, ArrayLike]], steps: ArrayLike) -> Figure:
    """One `bands` chart per metric, below each other: ``metrics[metric][layer]`` is ``(num_samples, num_heads)``."""
    figure = new_figure(7, 2.6 * len(metrics))
    for (metric, heads), ax in zip(metrics.items(), figure.subplots(len(metrics), squeeze=False)[:, 0], strict=True):
        bands(heads, steps, metric=metric, ax=ax)
    return figure


def bands(
    values: Mapping[str, ArrayLike],
    steps: ArrayLike,
    *,
    metric: str | None = None,
    events: Events = (),
    coverage: Coverage | None = None,
    num_named: int = 0,
    ax: Axes | None = None,
) -> Figure:
    """The whole model over training: median, quartiles and range over all heads.

    Args:
        values: For each layer ``(num_samples, num_heads)``.
        steps: Optimizer steps done, ``(num_samples,)``.
        metric: Name from the catalog, for title, unit and scale.
        events: Alarms that began and cleared.
        coverage: As for `trajectories`.
        num_named: How many heads, those with alarms first, are drawn on top with their names.
        ax: Axes to draw into; by default a new figure.

    Returns:
        The figure.
    """
    ax = _time_axes(ax, metric)
    steps, values = measured_samples(steps, values)
    if values and len(steps):
        heads = np.concatenate(list(values.values()), axis=1)
        least, low, median, high, most = np.nanquantile(heads, [0, 0.25, 0.5, 0.75, 1], axis=1)
        ax.fill_between(steps, least, most, color=BAND_COLOR, alpha=0.13, linewidth=0, label="all heads")
        ax.fill_between(steps, low, high, color=BAND_COLOR, alpha=0.32, linewidth=0, label="half of the heads")
        ax.plot(steps, median, color=BAND_COLOR, linewidth=1.8, marker=point_marker(steps), label="median head")
        title(ax, metric_title(metric), f"median, quartiles and range of {count_text(heads.shape[1], 'head')}")
    ax.autoscale_view()
    _name_heads(ax, steps, values, metric, events, coverage, num_named)
    return figure_of(ax)


def _time_axes(ax: Axes | None, metric: str | None) -> Axes:
    ax = new_axes() if ax is None else ax
    if is_log(metric):
        ax.set_yscale("log", nonpositive="mask")
    title(ax, metric_title(metric))
    ax.set(ylabel=metric_unit(metric) or metric_title(metric))
    over_steps(ax)
    return ax


def over_steps(ax: Axes) -> None:
    """Make the horizontal axis one of optimizer steps."""
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    strip(ax)


def point_marker(steps: Sequence[Any] | NDArray[Any]) -> str:
    """A point for a curve of one sample, which has no line."""
    return "o" if len(steps) == 1 else ""


def measured_samples(
    steps: ArrayLike, values: Mapping[str, ArrayLike]
) -> tuple[NDArray[Any], dict[str, NDArray[np.float64]]]:
    """Leave out samples without any number, so that metrics of a slower schedule keep whole curves."""
    curves = {layer: np.asarray(heads, dtype=np.float64) for layer, heads in values.items()}
    known = np.zeros(len(np.asarray(steps)), dtype=bool)
    for heads in curves.values():
        known |= np.isfinite(heads).any(axis=1)
    return np.asarray(steps)[known], {layer: heads[known] for layer, heads in curves.items()}


def _name_heads(
    ax: Axes,
    steps: NDArray[Any],
    values: Mapping[str, NDArray[np.float64]],
    metric: str | None,
    events: Events,
    coverage: Coverage | None,
    num_named: int,
) -> None:
    """Draw heads with alarms and the furthest ones over the others, and mark where alarms began and (hollow) ended."""
    mark_events(ax, events)
    scope = metric_scope(metric)
    alarmed = list(dict.fromkeys(_alarmed_heads(values, scope, events, coverage)))
    last = {layer: heads[-1] for layer, heads in values.items()} if len(steps) else {}
    places = [(layer, head) for layer, curves in values.items() for head in range(curves.shape[1])]
    column_of = {place: column for column, place in enumerate(places)}
    outliers = [(head.layer, head.head) for head in outlier_heads(last, metric or "", len(places))]
    order = [column_of[head] for head in outliers if head not in alarmed]
    num_others = max(0, num_named - len(alarmed))
    others = color_heads(order, num_others)
    # Every curve has its name at its end, so where colors run out two heads may share one.
    others |= {at: head_color(at) for at in [at for at in order if at not in others][: num_others - len(others)]}
    colors = {**dict.fromkeys(alarmed, ALARM_COLOR), **{places[at]: color for at, color in others.items()}}
    short, ends = short_layer_names(values), []
    for at, ((layer, head), color) in enumerate(colors.items()):
        curve = values[layer][:, head]
        ax.plot(steps, curve, color=color, linewidth=1.7, marker=point_marker(steps), solid_capstyle="round")
        if at < num_named and np.isfinite(curve).any():
            name = scoped_head_name(short[layer], head, scope, (coverage or {}).get(layer))
            ends.append((float(curve[np.isfinite(curve)][-1]), name, color))
    fix_y_axis(ax)
    label_ends(ax, ends)


def mark_events(ax: Axes, events: Events) -> None:
    """Put a triangle above the step of each event, hollow where an alarm ended."""
    for event in events:
        ax.plot(
            event.global_step,
            1.0,
            "v",
            markerfacecolor=ALARM_COLOR if event.state == "firing" else "white",
            markeredgecolor=ALARM_COLOR,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
        )


def _alarmed_heads(
    values: Mapping[str, NDArray[np.float64]], scope: Scope | None, events: Events, coverage: Coverage | None
) -> Iterator[tuple[str, int]]:
    for event in (*still_firing(events), *events):  # the worst first, so that it has its name
        if event.layer is not None and event.layer in values and event.state == "firing":
            for head in heads_concerned(event, scope, coverage):
                if head < values[event.layer].shape[1]:
                    yield event.layer, head


def label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write names in their colors at the right edge, moved apart so that they do not overlap.

    Args:
        ax: The axes.
        ends: Last value, name and color of each curve.
    """
    ends = sorted(ends)
    points = ax.transData.transform([(0.0, value) for value, _, _ in ends]) if ends else np.empty((0, 2))
    heights = ax.transAxes.inverted().transform(points)[:, 1] if ends else points[:, 1]
    for (_, text, color), height, label_height in zip(ends, heights, spread_apart(heights, 0.07), strict=True):
        ax.annotate(
            text,
            xy=(1.0, height),
            xytext=(1.025, label_height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),  # from the left edge of the name: lines do not cross other names
                "color": color,
                "linewidth": 0.7,
                "shrinkA": 0,
                "shrinkB": 0,
            },
            annotation_clip=False,
            color=color,
            fontsize=8,
            va="center",
        )
