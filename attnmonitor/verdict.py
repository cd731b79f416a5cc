"""What a run comes to, in words: one line first, then which heads stand out, then a table of the layers.

People open a monitor to learn whether they must do something. The line says it; everything else (charts, table, report)
is there for whoever wants to know why. Only alarms decide the line: a head that is merely unlike the others is named as
unlike, never as sick, because healthy heads differ by factors of ten.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnmonitor.catalog import METRICS
from attnmonitor.record import RunRecord
from attnmonitor.sample import AlertEvent, LayerCoverage

__all__ = [
    "OutstandingHead",
    "by_concern",
    "coverage_table",
    "crowd_range",
    "head_name",
    "heads_concerned",
    "layer_table",
    "outstanding_heads",
    "print_layer_table",
    "short_layer_names",
    "still_firing",
    "verdict",
    "verdict_of_record",
]

TABLE_METRICS = ("energy_effective_rank", "energy_rms", "key_incoherence")
_MOST_NAMED = 3  # of heads in a line

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


def by_concern(firing: Iterable[AlertEvent]) -> list[list[AlertEvent]]:
    """Alarms that fire, put together by head, layer or run, in the order in which to look at them.

    The run comes first, then what has a critical alarm, what several rules agree on, and what began earlier.
    """
    by_place: dict[tuple[str | None, str, int | None], list[AlertEvent]] = {}
    for event in firing:
        by_place.setdefault((event.layer, event.scope, event.head), []).append(event)

    def concern(events: list[AlertEvent]) -> tuple[bool, bool, int, int]:
        calm = all(event.severity != "critical" for event in events)
        return events[0].layer is not None, calm, -len(events), min(map(_since, events))

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


def verdict(
    coverage: Mapping[str, LayerCoverage],
    *,
    num_samples: int,
    firing: Sequence[AlertEvent],
    num_cleared: int = 0,
    num_failed: int = 0,
    failure: str | None = None,
    watched: bool = True,
) -> str:
    """One line for people: whether there is anything to look at, and where.

    Args:
        coverage: How each layer was captured, or why it was not.
        num_samples: Samples taken, failed ones included.
        firing: Alarms that have begun and not cleared.
        num_cleared: Alarms that came and went.
        num_failed: Samples without values.
        failure: Why the last failed sample failed.
        watched: Whether any alert rule was on; without one nobody can say "healthy".

    Example:
        >>> coverage = {"h.0.attn": LayerCoverage("h.0.attn", how="sdpa", num_query_heads=12)}
        >>> verdict(coverage, num_samples=50, firing=[])
        '12 heads in 1 layer watched over 50 samples: healthy'
    """
    measured = [entry for entry in coverage.values() if entry.measured]
    missed = [entry for entry in coverage.values() if not entry.measured]
    if num_samples == 0:
        return "no sample taken yet"
    if num_failed == num_samples:
        return f"nothing measured: {_count(num_samples, 'sample')} failed ({failure})"
    if missed and not measured:
        return f"nothing measured in {_count(len(missed), 'attention layer')} ({missed[0].layer}: {missed[0].reason})"
    if firing:
        line = _complaint(firing, short_layer_names(coverage))
    else:
        heads = _count(sum(entry.num_query_heads for entry in measured), "head")
        over = f"in {_count(len(measured), 'layer')} watched over {_count(num_samples, 'sample')}"
        line = f"{heads} {over}: {'healthy' if watched else 'no alert rule was on'}"
    notes = []
    if num_cleared:
        notes.append(f"{_count(num_cleared, 'alarm')} came and went")
    if num_failed:
        notes.append(f"{_count(num_failed, 'sample')} failed")
    if missed:
        notes.append(f"{_count(len(missed), 'layer')} not measured")
    return "; ".join([line, *notes])


def verdict_of_record(record: RunRecord) -> str:
    """The line for a run record."""
    firing = still_firing(record.events)
    failed = [sample for sample in record.samples if sample.failure is not None]
    return verdict(
        record.coverage,
        num_samples=len(record.samples),
        firing=firing,
        num_cleared=sum(event.state == "cleared" for event in record.events),
        num_failed=len(failed),
        failure=failed[-1].failure if failed else None,
        watched=bool(record.config.get("alerts", True)),
    )


def layer_table(
    values: Mapping[str, Mapping[str, ArrayLike]],
    *,
    firing: Sequence[AlertEvent] = (),
    coverage: Mapping[str, LayerCoverage] | None = None,
    metrics: Sequence[str] = TABLE_METRICS,
) -> str:
    """A text table, one row per layer: the median over its heads with the least and the greatest, and its alarms.

    Args:
        values: ``values[metric][layer]`` is ``(num_heads,)``, as `Sample.values` has it.
        firing: Alarms to show beside their layer.
        coverage: Adds a row for each layer that was not measured, with the reason.
        metrics: Columns; those without values are left out.
    """
    header, rows = _table(values, firing, coverage or {}, metrics)
    upper, lower = zip(*(["", *name.split("\n")][-2:] for name in header), strict=True)
    return _aligned([upper, lower], rows)


def coverage_table(coverage: Mapping[str, LayerCoverage]) -> str:
    """A text table, one row per layer: how it was captured and verified, or why it was not measured.

    Example:
        >>> print(coverage_table({"h.0": LayerCoverage("h.0", "sdpa", "self", 12, 4, 64, 0.125, 3e-7, ("window",))}))
        layer  heads (query/KV)  head size  scale  captured   error    outside the field
        ─────  ────────────────  ─────────  ─────  ─────────  ───────  ─────────────────
        h.0    12/4              64         0.125  self sdpa  3.0e-07  window
    """
    header = ("layer", "heads (query/KV)", "head size", "scale", "captured", "error", "outside the field")
    rows = [
        (
            layer.layer,
            f"{layer.num_query_heads}/{layer.num_kv_heads}",
            str(layer.head_dim),
            f"{layer.scale:.4g}",
            f"{layer.kind} {layer.how}",
            "not comparable" if layer.error is None else f"{layer.error:.1e}",
            ", ".join(layer.outside),
        )
        if layer.measured
        else (layer.layer, "", "", "", "NOT MEASURED", "", layer.reason)
        for layer in coverage.values()
    ]
    return _aligned([header], rows)


def _aligned(header: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*header, *rows, strict=True)]
    rule = ["─" * width for width in widths]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (*header, rule, *rows)]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def print_layer_table(
    values: Mapping[str, Mapping[str, ArrayLike]],
    *,
    firing: Sequence[AlertEvent] = (),
    coverage: Mapping[str, LayerCoverage] | None = None,
    metrics: Sequence[str] = TABLE_METRICS,
) -> None:
    """Print `layer_table`, with lines and colour where ``rich`` is installed."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(layer_table(values, firing=firing, coverage=coverage, metrics=metrics))
        return
    header, rows = _table(values, firing, coverage or {}, metrics)
    table = Table(box=SIMPLE_HEAD)
    table.add_column(header[0], overflow="fold")
    for name in header[1:-1]:
        table.add_column(name, no_wrap=True)
    table.add_column(header[-1], min_width=12, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row), style="bold red" if row[-1] else None)
    Console().print(table)


def _table(
    values: Mapping[str, Mapping[str, ArrayLike]],
    firing: Sequence[AlertEvent],
    coverage: Mapping[str, LayerCoverage],
    metrics: Sequence[str],
) -> tuple[list[str], list[list[str]]]:
    shown = [name for name in metrics if values.get(name)]
    layers = list(dict.fromkeys(itertools.chain(coverage, *(values[name] for name in shown))))
    short = short_layer_names(layers)
    rows = []
    for layer in layers:
        cells = [_range_text(values[name].get(layer)) for name in shown]
        alarms = [
            f"{head_name(events[0], {layer: ''})}: {_kinds_text(events)}".removeprefix(": ").strip()
            for events in by_concern(event for event in firing if event.layer == layer)
        ]
        if layer in coverage and not coverage[layer].measured:
            alarms.append(f"not measured: {coverage[layer].reason}")
        more = [f"and {len(alarms) - _MOST_NAMED} more"] if len(alarms) > _MOST_NAMED else []
        rows.append([short[layer], *cells, "; ".join(alarms[:_MOST_NAMED] + more)])
    headings = [name.replace("_", "\n", 1).replace("_", " ") for name in shown]
    return ["layer", *headings, "look at"], rows


def _range_text(heads: ArrayLike | None) -> str:
    known = np.asarray([] if heads is None else heads, dtype=np.float64).ravel()
    known = known[~np.isnan(known)]
    if not known.size:
        return "–"
    least, middle, most = (f"{x:.0f}" if abs(x) >= 10 else f"{x:.2g}" for x in np.quantile(known, [0, 0.5, 1]))
    return f"{middle} ({least}–{most})"


def _complaint(firing: Sequence[AlertEvent], short: Mapping[str, str]) -> str:
    groups = by_concern(firing)
    of_run = [events for events in groups if events[0].layer is None]
    others = [events for events in groups if events[0].layer is not None]
    nouns = {"layer" if events[0].head is None else "head" for events in others}
    number = _count(len(others), nouns.pop() if len(nouns) == 1 else "place")
    named = ", ".join(f"{head_name(events[0], short)} ({_kinds_text(events)})" for events in others[:_MOST_NAMED])
    named += f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
    if of_run:
        line = f"the run needs a look ({_kinds_text(of_run[0])})"
        return f"{line}, and so {'does' if len(others) == 1 else 'do'} {number}: {named}" if others else line
    return f"{number} {'needs' if len(others) == 1 else 'need'} a look: {named}"


def _kinds_text(events: Iterable[AlertEvent]) -> str:
    """Each kind of fault once, since its first alarm: several rules may see the same fault."""
    since: dict[str, int] = {}
    for event in events:
        step = _since(event)
        since[event.kind] = min(step, since.get(event.kind, step))
    return ", ".join(f"{kind.replace('_', ' ')} since step {step:,}" for kind, step in since.items())


def _since(event: AlertEvent) -> int:
    return event.global_step if event.since_step is None else event.since_step


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _num_shared(columns: Iterable[tuple[Any, ...]]) -> int:
    """How many leading columns hold one value only."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
