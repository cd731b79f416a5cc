"""Curves as line charts that a tracker draws: the heads that moved most against the whole model, and each layer.

A tracker keeps every version of a table it is sent, so a chart holds few lines of few points: heads that fire, those
that moved furthest from the others, and the bands in which all heads lie. Random queries and keys of the same shape
give a level line where a number means little without one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from attnmonitor.catalog import METRICS
from attnmonitor.functional import NULL_METRICS, null_statistics
from attnmonitor.history import History
from attnmonitor.sample import AlertEvent, LayerCoverage, Sample
from attnmonitor.verdict import heads_concerned, short_layer_names

__all__ = ["LineChart", "layer_chart", "model_chart", "rank_chart"]

_MOST_HEADS = 10
_MOST_POINTS, _MOST_LAYER_POINTS = 64, 32  # the client takes 0.2 ms for each row of a table
_BANDS = {"greatest": 1.0, "upper quartile": 0.75, "median": 0.5, "lower quartile": 0.25, "least": 0.0}
_RANKS = {"learned": "interaction_effective_rank", "energy": "energy_effective_rank"}


@dataclass
class LineChart:
    """A chart: its title and, for each line by name, optimizer steps and values."""

    title: str
    lines: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)

    def add(self, name: str, steps: NDArray[np.int64], values: NDArray[np.float64], most_points: int) -> None:
        """Add a line of at most so many points, evenly chosen, first and last among them; NaN is left out."""
        known = np.flatnonzero(np.isfinite(values))
        if len(known) > most_points:
            known = known[np.linspace(0, len(known) - 1, most_points).round().astype(int)]
        if len(known):
            # Six digits are more than a chart shows and half of what a table would hold.
            self.lines[name] = steps[known].tolist(), [float(f"{value:.6g}") for value in values[known]]


def model_chart(history: History, sample: Sample, metric: str) -> LineChart:
    """A metric's heads that fire, then those that moved furthest from the others, the bands, and the null line.

    How far a head moved is the range, over the samples, of its distance to the median head: what all heads do
    together is no movement. It is taken of logarithms for metrics whose differences are read as ratios.
    """
    chart = LineChart(_title(metric))
    steps, curves, heads = _curves(history, metric)
    if not heads:
        return chart
    faults = _faults(sample.firing, metric, sample.coverage)
    fires = np.array([head in faults for head in heads])
    names = _names(heads, metric, faults, history)
    for at in np.lexsort((-_movement(curves, metric), ~fires))[:_MOST_HEADS]:
        chart.add(names[at], steps, curves[:, at], _MOST_POINTS)
    known = np.isfinite(curves).any(axis=1)
    bands = np.nanquantile(curves[known], list(_BANDS.values()), axis=1)
    for name, band in zip(_BANDS, bands, strict=True):
        chart.add(f"all heads: {name}", steps[known], band, _MOST_POINTS)
    _add_null(chart, steps[known], metric, sample.coverage)
    return chart


def layer_chart(history: History, sample: Sample, metric: str, layer: str) -> LineChart:
    """Every head of one layer."""
    short = short_layer_names(history.num_heads)[layer]
    chart = LineChart(f"{short}: {_title(metric)}")
    steps, curves, heads = _curves(history, metric, [layer])
    faults = _faults(sample.firing, metric, sample.coverage)
    for name, curve in zip(_names(heads, metric, faults, history), curves.T, strict=True):
        chart.add(name, steps, curve, _MOST_LAYER_POINTS)
    return chart


def rank_chart(history: History) -> LineChart:
    """What heads have learned to tell apart beside what the text makes of it: median and quartiles of both ranks."""
    chart = LineChart("learned rank and energy rank [components]")
    if set(_RANKS.values()) <= set(history):
        for side, metric in _RANKS.items():
            steps, curves, _ = _curves(history, metric)
            known = np.isfinite(curves).any(axis=1)
            for name, share in list(_BANDS.items())[1:-1]:
                chart.add(
                    f"{side} rank, {name}", steps[known], np.nanquantile(curves[known], share, axis=1), _MOST_POINTS
                )
    return chart


def _curves(
    history: History, metric: str, layers: Sequence[str] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64], list[tuple[str, int]]]:
    """Steps ``(num_samples,)``, values ``(num_samples, num_heads)``, and which heads these are."""
    trajectories = history[metric]
    chosen = {layer: trajectories[layer].double().numpy() for layer in (trajectories if layers is None else layers)}
    heads = [(layer, head) for layer, values in chosen.items() for head in range(values.shape[1])]
    return np.array(history.steps, dtype=np.int64), np.concatenate(list(chosen.values()), axis=1), heads


def _movement(curves: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    """How far each head moved, ``(num_heads,)``; a head without numbers did not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.log(curves) if METRICS[metric].log_scale else curves
    x = np.where(np.isfinite(x), x, np.nan)
    x = x[np.isfinite(x).any(axis=1)]
    distances = x - np.nanmedian(x, axis=1, keepdims=True)
    moved = np.fmax.reduce(distances, initial=np.nan) - np.fmin.reduce(distances, initial=np.nan)
    return np.asarray(np.nan_to_num(moved), dtype=np.float64)


def _faults(
    firing: Sequence[AlertEvent], metric: str, coverage: Mapping[str, LayerCoverage]
) -> dict[tuple[str, int], str]:
    """What each head that an alarm is about suffers from."""
    return {
        (event.layer, head): event.kind.replace("_", " ")
        for event in firing
        if event.layer is not None
        for head in heads_concerned(event, metric, coverage)
    }


def _names(
    heads: Sequence[tuple[str, int]], metric: str, faults: Mapping[tuple[str, int], str], history: History
) -> list[str]:
    short = short_layer_names(history.num_heads)
    noun = "KV head" if METRICS[metric].scope == "kv_head" else "head"
    marks = [f" ▲ {faults[head]}" if head in faults else "" for head in heads]
    return [f"{short[layer]} {noun} {index}{mark}" for (layer, index), mark in zip(heads, marks, strict=True)]


def _title(metric: str) -> str:
    unit = METRICS[metric].unit
    return metric.replace("_", " ") + ("" if unit == "1" else f" [{unit}]")


def _add_null(chart: LineChart, steps: NDArray[np.int64], metric: str, coverage: Mapping[str, LayerCoverage]) -> None:
    """A level line at what random queries and keys give, of the shape that most layers have."""
    shapes = Counter((layer.num_keys, layer.head_dim) for layer in coverage.values() if layer.num_keys > 1)
    if metric in NULL_METRICS and shapes and len(steps):
        [((num_keys, head_dim), _)] = shapes.most_common(1)
        level = null_statistics(num_keys, head_dim)[metric]
        name = f"random q and k ({num_keys} × {head_dim})"
        chart.add(name, steps[[0, -1]], np.array([level, level]), _MOST_POINTS)
