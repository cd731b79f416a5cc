"""Alarms from first step to last, worst first, each with the page's address of its head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from urllib.parse import quote, urlencode

from attnmonitor.metrics.catalog import metric_scope
from attnmonitor.record import RunRecord
from attnmonitor.sample import AlarmKey, AlertEvent

__all__ = ["AlarmSpan", "alarm_address", "alarm_metric", "alarm_spans", "spans_worst_first"]


@dataclass(frozen=True)
class AlarmSpan:
    """An alarm from its first step to its last: ``ended`` is None while it fires."""

    event: AlertEvent
    began: int
    ended: int | None


def alarm_spans(events: Sequence[AlertEvent]) -> list[AlarmSpan]:
    """Join the events of each alarm, in the order in which the alarms began."""
    spans: list[AlarmSpan] = []
    running: dict[AlarmKey, int] = {}
    for event in events:
        key = event.key
        if key in running:
            at = running[key]
            ended = event.global_step if event.state == "cleared" else None
            before = spans[at].event
            shown = replace(event if ended is None else before, value=before.value, now=event.now, worst=event.worst)
            spans[at] = AlarmSpan(shown, spans[at].began, ended)
            if ended is not None:
                del running[key]
        else:
            if event.state == "firing":
                running[key] = len(spans)
            spans.append(AlarmSpan(event, event.began, None if event.state == "firing" else event.global_step))
    return spans


def spans_worst_first(record: RunRecord) -> list[AlarmSpan]:
    """The alarms that fire, worst first, then those that are over, the latest first."""
    spans = {(span.event.key, span.ended): span for span in alarm_spans(record.events)}
    firing = [replace(spans.pop((alarm.key, None)), event=alarm) for alarm in record.firing]
    return [*firing, *sorted(spans.values(), key=lambda span: -(span.ended or 0))]


def alarm_metric(event: AlertEvent, metrics: Sequence[str]) -> str | None:
    """The recorded metric that an alarm is about; None where it names none."""
    if event.metric in metrics:
        return event.metric
    return next((name for name in metrics if re.search(rf"\b{re.escape(name)}\b", event.message)), None)


def alarm_address(span: AlarmSpan, metrics: Sequence[str], run: int = 0) -> str:
    """The part of the page's address that chooses what an alarm is about, at the step it began.

    The page's script reads and writes such addresses. ``head`` counts what the metric counts, unless a ``scope`` says
    otherwise; ``run`` is there for all runs but the first of a page.

    Args:
        span: The alarm.
        metrics: Metrics that were recorded.
        run: Index of the run on the page.

    Example:
        >>> sink = AlertEvent("key_sink", "key_sink", "kv_head", "h.0", 1, 9.0, 2.0, 100, "firing", metric="key_rms")
        >>> alarm_address(AlarmSpan(sink, 100, None), ["key_rms"])
        '#layer=h.0&head=1&metric=key_rms&step=100'
    """
    event, metric = span.event, alarm_metric(span.event, metrics)
    counted = metric_scope(metric) or "query_head"
    wanted = {
        "layer": event.layer,
        "head": event.head,
        "scope": event.scope if event.head is not None and event.scope != counted else None,
        "metric": metric,
        "step": span.began,
        "run": run or None,
    }
    return "#" + urlencode({key: value for key, value in wanted.items() if value is not None}, quote_via=quote, safe="")
