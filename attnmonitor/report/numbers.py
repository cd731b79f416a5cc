"""The numbers of a run that the report holds: few enough to open quickly, with what was left out counted.

A run of 1,024 heads, 12 metrics and 2,000 samples is 25 million values. A page with one million is still fast, so the
curves of a longer run are thinned to evenly spaced samples (the first, the last and those with alarms always among
them), the same for all heads; bands are quantiles over all heads at up to 200 samples. Values are sent as float32.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnmonitor.alerts.firing import most_severe_first
from attnmonitor.metrics.catalog import METRICS, head_noun, is_log, metric_scope, metric_title
from attnmonitor.record import RunRecord
from attnmonitor.report.alarms import AlarmSpan, alarm_metric, alarm_spans
from attnmonitor.report.curves import thinned
from attnmonitor.report.traces import QUANTILES
from attnmonitor.sample import AlertEvent, LayerCoverage, Scope, head_name, heads_concerned, scoped_head_name
from attnmonitor.summary.logged import shown_curves
from attnmonitor.summary.names import fault_text, short_layer_names
from attnmonitor.summary.outliers import range_without_outliers

__all__ = ["run_numbers", "segment_starts", "unpacked"]

MOST_VALUES = 1_200_000
_SLACK = 1.1  # a run that is longer by less is not thinned
MOST_BAND_SAMPLES = 200
MOST_LOGGED_POINTS = 2000

_SCOPES: tuple[Scope, ...] = ("query_head", "kv_head")


def run_numbers(record: RunRecord, *, most_values: int = MOST_VALUES) -> dict[str, Any]:
    """The numbers of one run that the page needs, ready for JSON.

    Args:
        record: The run.
        most_values: Values of single heads in the whole report of this run.

    Returns:
        ``name`` of the file; ``steps``; ``layers``, their ``short`` names, the ``reasons`` why those without numbers
        have none, the ``names`` of their heads per scope, and ``kv_heads``, those that their query heads read;
        ``metrics`` (per metric ``frames``, indices into ``steps``, and the values at them, ``(num_frames, num_heads of
        all layers)``); ``logged``, what training logged; ``alarms``; ``seconds``; ``segments``; and ``first_look``: the
        layer, head and scope to open the page with, and the metric that the alarm there names.
    """
    spans, steps, names = alarm_spans(record.events), record.steps, record.metrics
    trajectories = {name: record.trajectories(name) for name in names}
    nothing = {
        name: np.empty((len(steps), 0), np.float32) for name, layer in record.coverage.items() if not layer.measured
    }
    trajectories = {name: {**nothing, **shown} for name, shown in trajectories.items()}
    layers = list(dict.fromkeys([*record.coverage, *(layer for shown in trajectories.values() for layer in shown)]))
    short = short_layer_names(layers)
    keep = np.flatnonzero(
        np.isin(steps, [step for span in spans for step in (span.began, span.ended) if step is not None])
    )
    share = most_values // max(1, len(trajectories))
    return {
        "name": record.path.name,
        "steps": steps.tolist(),
        "layers": layers,
        "short": [short[layer] for layer in layers],
        "reasons": [record.coverage[layer].reason if layer in record.coverage else "" for layer in layers],
        "names": {
            scope: [
                [
                    scoped_head_name(short[layer], head, scope, record.coverage.get(layer))
                    for head in range(_num_heads(trajectories, layer, scope))
                ]
                for layer in layers
            ]
            for scope in _SCOPES
        },
        "kv_heads": [_kv_heads(record, layer) for layer in layers],
        "metrics": {
            name: {**_metric_numbers(name, shown, layers, keep, share), "noun": head_noun(name, record.coverage)}
            for name, shown in trajectories.items()
        },
        "logged": {name: _logged(curve) for name, curve in shown_curves(record.logged).items()},
        "alarms": [_alarm(span, record, layers, short, names) for span in spans],
        "first_look": _first_look(record, layers, names),
        "seconds": packed(record.seconds),
        "segments": segment_starts(record),
    }


def segment_starts(record: RunRecord) -> list[int]:
    """First step of every segment but the first."""
    pairs = zip(record.samples, record.samples[1:], strict=False)
    return [after.global_step for before, after in pairs if after.segment != before.segment]


def packed(values: NDArray[Any]) -> str:
    """Values as base64 of little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def unpacked(text: str) -> NDArray[np.float32]:
    """Values from `packed`, as one row."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def _num_heads(trajectories: Mapping[str, Mapping[str, NDArray[np.float32]]], layer: str, scope: Scope) -> int:
    """The most heads that a metric of this scope has in the layer."""
    widths = (
        shown[layer].shape[1]
        for name, shown in trajectories.items()
        if layer in shown and (metric_scope(name) or "query_head") == scope
    )
    return max(widths, default=0)


def _metric_numbers(
    name: str,
    trajectories: Mapping[str, NDArray[np.float32]],
    layers: Sequence[str],
    keep: NDArray[np.intp],
    most_values: int,
) -> dict[str, Any]:
    shown = [layer for layer in layers if layer in trajectories]
    heads = np.concatenate([trajectories[layer] for layer in shown], axis=1)  # (num_samples, num_heads of all layers)
    measured = np.flatnonzero(np.isfinite(heads).any(axis=1))
    most = most_values // max(1, heads.shape[1])
    is_thinned = len(measured) > _SLACK * most
    kept = thinned(np.intersect1d(keep, measured), max(2, most // 4))  # many alarms do not make the page larger
    frames = thinned(measured, max(2, most - len(kept)), kept) if is_thinned else measured
    frames = np.union1d(frames, _after_the_last(measured, len(heads)))
    band_samples = thinned(measured, MOST_BAND_SAMPLES, keep)
    bands = np.nanquantile(heads[band_samples], QUANTILES, axis=1) if len(band_samples) else np.empty((5, 0))
    drawn = bands[np.isfinite(bands) & ((bands > 0) | (not is_log(name)))]
    return {
        "title": metric_title(name),
        "meaning": METRICS[name].meaning if name in METRICS else "",
        "scope": metric_scope(name) or "query_head",
        "rows": [[layers.index(layer), trajectories[layer].shape[1]] for layer in shown],
        "frames": frames.tolist(),
        "thinned": is_thinned,
        "values": packed(heads[frames]),
        "band_samples": band_samples.tolist(),
        "bands": packed(bands),
        "ends": (float(drawn.min()), float(drawn.max())) if drawn.size else None,
        "limits": range_without_outliers(heads[frames], name, (0.01, 0.99)),
    }


def _after_the_last(measured: NDArray[np.intp], num_samples: int) -> NDArray[np.intp]:
    """First and last sample without a number at the end of a run, where its samples had numbers before."""
    if not len(measured) or num_samples - 1 - measured[-1] < max(1, *np.diff(measured, prepend=-1)):
        return np.empty(0, dtype=np.intp)
    return np.array([measured[-1] + 1, num_samples - 1])


def _kv_heads(record: RunRecord, layer: str) -> list[int]:
    """The KV head that each query head reads."""
    entry = record.coverage.get(layer)
    return [] if entry is None else [entry.kv_head_of(head) for head in range(entry.num_query_heads)]


def _logged(curve: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Steps and values of a curve that training logged."""
    kept = thinned(np.arange(len(curve)), MOST_LOGGED_POINTS)
    values = np.array([curve[at][1] for at in kept], dtype=np.float64)
    return {"steps": [curve[at][0] for at in kept], "values": packed(values)}


def _first_look(record: RunRecord, layers: Sequence[str], metrics: Sequence[str]) -> dict[str, Any] | None:
    """What the worst alarm of a head is about; where there is none, the worst of all."""
    worst = [events[0] for events in most_severe_first(record.firing, record.coverage)]
    of_heads = [event for event in worst if event.layer in layers and event.head is not None]
    for event in of_heads or worst:
        return {
            "layer": layers.index(event.layer) if event.layer in layers else None,
            "head": event.head,
            "scope": event.scope,
            "metric": alarm_metric(event, metrics),
        }
    return None


def _alarm(
    span: AlarmSpan, record: RunRecord, layers: Sequence[str], short: Mapping[str, str], metrics: Sequence[str]
) -> dict[str, Any]:
    event = span.event
    return {
        "layer": layers.index(event.layer) if event.layer in layers else None,
        "heads": {scope: _heads_of(event, scope, record.coverage) for scope in _SCOPES},
        "where": head_name(event, short, record.coverage),
        "scope": event.scope,
        "head": event.head,
        "rule": event.rule,
        "kind": event.kind,
        "fault": fault_text(event.kind),
        "metric": alarm_metric(event, metrics),
        "severity": event.severity,
        "message": event.message,
        "began": span.began,
        "ended": span.ended,
    }


def _heads_of(event: AlertEvent, scope: Scope, coverage: Mapping[str, LayerCoverage]) -> tuple[int, ...]:
    """The heads that an alarm is about; all of them where it is about a layer."""
    layer = coverage.get(event.layer or "")
    if event.head is None and layer is not None:
        return tuple(range(layer.num_query_heads if scope == "query_head" else layer.num_kv_heads))
    return heads_concerned(event, scope, coverage)
