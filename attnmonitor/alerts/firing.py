"""Which alarms still fire, and in which order to look at them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attnmonitor.sample import AlertEvent, LayerCoverage

__all__ = ["most_severe_first", "still_firing"]


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


def most_severe_first(
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
