"""The whole model as a heatmap: layers downwards, heads across, one cell per head.

The ends of the color scale are the 2nd and 98th percentile over the heads that are no outliers, so that one extreme
head does not give all others the same shade. Values outside have the color of the end; the scale has an arrow there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from attnmonitor.metrics.catalog import head_noun, is_log, metric_scope, metric_title, metric_unit
from attnmonitor.plots.style import figure_of, new_figure, round_values, title
from attnmonitor.sample import AlertEvent, LayerCoverage, heads_concerned
from attnmonitor.summary.names import short_layer_names
from attnmonitor.summary.outliers import range_without_outliers
from attnmonitor.summary.style import ALARM_COLOR, FAINT_INK, INK, PAPER_GRAY

__all__ = ["heatmap"]

_MOST_CELLS_WITH_NUMBERS = 200
_MOST_TICKS = 24

Events = Sequence[AlertEvent]
Coverage = Mapping[str, LayerCoverage]


def heatmap(
    values: Mapping[str, ArrayLike],
    *,
    metric: str | None = None,
    events: Events = (),
    coverage: Coverage | None = None,
    global_step: int | None = None,
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Every head of the model as one cell: layers downwards, heads across.

    Args:
        values: For each layer ``(num_heads,)``; layers may differ in their number of heads. NaN is hatched.
        metric: Name from the catalog, for title, unit and scale.
        events: Alarms that are firing: their heads are framed and the names of their layers are vermilion.
        coverage: Adds a hatched row for each layer that was not measured, in the order of the model, and lets an alarm
            about a KV head frame its query heads and the other way round.
        global_step: Optimizer steps done, for the title.
        limits: Ends of the color scale; by default the 2nd and 98th percentile over the heads that are no outliers.
        ax: Axes to draw into; by default a new figure sized for the model.

    Returns:
        The figure.
    """
    values = _with_unmeasured(values, coverage or {})
    table, present = _table(values)
    num_layers, num_heads = table.shape
    numbered = present.sum() <= _MOST_CELLS_WITH_NUMBERS
    if ax is None:
        cell = 0.46 if numbered else max(0.16, min(0.3, 9.0 / max(num_heads, num_layers, 1)))
        width, height = num_heads * cell + 2.6, num_layers * cell + 1.7
        figure = new_figure(min(max(width, 5.6), 18), min(max(height, 2.6), 24))
        ax = figure.add_subplot()
    low, high = _limits(table[present], metric) if limits is None else limits
    norm = LogNorm(low, high) if is_log(metric) else Normalize(low, high)
    shown = np.ma.masked_invalid(np.clip(table, low, high))
    grid = "white" if numbered else "none"
    mesh = ax.pcolormesh(shown, cmap="viridis", norm=norm, edgecolors=grid, linewidth=1.0)
    for layer, head in np.argwhere(present & np.isnan(table)):
        ax.add_patch(Rectangle((head, layer), 1, 1, facecolor=PAPER_GRAY, edgecolor="white", hatch="////"))
    if numbered:
        _write_numbers(ax, table, norm, low)
    _frame_alarms(ax, list(values), metric, events, coverage)
    _label_cells(ax, list(values), num_heads, head_noun(metric, coverage), events)
    title(ax, metric_title(metric) + ("" if global_step is None else f" at step {global_step:,}"))
    _color_bar(ax, mesh, table[present], metric, (low, high))
    return figure_of(ax)


def _with_unmeasured(values: Mapping[str, ArrayLike], coverage: Coverage) -> Mapping[str, ArrayLike]:
    """The layers in the order of the model, those that were not measured among them as rows without numbers."""
    if not any(not layer.measured and name not in values for name, layer in coverage.items()):
        return values
    most = max((np.size(np.asarray(heads)) for heads in values.values()), default=1)
    rows: dict[str, ArrayLike] = {}
    for name, layer in coverage.items():
        if name in values:
            rows[name] = values[name]
        elif not layer.measured:
            rows[name] = np.full(layer.num_query_heads or most, np.nan)
    return {**rows, **values}


def _table(values: Mapping[str, ArrayLike]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Cells ``(num_layers, most heads)`` and which of them are heads."""
    rows = [np.asarray(heads, dtype=np.float64).ravel() for heads in values.values()]
    table = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    present = np.zeros(table.shape, dtype=bool)
    for index, row in enumerate(rows):
        table[index, : len(row)], present[index, : len(row)] = row, True
    return table, present


def _limits(heads: NDArray[np.float64], metric: str | None) -> tuple[float, float]:
    """Ends of the color scale, never so close that noise between equal heads fills the whole scale."""
    ends = range_without_outliers(heads, metric or "", (0.02, 0.98))
    if ends is None:
        return 1.0, 2.0
    low, high = ends
    if is_log(metric):
        middle, widest = math.sqrt(low * high), max(math.sqrt(high / low), 1.1)
        return middle / widest, middle * widest
    missing = max(0.0, 0.1 * max(abs(low), abs(high), 1e-12) - (high - low))
    return low - missing / 2, high + missing / 2


def _write_numbers(ax: Axes, table: NDArray[np.float64], norm: Normalize, low: float) -> None:
    known = table[np.isfinite(table)]
    whole = bool((known == np.round(known)).all())
    dark = np.asarray(norm(np.maximum(table, low))) < 0.6
    for layer, head in np.argwhere(np.isfinite(table)):
        value = table[layer, head]
        color = "white" if dark[layer, head] else INK
        text = f"{value:.0f}" if whole else _short_number(value)
        number = ax.text(head + 0.5, layer + 0.52, text, ha="center", va="center", fontsize=7, color=color)
        number.set_in_layout(False)  # it lies within its cell: measuring hundreds of them takes half the time


def _short_number(value: float) -> str:
    """Two significant digits in four characters or less, for numbers of the usual size."""
    if abs(value) >= 10:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 0.95 else f"{value:.2f}".replace("0.", ".", 1)


def _frame_alarms(ax: Axes, layers: list[str], metric: str | None, events: Events, coverage: Coverage | None) -> None:
    for event in events:
        if event.layer in layers:
            row = layers.index(event.layer)
            for head in heads_concerned(event, metric_scope(metric), coverage):
                for color, width in (("white", 3.6), (ALARM_COLOR, 2.0)):
                    frame = Rectangle((head, row), 1, 1, fill=False, edgecolor=color, linewidth=width, zorder=4)
                    frame.set_clip_on(False)
                    ax.add_patch(frame)


def _label_cells(ax: Axes, layers: list[str], num_heads: int, noun: str, events: Events) -> None:
    short, alarmed = short_layer_names(layers), {event.layer for event in events}
    stride = max(1, math.ceil(len(layers) / _MOST_TICKS))
    named = [row for row, layer in enumerate(layers) if layer in alarmed]
    spaced = [row for row in range(0, len(layers), stride) if all(abs(row - other) >= stride for other in named)]
    rows = sorted({*spaced, *named})
    ax.set_yticks([row + 0.5 for row in rows], [short[layers[row]] for row in rows], fontsize=8)
    for row, label in zip(rows, ax.get_yticklabels(), strict=True):
        label.set_color(ALARM_COLOR if layers[row] in alarmed else INK)
        label.set_fontweight("bold" if layers[row] in alarmed else "normal")
    heads = range(0, num_heads, max(1, math.ceil(num_heads / _MOST_TICKS)))
    ax.set_xticks([head + 0.5 for head in heads], [str(head) for head in heads], fontsize=8)
    ax.set_xlabel(noun, fontsize=9, color=FAINT_INK)
    ax.set(xlim=(0, max(1, num_heads)), ylim=(max(1, len(layers)), 0))
    ax.tick_params(length=0)
    ax.set_facecolor("white")
    for spine in ax.spines.values():
        spine.set_visible(False)


def _color_bar(
    ax: Axes, mesh: ScalarMappable, heads: NDArray[np.float64], metric: str | None, limits: tuple[float, float]
) -> None:
    low, high = limits
    below, above = bool((heads < low).any()), bool((heads > high).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
    bar = figure_of(ax).colorbar(mesh, ax=ax, extend=extend, fraction=0.045, pad=0.02, aspect=28)
    ticks = round_values(low, high, log=is_log(metric))
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8, length=2, color=FAINT_INK)
    bar.outline.set_visible(False)
    bar.set_label(metric_unit(metric), fontsize=8, color=FAINT_INK)
