"""Which heads stand out or fire, and what they are called: what charts, tables and the verdict mark alike.

A head that is merely unlike the others is named as unlike, never as sick, because healthy heads differ by factors of
ten: only alarms say that something is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnmonitor.metrics.catalog import METRICS
from attnmonitor.sample import AlertEvent, LayerCoverage

__all__ = [
    "OutstandingHead",
    "by_concern",
    "crowd_range",
    "head_name",
    "heads_concerned",
    "outstanding_heads",
    "short_layer_names",
    "still_firing",
]

# Added to the spread of the heads when distances are taken. Where most heads agree (integer ranks do) the spread is 0,
# and a head that differs by a trifle would be infinitely far: below 10 % nobody needs to look.
_SPREAD_FLOOR = 0.1
_FAR_OUT = 4.0  # robust standard deviations


class OutstandingHead(NamedTuple):
    """A head and how far it is from the others: ``distance`` in robust standard deviations, signed."""

    layer: str
    head: int
    value: float
    distance: float


def outstanding_heads(values: Mapping[str, ArrayLike], metric: str, k: int) -> list[OutstandingHead]:
    r"""The ``k`` heads that are furthest from the rest of the model, furthest first.

    .. math:: z = (x - \operatorname{median} x) \,/\, (1.4826 \operatorname{MAD} x + 0.1 c)

    over all heads of the model, where x is the logarithm of the value for metrics whose differences are read as ratios
    (``log_scale`` of the catalog; c = 1), and the value itself otherwise (c the larger of 1 and the median's size for
    counts, 1 for fractions). Median and MAD, because a head far out must not hide itself by widening the scale.

    Args:
        values: For each layer ``(num_heads,)``; heads that are NaN are passed over.
        metric: Name of the metric, for its scale.
        k: How many to name.

    Example:
        >>> values = {"h.0": [1.0, 1.1, 0.9, 1.0], "h.1": [1.2, 1.0, 9.0, 0.8]}
        >>> [(head.layer, head.head) for head in outstanding_heads(values, "energy_rms", 1)]
        [('h.1', 2)]
    """
    places = [(layer, head) for layer, heads in values.items() for head in range(np.size(np.asarray(heads)))]
    if not places or k <= 0:
        return []
    flat = np.concatenate([np.asarray(heads, dtype=np.float64).ravel() for heads in values.values()])
    distances = robust_distances(flat, metric)
    order = np.argsort(-np.nan_to_num(np.abs(distances), nan=-1.0, posinf=np.inf), kind="stable")
    chosen = [int(at) for at in order[:k] if not np.isnan(distances[at])]
    return [OutstandingHead(places[at][0], places[at][1], float(flat[at]), float(distances[at])) for at in chosen]


def robust_distances(values: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    """Distances of `outstanding_heads`, ``(num_heads,)`` in and out."""
    log_scale = metric in METRICS and METRICS[metric].log_scale
    with np.errstate(divide="ignore", invalid="ignore"):  # a dead head: log 0 is as far as can be
        x = np.log(values) if log_scale else values
    if not np.isfinite(x).any():
        return np.full_like(x, np.nan)
    centre = np.median(x[np.isfinite(x)])
    mad = np.median(np.abs(x[np.isfinite(x)] - centre))
    unit = 1.0 if log_scale else max(1.0, abs(centre))
    return np.asarray((x - centre) / (1.4826 * mad + _SPREAD_FLOOR * unit))


def crowd_range(values: NDArray[np.float64], metric: str, quantiles: tuple[float, float]) -> tuple[float, float] | None:
    """Ends of a scale that belongs to the crowd: quantiles over the heads, without the few that are far out.

    Among a dozen heads a quantile is nearly the greatest of them, so one that runs away would paint all others alike.
    Where more than a quarter of the heads are far from the middle they are no outliers, and all count.

    Args:
        values: Of any shape; what is no number, or not positive where ratios are read, is passed over.
        metric: Name of the metric, for its scale.
        quantiles: Of the heads that count, at the low and at the high end.

    Returns:
        The ends, or None where nothing is known.

    Example:
        >>> crowd_range(np.array([1.0, 2.0, 3.0, 4.0, 1000.0]), "energy_rms", (0.0, 1.0))
        (1.0, 4.0)
    """
    log_scale = metric in METRICS and METRICS[metric].log_scale
    known = values[np.isfinite(values) & ((values > 0) | (not log_scale))].astype(np.float64)
    if not known.size:
        return None
    crowd = known[np.abs(robust_distances(known, metric)) <= _FAR_OUT]
    low, high = np.quantile(crowd if 4 * crowd.size >= 3 * known.size else known, quantiles)
    return float(low), float(high)


def still_firing(events: Iterable[AlertEvent]) -> list[AlertEvent]:
    """Alarms that began and did not clear, in the order in which they began, each as it was last told."""
    firing: dict[tuple[str, str | None, str, int | None], AlertEvent] = {}
    for event in events:
        key = (event.rule, event.layer, event.scope, event.head)
        if event.state == "firing":
            firing[key] = event
        else:
            firing.pop(key, None)
    return list(firing.values())


def by_concern(
    firing: Iterable[AlertEvent], coverage: Mapping[str, LayerCoverage] | None = None
) -> list[list[AlertEvent]]:
    """Alarms that fire, put together by head, layer or run, in the order in which to look at them.

    The run comes first, then what has a critical alarm, what several rules agree on, and what began earlier. With the
    ``coverage`` a query head and the KV head that it alone reads are one.
    """
    by_place: dict[tuple[str | None, str, int | None], list[AlertEvent]] = {}
    for event in firing:
        layer = None if event.layer is None else (coverage or {}).get(event.layer)
        is_one_head = event.head is not None and layer is not None and layer.num_kv_heads == layer.num_query_heads
        by_place.setdefault((event.layer, "head" if is_one_head else event.scope, event.head), []).append(event)

    def concern(events: list[AlertEvent]) -> tuple[bool, bool, int, int]:
        calm = all(event.severity != "critical" for event in events)
        return events[0].layer is not None, calm, -len(events), min(event.began for event in events)

    return sorted(by_place.values(), key=concern)


def head_name(event: AlertEvent, short: Mapping[str, str] | None = None) -> str:
    """Who an event is about: ``layers.3 head 7``, ``layers.3 KV head 1``, ``layers.3`` or ``the whole run``."""
    if event.layer is None:
        return "the whole run"
    layer = (short or {}).get(event.layer, event.layer)
    if event.head is None:
        return layer
    return f"{layer} {'KV head' if event.scope == 'kv_head' else 'head'} {event.head}"


def heads_concerned(
    event: AlertEvent, metric: str | None, coverage: Mapping[str, LayerCoverage] | None = None
) -> tuple[int, ...]:
    """Indices of the heads an event is about, counted as ``metric`` counts them.

    An alarm about a KV head concerns all its query heads, one about a query head the KV head it reads. Without the
    ``coverage`` that says how many share one, only a metric that counts like the alarm has an answer.

    Example:
        >>> coverage = {"h.0": LayerCoverage("h.0", num_query_heads=8, num_kv_heads=2)}
        >>> sink = AlertEvent("key_sink", "key_sink", "kv_head", "h.0", 1, 9.0, 2.0, 100, "firing")
        >>> heads_concerned(sink, "key_incoherence", coverage), heads_concerned(sink, "energy_rms", coverage)
        ((1,), (4, 5, 6, 7))
    """
    if event.head is None or event.layer is None:
        return ()
    scope = METRICS[metric].scope if metric in METRICS else event.scope
    if scope == event.scope:
        return (event.head,)
    layer = (coverage or {}).get(event.layer)
    if layer is None or not layer.num_kv_heads:
        return ()
    return (layer.kv_head_of(event.head),) if scope == "kv_head" else layer.query_heads_of(event.head)


def short_layer_names(layers: Iterable[str]) -> dict[str, str]:
    """Names of layers without what all of them share, still unique.

    Example:
        >>> short_layer_names(["model.layers.0.self_attn", "model.layers.1.self_attn"])
        {'model.layers.0.self_attn': 'layers.0', 'model.layers.1.self_attn': 'layers.1'}
    """
    names = list(dict.fromkeys(layers))
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts), default=0)
    start = _num_shared(zip(*parts, strict=False))
    if len(names) < 2 or start == shortest:
        return {name: name for name in names}
    end = min(_num_shared(zip(*map(reversed, parts), strict=False)), shortest - start - 1)
    if all(part[start].isdigit() for part in parts):
        start = max(0, start - 1)  # a bare number needs its noun
    short = {name: ".".join(part[start : len(part) - end]) for name, part in zip(names, parts, strict=True)}
    return short if len(set(short.values())) == len(names) else {name: name for name in names}


def _num_shared(columns: Iterable[tuple[Any, ...]]) -> int:
    """How many leading columns hold one value only."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
