"""Curves as charts that a tracker draws: the heads that moved most against the whole model, and layer by layer.

The charts are Plotly figures, as plain dictionaries: W&B draws them as they are, with names at the pointer, logarithmic
axes and a colour for each head. (The line charts of its own give one colour to all lines of a run, and five kinds of
dashes: with more than five heads nobody can tell which is which.)

A tracker keeps every version it is sent, so a chart holds few points: of models with many heads the layers' charts have
bands in place of single heads. Random queries and keys of the same shape give a level line where a number means little
without one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnmonitor.metrics.catalog import METRICS, metric_scope
from attnmonitor.metrics.null import NULL_METRICS, null_statistics
from attnmonitor.record.history import History
from attnmonitor.sample import AlertEvent, LayerCoverage, Sample, heads_concerned
from attnmonitor.summary.names import short_layer_names
from attnmonitor.summary.style import (
    ALARM_COLOR,
    AXIS_INK,
    BAND_COLOR,
    FAINT_INK,
    HEAD_COLORS,
    INK,
    OTHER_HEADS_COLOR,
    log_ticks,
)

__all__ = ["Chart", "as_figure", "layers_chart", "model_chart", "rank_chart"]

Chart = dict[str, Any]
Head = tuple[str, int]
Steps = NDArray[np.int64]
Curves = NDArray[np.float64]

_MOST_HEADS = 10
_MOST_POINTS, _MOST_LAYER_POINTS = 64, 32
_MOST_LAYERS = 48  # small charts on one page
_MOST_SINGLE_CURVES = 320  # of all layers together; a page with more is slow, and large to send
_QUARTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_RANKS = {
    "learned rank": ("interaction_effective_rank", HEAD_COLORS[3]),
    "energy rank": ("energy_effective_rank", BAND_COLOR),
}


def as_figure(chart: Chart) -> Any:
    """The chart as a ``plotly.graph_objects.Figure``; needs plotly."""
    from plotly.graph_objects import Figure

    return Figure(chart)


def model_chart(history: History, sample: Sample, metric: str) -> Chart:
    """A metric's heads that fire and those that moved furthest from the others, before the bands and the null line.

    How far a head moved is the range, over the samples, of its distance to the median head: what all heads do
    together is no movement. It is taken of logarithms for metrics whose differences are read as ratios.
    """
    steps, curves, heads = _curves(history, metric)
    steps, curves = _thinned(steps, curves, _MOST_POINTS)
    if not len(steps):
        return {}
    faults = _faults(sample.firing, metric, sample.coverage)
    names = _names(history, metric, heads, faults)
    traces = [*_bands(steps, curves, BAND_COLOR), *_null_line(steps, metric, sample.coverage)]
    for head, colour in _coloured(heads, curves, metric, faults).items():
        traces.append(_line(names[head], steps, curves[:, heads.index(head)], colour, width=2))
    began = {event.since_step for event in sample.firing if event.since_step is not None and event.layer is not None}
    return {"data": traces, "layout": {**_layout(metric, curves), "shapes": [_mark(step) for step in sorted(began)]}}


def layers_chart(history: History, sample: Sample, metric: str) -> Chart:
    """Every layer in a small chart of its own, on common axes: each head, or bands where there are too many.

    Heads have the colours that `model_chart` gives them. Of a model with more layers than a page shows, those whose
    heads fire or moved furthest are chosen.
    """
    steps, curves, heads = _curves(history, metric)
    steps, curves = _thinned(steps, curves, _MOST_LAYER_POINTS)
    if not len(steps):
        return {}
    faults = _faults(sample.firing, metric, sample.coverage)
    names, coloured = _names(history, metric, heads, faults), _coloured(heads, curves, metric, faults)
    shown, short = _shown_layers(heads, curves, metric, faults), short_layer_names(history.num_heads)
    traces, layout = (
        [],
        _grid(_layout(metric, curves), [short[layer] for layer in shown], {short[at] for at, _ in faults}),
    )
    if len(shown) < len(history.num_heads):
        layout["title"]["text"] += f": {len(shown)} of {len(history.num_heads)} layers"
    for index, layer in enumerate(shown):
        at = [place for place, (name, _) in enumerate(heads) if name == layer]
        axes = {"xaxis": f"x{index + 1}", "yaxis": f"y{index + 1}", "showlegend": False}
        if len(heads) > _MOST_SINGLE_CURVES:
            crowd = _bands(steps, curves[:, at], OTHER_HEADS_COLOR)
        else:
            plain = [place for place in at if heads[place] not in coloured]
            crowd = [_crowd([names[heads[place]] for place in plain], steps, curves[:, plain])]
        named = [
            _line(names[heads[place]], steps, curves[:, place], coloured[heads[place]], width=1.6)
            for place in at
            if heads[place] in coloured
        ]
        traces += [{**trace, **axes} for trace in (*crowd, *named)]
    return {"data": traces, "layout": layout}


def rank_chart(history: History) -> Chart:
    """What heads have learned to tell apart beside what the text makes of it: median and quartiles of both ranks."""
    traces = []
    if all(metric in history for metric, _ in _RANKS.values()):
        for name, (metric, colour) in _RANKS.items():
            steps, curves, _ = _curves(history, metric)
            steps, curves = _thinned(steps, curves, _MOST_POINTS)
            if len(steps):
                _, _, low, high, median = _bands(steps, curves, colour)
                traces += [low, {**high, "name": f"{name}, half of the heads"}, {**median, "name": f"{name}, median"}]
    layout = _layout("energy_effective_rank", np.empty(0))
    layout["title"]["text"] = "learned rank and energy rank [components] over optimizer steps"
    return {"data": traces, "layout": layout} if traces else {}


def _curves(history: History, metric: str) -> tuple[Steps, Curves, list[Head]]:
    """Steps ``(num_samples,)``, values ``(num_samples, num_heads)``, and which heads these are."""
    layers = {layer: values.double().numpy() for layer, values in history[metric].items()}
    heads = [(layer, head) for layer, values in layers.items() for head in range(values.shape[1])]
    return np.array(history.steps, dtype=np.int64), np.concatenate(list(layers.values()), axis=1), heads


def _thinned(steps: Steps, curves: Curves, most: int) -> tuple[Steps, Curves]:
    """At most so many of the samples in which a head has a number, evenly chosen, first and last among them."""
    known = np.flatnonzero(np.isfinite(curves).any(axis=1))
    if len(known) > most:
        known = known[np.linspace(0, len(known) - 1, most).round().astype(int)]
    return steps[known], np.where(np.isfinite(curves), curves, np.nan)[known]


def _coloured(heads: Sequence[Head], curves: Curves, metric: str, faults: Mapping[Head, str]) -> dict[Head, str]:
    """The heads that are told from the crowd, and the colour of each; those that fire come last, on top."""
    moved = _movement(curves, metric)
    order = [heads[at] for at in np.argsort(-moved, kind="stable") if np.isfinite(curves[:, at]).any()]
    sick = [head for head in order if head in faults][:_MOST_HEADS]
    others = [head for head in order if head not in faults][: _MOST_HEADS - len(sick)]
    # As many as there are colours: two heads in one colour are no heads that can be told apart.
    return {**dict(zip(others, HEAD_COLORS, strict=False)), **dict.fromkeys(reversed(sick), ALARM_COLOR)}


def _movement(curves: Curves, metric: str) -> NDArray[np.float64]:
    """How far each head moved, ``(num_heads,)``; a head without numbers did not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.log(curves) if METRICS[metric].log_scale else curves
    x = np.where(np.isfinite(x), x, np.nan)[np.isfinite(x).any(axis=1)]
    distances = x - np.nanmedian(x, axis=1, keepdims=True)
    moved = np.fmax.reduce(distances, initial=np.nan) - np.fmin.reduce(distances, initial=np.nan)
    return np.asarray(np.nan_to_num(moved), dtype=np.float64)


def _shown_layers(heads: Sequence[Head], curves: Curves, metric: str, faults: Mapping[Head, str]) -> list[str]:
    layers, rank = list(dict.fromkeys(layer for layer, _ in heads)), dict[str, float]()
    for head, moved in zip(heads, _movement(curves, metric), strict=True):
        rank[head[0]] = max(rank.get(head[0], 0.0), math.inf if head in faults else float(moved))
    most = set(sorted(layers, key=lambda layer: -rank[layer])[:_MOST_LAYERS])
    return [layer for layer in layers if layer in most]


def _faults(firing: Sequence[AlertEvent], metric: str, coverage: Mapping[str, LayerCoverage]) -> dict[Head, str]:
    """What each head that an alarm is about suffers from."""
    return {
        (event.layer, head): event.kind.replace("_", " ")
        for event in firing
        if event.layer is not None
        for head in heads_concerned(event, metric_scope(metric), coverage)
    }


def _names(history: History, metric: str, heads: Sequence[Head], faults: Mapping[Head, str]) -> dict[Head, str]:
    short = short_layer_names(history.num_heads)
    noun = "KV head" if METRICS[metric].scope == "kv_head" else "head"
    marks = {head: f" ▲ {fault}" for head, fault in faults.items()}
    return {head: f"{_escaped(short[head[0]])} {noun} {head[1]}{marks.get(head, '')}" for head in heads}


def _line(
    name: str, steps: Steps, curve: Curves, colour: str, *, width: float, dash: str = "solid", **more: Any
) -> Chart:
    """One line through the samples in which it has a number."""
    known = np.isfinite(curve)
    return {
        "type": "scatter",
        "mode": "lines" if known.sum() > 1 else "lines+markers",
        "name": name,
        "x": steps[known].tolist(),
        "y": _short(curve[known]),
        "line": {"color": colour, "width": width, "dash": dash},
        "hovertemplate": f"{name}: %{{y}}<br>step %{{x:,}}<extra></extra>",
        **more,
    }


def _crowd(names: Sequence[str], steps: Steps, curves: Curves) -> Chart:
    """Many heads as one line with gaps, which browsers draw faster than many lines."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [*steps.tolist(), None] * len(names),
        "y": [number for curve in curves.T for number in (*_short(curve), None)],
        "text": [name for name in names for _ in range(len(steps) + 1)],
        "line": {"color": OTHER_HEADS_COLOR, "width": 0.8},
        "hovertemplate": "%{text}: %{y}<br>step %{x:,}<extra></extra>",
    }


def _bands(steps: Steps, curves: Curves, colour: str) -> list[Chart]:
    """Range, quartiles and median over the heads: five lines, two of them with what lies below them filled."""
    known = np.isfinite(curves).any(axis=1)
    if not known.any():
        return []
    steps = steps[known]
    least, low, median, high, most = np.nanquantile(curves[known], _QUARTILES, axis=1)
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))

    def edge(name: str, curve: Curves, **more: Any) -> Chart:
        return _line(name, steps, curve, f"rgba({red},{green},{blue},0.3)", width=0, **more)

    def fill(alpha: float) -> Chart:
        return {"fill": "tonexty", "fillcolor": f"rgba({red},{green},{blue},{alpha})"}

    return [
        edge("least of all heads", least, showlegend=False),
        edge("all heads", most, **fill(0.13)),
        edge("lower quartile", low, showlegend=False),
        edge("half of the heads", high, **fill(0.3)),
        _line("median head", steps, median, colour, width=1.6),
    ]


def _null_line(steps: Steps, metric: str, coverage: Mapping[str, LayerCoverage]) -> Iterator[Chart]:
    """A level line at what random queries and keys give, of the shape that most layers have."""
    shapes = Counter((layer.num_keys, layer.head_dim) for layer in coverage.values() if layer.num_keys > 1)
    if metric in NULL_METRICS and shapes:
        [((num_keys, head_dim), _)] = shapes.most_common(1)
        level = np.full(2, null_statistics(num_keys, head_dim)[metric])
        name = f"random q and k ({num_keys} × {head_dim})"
        yield _line(name, steps[[0, -1]], level, FAINT_INK, width=1.2, dash="dash")


def _mark(step: int) -> Chart:
    """A thin upright line where an alarm began that still fires."""
    line = {"color": ALARM_COLOR, "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1, "line": line}


def _layout(metric: str, curves: Curves) -> Chart:
    drawn = curves[np.nan_to_num(curves) > 0]
    is_log = METRICS[metric].log_scale and drawn.size > 0
    ticks = log_ticks(float(drawn.min()), float(drawn.max())) if is_log else []
    return {
        "title": {"text": _title(metric), "font": {"size": 14}, "x": 0.01, "xanchor": "left"},
        "xaxis": {**_axis(), "tickformat": ",d"},
        "yaxis": {
            **_axis(),
            "tickformat": "~g",
            "type": "log" if is_log else "linear",
            **({"tickvals": ticks} if len(ticks) >= 3 else {}),
        },
        "legend": {"orientation": "h", "y": -0.14, "font": {"size": 10}},
        "margin": {"l": 48, "r": 12, "t": 44, "b": 24},
        "plot_bgcolor": "white",
        "template": {"layout": {}},
    }


def _grid(layout: Chart, layers: Sequence[str], alarmed: set[str]) -> Chart:
    """Small charts, a few in a row, all on the scales of the first."""
    columns = round(math.sqrt(1.5 * len(layers)))
    rows = math.ceil(len(layers) / columns)
    first = {axis: {**layout.pop(axis), "tickfont": {"size": 9}, "tickangle": 0} for axis in ("xaxis", "yaxis")}
    first["xaxis"]["nticks"] = 3
    layout["annotations"] = []
    layout |= {"grid": {"rows": rows, "columns": columns, "pattern": "independent", "xgap": 0.06, "ygap": 0.22}}
    for index, layer in enumerate(layers):
        number = str(index + 1) if index else ""
        lowest, leftmost = index + columns >= len(layers), index % columns == 0
        for axis, has_labels in (("xaxis", lowest), ("yaxis", leftmost)):
            common = {"matches": axis[0]} if index else {}
            layout[f"{axis}{number}"] = {**first[axis], **common, "showticklabels": has_labels}
        colour = ALARM_COLOR if layer in alarmed else INK
        layout["annotations"].append(_heading(layer, f"x{number} domain", f"y{number} domain", colour))
    return layout


def _heading(layer: str, x_axis: str, y_axis: str, colour: str) -> Chart:
    return {
        "text": _escaped(layer),
        "xref": x_axis,
        "yref": y_axis,
        "x": 0,
        "y": 1,
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 10, "color": colour},
    }


def _axis() -> Chart:
    return {"gridcolor": "#eceef0", "linecolor": AXIS_INK, "zeroline": False, "automargin": True, "nticks": 5}


def _title(metric: str) -> str:
    unit = "" if METRICS[metric].unit == "1" else f" [{METRICS[metric].unit}]"
    return f"{metric.replace('_', ' ')}{unit} over optimizer steps"


def _short(values: Curves) -> list[float | None]:
    """Five digits: more than a chart shows, and half of what a file would hold; a gap where there is no number."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _escaped(name: str) -> str:
    """A model's name for a layer, where Plotly would read markup."""
    return name.replace("&", "&amp;").replace("<", "&lt;")
