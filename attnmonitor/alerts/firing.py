"""Which alarms are firing, in which order to look at them, and how each came to where it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from attnmonitor.sample import AlertEvent, LayerCoverage, severity_order, still_firing, worst_first

__all__ = ["course_text", "most_severe_first", "number_text", "still_firing"]


def most_severe_first(
    firing: Iterable[AlertEvent], coverage: Mapping[str, LayerCoverage] | None = None
) -> list[list[AlertEvent]]:
    """Return firing alarms grouped by head, layer or run, in the order in which to look at the groups.

    The run comes first, then groups with a critical alarm, then those that are farther past their limit now, then those
    with more alarms, then those that began earlier. In a group the worst alarm comes first.

    Args:
        firing: Latest event of each firing alarm.
        coverage: How each layer was captured. With it, a query head and the KV head that only it reads are one group.
    """
    groups: dict[tuple[str | None, str, int | None], list[AlertEvent]] = {}
    for event in worst_first(firing):
        layer = None if event.layer is None else (coverage or {}).get(event.layer)
        is_one_head = event.head is not None and layer is not None and layer.num_kv_heads == layer.num_query_heads
        groups.setdefault((event.layer, "head" if is_one_head else event.scope, event.head), []).append(event)

    def order(events: list[AlertEvent]) -> tuple[bool, tuple[bool, float], int, int]:
        worst = min(map(severity_order, events))
        return events[0].layer is not None, worst, -len(events), min(event.began for event in events)

    return sorted(groups.values(), key=order)


def course_text(alarm: AlertEvent) -> str:
    """Return an alarm's value when it fired, now and at its worst; ``""`` where they are unknown.

    Example:
        >>> from dataclasses import replace
        >>> hot = AlertEvent("energy_hot", "logit_blowup", "query_head", "h.0", 1, 0.23, 0.05, 900, "firing")
        >>> course_text(replace(hot, metric="energy_rms", now=256.0, worst=300.0))
        'energy_rms 0.23 at alarm, 256 now, 300 worst'
    """
    if math.isnan(alarm.value) or math.isnan(alarm.worst):
        return ""
    values = f"{number_text(alarm.value)} at alarm, {number_text(alarm.now)} now, {number_text(alarm.worst)} worst"
    return f"{alarm.metric} {values}".strip()


def number_text(value: float) -> str:
    """Return three digits of a number, with separators where it is large; ``no number`` for NaN.

    Example:
        >>> number_text(0.22749), number_text(256.4), number_text(12345.6)
        ('0.227', '256', '12,346')
    """
    if math.isnan(value):
        return "no number"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
