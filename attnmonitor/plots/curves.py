"""Heads over training: a thousand curves are a texture, a few are readable.

The crowd is drawn thin and grey, or as quantile bands. Heads that fired an alarm or stand furthest from the rest are
drawn on top, with their names at the end of the curve.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from attnmonitor.metrics.catalog import head_noun, is_log, metric_scope, metric_title, metric_unit
from attnmonitor.plots.style import figure_of, new_axes, settle_the_ordinate, strip, title
from attnmonitor.sample import AlertEvent, LayerCoverage, heads_concerned
from attnmonitor.summary.names import short_layer_names
from attnmonitor.summary.outliers import outlier_heads
from attnmonitor.summary.style import ALARM_COLOR, BAND_COLOR, HEAD_COLORS, OTHER_HEADS_COLOR

__all__ = ["bands", "measured_samples", "trajectories"]

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
    """Every head's curve over training, grey; the heads with alarms and those furthest from the rest in colour, named.

    Args:
        values: For each layer ``(num_samples, num_heads)``, as `RunRecord.trajectories` gives them.
        steps: Optimizer steps done, ``(num_samples,)``.
        metric: Name from the catalog, for title, unit and scale.
        events: Alarms that began and cleared: a triangle at the top of the chart where one began.
        coverage: Lets an alarm about a KV head colour its query heads and the other way round.
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
        ax.update_datalim(points.reshape(-1, 2))  # autolim of matplotlib 3.10 takes their logarithms on a log scale
    title(ax, metric_title(metric), f"each of {num_curves:,} heads")
    ax.autoscale_view()
    _name_heads(ax, steps, values, metric, events, coverage, num_named)
    return figure_of(ax)


def bands_over(metrics: Mapping[str, Mapping[str, ArrayLike]], steps: ArrayLike) -> Figure:
    """One `bands` chart per metric, below each other: ``metrics[metric][layer]`` is ``(num_samples, num_heads)``."""
    figure = Figure(figsize=(7, 2.6 * len(metrics)), layout="constrained")
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
    """The whole model over training: median over all heads, quartiles, and least to greatest.

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
        least, low, middle, high, most = np.nanquantile(heads, [0, 0.25, 0.5, 0.75, 1], axis=1)
        ax.fill_between(steps, least, most, color=BAND_COLOR, alpha=0.13, linewidth=0, label="all heads")
        ax.fill_between(steps, low, high, color=BAND_COLOR, alpha=0.32, linewidth=0, label="half of the heads")
        ax.plot(steps, middle, color=BAND_COLOR, linewidth=1.8, label="median head")
        title(ax, metric_title(metric), f"median, quartiles and range of {heads.shape[1]:,} heads")
    ax.autoscale_view()
    _name_heads(ax, steps, values, metric, events, coverage, num_named)
    return figure_of(ax)


def _time_axes(ax: Axes | None, metric: str | None) -> Axes:
    ax = new_axes() if ax is None else ax
    if is_log(metric):
        ax.set_yscale("log", nonpositive="mask")
    title(ax, metric_title(metric))
    ax.set(xlabel="optimizer step", ylabel=metric_unit(metric) or metric_title(metric))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    strip(ax)
    return ax


def measured_samples(
    steps: ArrayLike, values: Mapping[str, ArrayLike]
) -> tuple[NDArray[Any], dict[str, NDArray[np.float64]]]:
    """Leave out the samples at which no head has a number, so that metrics of a slower schedule keep whole curves."""
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
    """Draw heads with alarms and the furthest ones over the crowd, and mark when alarms began and (hollow) ended."""
    alarmed: dict[tuple[str, int], None] = {}
    for event in events:
        colour = ALARM_COLOR if event.state == "firing" else "white"
        ax.plot(
            event.global_step,
            1.0,
            "v",
            markerfacecolor=colour,
            markeredgecolor=ALARM_COLOR,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
        )
        if event.layer is not None and event.layer in values and event.state == "firing":
            num_heads = values[event.layer].shape[1]
            heads = heads_concerned(event, metric_scope(metric), coverage)
            alarmed.update({(event.layer, head): None for head in heads if head < num_heads})
    named = list(alarmed)[:num_named]
    last = {layer: heads[-1] for layer, heads in values.items()} if len(steps) else {}
    for head in outlier_heads(last, metric or "", num_named + len(alarmed)):
        if len(named) < num_named and (head.layer, head.head) not in alarmed:
            named.append((head.layer, head.head))
    short, colours, ends = short_layer_names(values), itertools.cycle(HEAD_COLORS), []
    for layer, index in dict.fromkeys([*named, *alarmed]):
        colour = ALARM_COLOR if (layer, index) in alarmed else next(colours)
        curve = values[layer][:, index]
        ax.plot(steps, curve, color=colour, linewidth=1.7, solid_capstyle="round")
        if (layer, index) in named and np.isfinite(curve).any():
            text = f"{short[layer]} {head_noun(metric)} {index}"
            ends.append((float(curve[np.isfinite(curve)][-1]), text, colour))
    settle_the_ordinate(ax)
    _label_ends(ax, ends)


def _label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right edge, pushed apart so that none covers another."""
    ends = sorted(ends)
    points = ax.transData.transform([(0.0, value) for value, _, _ in ends]) if ends else np.empty((0, 2))
    heights = ax.transAxes.inverted().transform(points)[:, 1] if ends else points[:, 1]
    for (_, text, colour), height, label_height in zip(ends, heights, _spread(heights, 0.07), strict=True):
        ax.annotate(
            text,
            xy=(1.0, height),
            xytext=(1.025, label_height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
            color=colour,
            fontsize=8,
            va="center",
        )


def _spread(heights: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """Ascending heights moved as little as needed to lie ``gap`` apart and, while they fit, between 0 and 1.

    Example:
        >>> _spread(np.array([0.0, 0.01, 0.75]), 0.125).tolist()
        [0.0, 0.125, 0.75]
    """
    order = np.arange(len(heights)) * gap
    upwards = np.maximum.accumulate(heights - order) + order
    ceiling = 1 - order[::-1]
    return np.asarray(np.minimum(upwards, np.maximum(ceiling, order)))
