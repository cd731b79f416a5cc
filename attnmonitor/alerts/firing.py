"""Which alarms are firing, and in which order to look at them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attnmonitor.sample import AlertEvent, LayerCoverage

__all__ = ["most_severe_first", "still_firing"]


def still_firing(events: Iterable[AlertEvent]) -> list[AlertEvent]:
    """Return the latest event of every alarm that began and did not clear, in the order in which they began."""
    firing: dict[tuple[str, str | None, str, int | None], AlertEvent] = {}
    for event in events:
        key = (event.rule, event.layer, event.scope, event.head)
        if event.state == "firing":
            firing[key] = event
        else:
            firing.pop(key, None)
    return list(firing.values())


def most_severe_first(
    firing: Iterable[AlertEvent], coverage: Mapping[str, LayerCoverage] | None = None
) -> list[list[AlertEvent]]:
    """Return firing alarms grouped by head, layer or run, in the order in which to look at the groups.

    The run comes first, then groups with a critical alarm, then those with more alarms, then those that began earlier.

    Args:
        firing: Latest event of each firing alarm.
        coverage: How each layer was captured. With it, a query head and the KV head that only it reads are one group.
    """
    groups: dict[tuple[str | None, str, int | None], list[AlertEvent]] = {}
    for event in firing:
        layer = None if event.layer is None else (coverage or {}).get(event.layer)
        is_one_head = event.head is not None and layer is not None and layer.num_kv_heads == layer.num_query_heads
        groups.setdefault((event.layer, "head" if is_one_head else event.scope, event.head), []).append(event)

    def order(events: list[AlertEvent]) -> tuple[bool, bool, int, int]:
        has_no_critical = all(event.severity != "critical" for event in events)
        return events[0].layer is not None, has_no_critical, -len(events), min(event.began for event in events)

    return sorted(groups.values(), key=order)
