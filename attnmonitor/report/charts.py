"""Figures of a metric's curves: the heads that moved most against the whole model, and layer by layer.

All are Plotly figures as plain dictionaries. W&B draws them as they are, with names at the pointer, logarithmic axes
and a color for each head. (W&B's own line charts give one color to all lines of a run, and five kinds of dashes: with
more than five heads nobody can tell which is which.) The page draws the same traces from its packed numbers.

A tracker keeps every version it is sent, so a chart holds few points: of models with many heads the layers' charts have
bands in place of single heads. Random queries and keys of the same shape give a level line where a number means little
without one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnmonitor.metrics.catalog import metric_title, metric_unit
from attnmonitor.metrics.null import NULL_METRICS, null_statistics
from attnmonitor.parallel.process_state import first_import
from attnmonitor.record.history import History
from attnmonitor.report.curves import HeadCurves, head_curves, plain_text, thinned
from attnmonitor.report.line_ends import labeled_layout
from attnmonitor.report.traces import (
    MEDIAN,
    QUANTILES,
    Chart,
    axis,
    bands,
    base_layout,
    heading,
    line,
    other_heads,
    other_points,
    points,
    small_charts,
    upright_line,
    value_axis,
)
from attnmonitor.sample import AlertEvent, LayerCoverage, Sample
from attnmonitor.summary.style import ALARM_COLOR, BAND_COLOR, FAINT_INK, OTHER_HEADS_COLOR, RUN_COLORS

__all__ = [
    "Chart",
    "alarm_lines",
    "as_figure",
    "layers_chart",
    "model_chart",
    "model_layout",
    "model_traces",
    "rank_chart",
]

_MOST_POINTS, _MOST_LAYER_POINTS = 64, 32
_MOST_LAYERS = 48  # small charts on one page
_MOST_TICKED = 5  # small charts in a row that all have room for their steps
_MOST_SINGLE_CURVES = 320  # of all layers; a page with more is slow, and large to send
_BANDS_NOTE = "band: all heads; darker: half of them; ▲ alarm"
_RANKS_NOTE = "lines: median head; bands: half of the heads"
_RANKS = {
    "learned rank": ("interaction_effective_rank", RUN_COLORS[3]),
    "energy rank": ("energy_effective_rank", BAND_COLOR),
}


def as_figure(chart: Chart) -> Any:
    """The chart as a ``plotly.graph_objects.Figure``; needs plotly."""
    with first_import("plotly.graph_objects"):
        from plotly.graph_objects import Figure

    return Figure(chart)


def model_chart(history: History, sample: Sample, metric: str) -> Chart:
    """A metric's heads that fire and those that moved furthest from the others, before the bands and the null line.

    How far a head moved is the range, over the samples, of its distance to the median head: what all heads do alike is
    no movement. It is taken of logarithms for metrics whose differences are read as ratios.
    """
    curves = _followed(history, sample, metric, _MOST_POINTS)
    if not len(curves.steps):
        return {}
    traces = model_traces(
        curves,
        _quantile_points(curves.steps, curves.values),
        lambda column: points(curves.steps, curves.values[:, column]),
        sample.coverage,
    )
    labels = {curves.names[at]: curves.labels[at] for at in curves.colors}
    labels |= {
        MEDIAN: "median",
        **{trace["name"]: "random q, k" for trace in traces if trace["line"]["dash"] == "dash"},
    }
    layout = labeled_layout(_title(metric), _BANDS_NOTE, traces, labels, value_axis(metric, _ends(curves)))
    return {"data": traces, "layout": {**layout, "xaxis": axis(tickformat=",d"), "shapes": alarm_lines(sample.firing)}}


def layers_chart(history: History, sample: Sample, metric: str) -> Chart:
    """Every layer in a small chart, on common axes: each head, or bands where there are too many.

    Heads have the colors that `model_chart` gives them. Of a model with more layers than a page shows, those whose
    heads fire or moved furthest are chosen.
    """
    # From the samples of `model_chart`, so that both choose the same heads; only every other one of them is drawn.
    curves = _followed(history, sample, metric, _MOST_POINTS)
    if not len(curves.steps):
        return {}
    samples = thinned(np.arange(len(curves.steps)), _MOST_LAYER_POINTS)
    shown = _shown_layers(curves)
    traces: list[Chart] = []
    for index, layer in enumerate(shown):
        axes = {"xaxis": f"x{index + 1}", "yaxis": f"y{index + 1}", "showlegend": False}
        traces += [{**trace, **axes} for trace in _layer_traces(curves, curves.layers[layer], samples)]
    layout = model_layout(metric, _ends(curves))
    left_out = f": {len(shown)} of {len(curves.layers)} layers" if len(shown) < len(curves.layers) else ""
    layout["title"] |= {"text": f"{_title(metric)}{left_out}", "font": {"size": 12}}
    return {"data": traces, "layout": _common_axes(layout, curves, shown)}


def rank_chart(history: History) -> Chart:
    """What heads have learned to tell apart beside what the text makes of it: median and quartiles of both ranks."""
    traces = []
    if all(metric in history for metric, _ in _RANKS.values()):
        for name, (metric, color) in _RANKS.items():
            curves = head_curves(metric, history.steps, history[metric], most=_MOST_POINTS)
            if len(curves.steps):
                _, _, low, high, median = bands(_quantile_points(curves.steps, curves.values), color)
                traces += [low, {**high, "name": f"{name}, half of the heads"}, {**median, "name": f"{name}, median"}]
    labels = {f"{name}, median": name for name in _RANKS}
    shown_axis = value_axis("energy_effective_rank", None)
    layout = labeled_layout("learned rank and energy rank [components]", _RANKS_NOTE, traces, labels, shown_axis)
    return {"data": traces, "layout": {**layout, "xaxis": axis(tickformat=",d")}} if traces else {}


def model_traces(
    curves: HeadCurves,
    band_numbers: Sequence[Chart],
    head_numbers: Callable[[int], Chart],
    coverage: Mapping[str, LayerCoverage],
    others: Sequence[Chart] = (),
) -> list[Chart]:
    """Bands over all heads, the null line, and the heads drawn in color.

    Args:
        curves: The curves; they decide which heads are drawn.
        band_numbers: The numbers of the five lines of the bands.
        head_numbers: From a column of ``curves.values`` to the numbers of that head's line.
        coverage: The shapes that the null line is drawn for.
        others: Traces of other heads, drawn below those in color.
    """
    heads = [line(curves.names[at], color, head_numbers(at), width=2) for at, color in curves.colors.items()]
    null_line = _null_line(curves.steps, curves.metric, coverage)
    return [*bands(band_numbers, BAND_COLOR), *others, *null_line, *heads]


def model_layout(metric: str, ends: tuple[float, float] | None) -> Chart:
    """Layout of a metric's curves, whose least and greatest values are ``ends``."""
    layout = base_layout(f"{_title(metric)} over optimizer steps")
    return {**layout, "xaxis": axis(tickformat=",d"), "yaxis": value_axis(metric, ends)}


def _title(metric: str) -> str:
    return f"{metric_title(metric)}{f' [{metric_unit(metric)}]' if metric_unit(metric) else ''}"


def alarm_lines(firing: Sequence[AlertEvent]) -> list[Chart]:
    """A thin upright line wherever an alarm of a layer or head began that still fires."""
    began = {event.since_step for event in firing if event.since_step is not None and event.layer is not None}
    return [upright_line(step, ALARM_COLOR) for step in sorted(began)]


def _followed(history: History, sample: Sample, metric: str, most: int) -> HeadCurves:
    alarms = sample.firing
    return head_curves(metric, history.steps, history[metric], most=most, alarms=alarms, coverage=sample.coverage)


def _ends(curves: HeadCurves) -> tuple[float, float] | None:
    """Least and greatest positive value: ends of a logarithmic axis."""
    drawn = curves.values[np.nan_to_num(curves.values) > 0]
    return (float(drawn.min()), float(drawn.max())) if drawn.size else None


def _quantile_points(steps: NDArray[np.int64], values: NDArray[np.float64]) -> list[Chart]:
    """The five lines of the bands over ``values (num_samples, num_heads)``; none where no head has a number."""
    known = np.isfinite(values).any(axis=1)
    if not known.any():
        return []
    return [points(steps[known], curve) for curve in np.nanquantile(values[known], QUANTILES, axis=1)]


def _shown_layers(curves: HeadCurves) -> list[str]:
    """At most so many layers as fit on a page: those with alarms, then those whose heads moved furthest."""
    rank = {
        layer: max(math.inf if at in curves.faults else float(curves.movement[at]) for at in columns)
        for layer, columns in curves.layers.items()
        if columns
    }
    most = set(sorted(rank, key=lambda layer: -rank[layer])[:_MOST_LAYERS])
    return [layer for layer in curves.layers if layer in most]


def _layer_traces(curves: HeadCurves, columns: Sequence[int], samples: NDArray[np.intp]) -> list[Chart]:
    """One layer's heads in gray, or as bands in a model with many heads, and those in color on top."""
    steps, values = curves.steps[samples], curves.values[samples]
    if len(curves.heads) > _MOST_SINGLE_CURVES:
        below = bands(_quantile_points(steps, values[:, columns]), OTHER_HEADS_COLOR)
    else:
        plain = [at for at in columns if at not in curves.colors]
        names = [curves.names[at] for at in plain]
        below = [other_heads(other_points(names, steps, values[:, plain]))] if plain else []
    colored = [
        line(curves.names[at], curves.colors[at], points(steps, values[:, at]), width=1.6)
        for at in columns
        if at in curves.colors
    ]
    return [*below, *colored]


def _common_axes(layout: Chart, curves: HeadCurves, layers: Sequence[str]) -> Chart:
    """The layout for one small chart per layer, all on the scales of the first."""
    columns = round(math.sqrt(1.5 * len(layers)))
    alarmed = {curves.heads[at][0] for at in curves.faults}
    first = {name: {**layout.pop(name), "tickfont": {"size": 9}, "tickangle": 0} for name in ("xaxis", "yaxis")}
    axes = []
    for index in range(len(layers)):
        lowest, leftmost = index + columns >= len(layers), index % columns == 0
        x, y = ({"matches": name} if index else {} for name in "xy")
        axes.append(
            (
                {
                    **first["xaxis"],
                    "nticks": 3,
                    **x,
                    "showticklabels": lowest and (leftmost or columns <= _MOST_TICKED),
                },
                {**first["yaxis"], **y, "showticklabels": leftmost},
            )
        )
    headings = [heading(plain_text(curves.short[layer]), alarmed=layer in alarmed) for layer in layers]
    return layout | small_charts(headings, axes, columns, {"xgap": 0.06, "ygap": 0.22})


def _null_line(steps: NDArray[np.int64], metric: str, coverage: Mapping[str, LayerCoverage]) -> Iterator[Chart]:
    """A level line at what random queries and keys give, of the shape that most layers have."""
    shapes = Counter((layer.num_keys, layer.head_dim) for layer in coverage.values() if layer.num_keys > 1)
    if metric in NULL_METRICS and shapes and len(steps):
        [((num_keys, head_dim), _)] = shapes.most_common(1)
        level = np.full(2, null_statistics(num_keys, head_dim)[metric])
        name = f"random q and k ({num_keys} × {head_dim})"
        yield line(name, FAINT_INK, points(steps[[0, -1]], level), width=1.2, dash="dash")
