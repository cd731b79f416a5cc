"""The curves of a metric that a chart is drawn from: thinned, named, the shown heads in color."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnmonitor.messages import tail_of
from attnmonitor.metrics.catalog import metric_scope
from attnmonitor.sample import AlertEvent, LayerCoverage, heads_concerned, scoped_head_name
from attnmonitor.summary.names import fault_text, short_layer_names
from attnmonitor.summary.outliers import movement
from attnmonitor.summary.style import ALARM_COLOR, HEAD_COLORS, color_heads

__all__ = ["Head", "HeadCurves", "head_curves", "plain_text", "thinned"]

Head = tuple[str, int]

MOST_COLORED_HEADS = 10
_MAX_LABEL = 18  # characters


@dataclass(frozen=True)
class HeadCurves:
    """One metric's curves of all heads.

    Attributes:
        metric: Name of the metric.
        steps: Optimizer steps of the samples, ``(num_samples,)``.
        values: ``(num_samples, num_heads)``; NaN where a head has no number.
        heads: Layer name and index of each head, ``num_heads`` of them.
        short: Short name of each layer.
        names: Name of each head as charts show it, with the kind of fault where it has an alarm.
        labels: The same, short enough to stand at the end of a line: no kind of fault, long names from their end.
        faults: Kind of fault by column of ``values``, for heads with an alarm.
    """

    metric: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    heads: list[Head]
    short: Mapping[str, str]
    names: list[str]
    labels: list[str]
    faults: dict[int, str]

    @cached_property
    def colors(self) -> dict[int, str]:
        """Columns of the heads drawn in color, in drawing order: heads with alarms come last, on top."""
        order = [int(at) for at in np.argsort(-self.movement, kind="stable") if np.isfinite(self.values[:, at]).any()]
        alarmed = [at for at in order if at in self.faults][:MOST_COLORED_HEADS]
        num_others = min(len(HEAD_COLORS), MOST_COLORED_HEADS - len(alarmed))
        others = color_heads((at for at in order if at not in self.faults), num_others)
        return {**others, **dict.fromkeys(reversed(alarmed), ALARM_COLOR)}

    @cached_property
    def movement(self) -> NDArray[np.float64]:
        """How far each head moved from the median head, ``(num_heads,)``."""
        return movement(self.values, self.metric)

    @cached_property
    def layers(self) -> dict[str, list[int]]:
        """Columns of each layer's heads."""
        columns: dict[str, list[int]] = {}
        for column, (layer, _) in enumerate(self.heads):
            columns.setdefault(layer, []).append(column)
        return columns


def head_curves(
    metric: str,
    steps: ArrayLike,
    layers: Mapping[str, ArrayLike],
    *,
    most: int | None = None,
    alarms: Sequence[AlertEvent] = (),
    coverage: Mapping[str, LayerCoverage] | None = None,
) -> HeadCurves:
    """Collect the curves of a metric.

    Args:
        metric: Name of the metric.
        steps: Optimizer steps, ``(num_samples,)``.
        layers: For each layer ``(num_samples, num_heads)``.
        most: Most samples that are kept; by default all in which a head has a number.
        alarms: Alarms whose heads are marked.
        coverage: Lets an alarm about a KV head mark its query heads and the other way round.
    """
    tables = {layer: np.asarray(values, dtype=np.float64) for layer, values in layers.items()}
    heads = [(layer, head) for layer, values in tables.items() for head in range(values.shape[1])]
    values = np.concatenate(list(tables.values()), axis=1)
    known = np.flatnonzero(np.isfinite(values).any(axis=1))
    kept = known if most is None else thinned(known, most)
    column_of = {head: column for column, head in enumerate(heads)}
    scope = metric_scope(metric)
    faults = {
        column_of[event.layer, head]: fault_text(event.kind)
        for event in alarms
        if event.layer is not None
        for head in heads_concerned(event, scope, coverage)
        if (event.layer, head) in column_of
    }
    short = short_layer_names([*(coverage or ()), *tables])
    seen = coverage or {}
    own = [scoped_head_name(short[layer], head, scope, seen.get(layer)) for layer, head in heads]
    names, labels = [plain_text(name) for name in own], [plain_text(tail_of(name, _MAX_LABEL)) for name in own]
    for column, fault in faults.items():
        names[column] += f" ▲ {plain_text(fault)}"
        labels[column] += " ▲"
    values = np.where(np.isfinite(values), values, np.nan)[kept]
    return HeadCurves(metric, np.asarray(steps, dtype=np.int64)[kept], values, heads, short, names, labels, faults)


def thinned(candidates: NDArray[np.intp], most: int, keep: ArrayLike = ()) -> NDArray[np.intp]:
    """Return about ``most`` of ``candidates``, evenly spaced, with the first, the last and those in ``keep``."""
    if len(candidates) <= most:
        return candidates
    spaced = candidates[np.linspace(0, len(candidates) - 1, max(2, most)).round().astype(int)]
    kept = np.intersect1d(np.asarray(keep, dtype=np.intp), candidates)
    return np.union1d(spaced, kept if len(kept) <= most else kept[:: -(-len(kept) // most)])


def plain_text(name: str) -> str:
    """A name as Plotly shows it unchanged: Plotly reads markup in every text."""
    return name.replace("&", "&amp;").replace("<", "&lt;")
