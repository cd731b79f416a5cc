"""Alarms: which fire, in what order to look at them, and which heads they are about."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from attnmonitor.sample.records import AlarmKey, AlertEvent, LayerCoverage
from attnmonitor.sample.scopes import Scope

__all__ = [
    "head_name",
    "heads_concerned",
    "scope_noun",
    "scoped_head_name",
    "severity_order",
    "still_firing",
    "worst_first",
]

_FAR_OUT = 4.0  # times the limit; healthy heads that learn late reach 3


def still_firing(events: Iterable[AlertEvent]) -> list[AlertEvent]:
    """Return the latest event of every alarm that began and did not clear, worst first, with its first value."""
    firing: dict[AlarmKey, AlertEvent] = {}
    for event in events:
        if event.state == "firing":
            firing[event.key] = replace(event, value=firing.get(event.key, event).value)
        else:
            firing.pop(event.key, None)
    return worst_first(firing.values())


def worst_first(firing: Iterable[AlertEvent]) -> list[AlertEvent]:
    """Return alarms in the order in which to look at them: by severity, then distance now, then time."""
    return sorted(firing, key=lambda alarm: (*severity_order(alarm), alarm.began))


def severity_order(alarm: AlertEvent) -> tuple[bool, float]:
    """Return what sorts alarms by severity and then by distance now, worst first; an unknown distance counts as none.

    An alarm that began only now and is far out is as severe as one that has lasted: it does not wait behind it.
    """
    distance = 0.0 if math.isnan(alarm.distance) else alarm.distance
    return not (alarm.severity == "critical" or distance >= _FAR_OUT), -distance


def head_name(
    event: AlertEvent,
    short: Mapping[str, str] | None = None,
    coverage: Mapping[str, LayerCoverage] | None = None,
) -> str:
    """Return what an event is about: ``layers.3 head 7``, ``layers.3 KV head 1``, ``layers.3`` or ``the whole run``.

    Args:
        event: The event.
        short: Shorter names of layers.
        coverage: How each layer was captured, for `scope_noun`.
    """
    if event.layer is None:
        return "the whole run"
    layer: str = (short or {}).get(event.layer, event.layer)
    if event.head is None:
        return layer
    return scoped_head_name(layer, event.head, event.scope, (coverage or {}).get(event.layer))


def scoped_head_name(layer: str, head: int, scope: str | None, known: LayerCoverage | None = None) -> str:
    """Return the name of a head in tables, charts and messages: ``layers.3 head 7`` or ``layers.3 KV head 1``.

    Args:
        layer: Name of the layer, as it is shown.
        head: Index in the scope.
        scope: What the index counts.
        known: How the layer was captured, for `scope_noun`.
    """
    return f"{layer} {scope_noun(scope, known)} {head}"


def scope_noun(scope: str | None, known: LayerCoverage | None = None) -> str:
    """Return ``"KV head"`` for one that several query heads may read, else ``"head"``.

    Where each query head has a KV head of its own, the two are one head to a reader, with one name.

    Args:
        scope: ``"query_head"``, ``"kv_head"`` or None.
        known: How the layer was captured; None where that is unknown.
    """
    is_one_to_one = known is not None and known.num_kv_heads == known.num_query_heads
    return "KV head" if scope == "kv_head" and not is_one_to_one else "head"


def heads_concerned(
    event: AlertEvent, scope: Scope | None, coverage: Mapping[str, LayerCoverage] | None = None
) -> tuple[int, ...]:
    """Return the indices of the heads an event is about, counted in ``scope``.

    An alarm on a KV head concerns all its query heads, one on a query head the KV head it reads. Without ``coverage``,
    which says how many query heads share a KV head, only the alarm's own scope has an answer.

    Args:
        event: The event.
        scope: ``"query_head"`` or ``"kv_head"``; None for the event's own scope.
        coverage: How each layer was captured.

    Example:
        >>> coverage = {"h.0": LayerCoverage("h.0", num_query_heads=8, num_kv_heads=2)}
        >>> sink = AlertEvent("key_sink", "key_sink", "kv_head", "h.0", 1, 9.0, 2.0, 100, "firing")
        >>> heads_concerned(sink, "kv_head", coverage), heads_concerned(sink, "query_head", coverage)
        ((1,), (4, 5, 6, 7))
    """
    if event.head is None or event.layer is None:
        return ()
    if scope is None or scope == event.scope:
        return (event.head,)
    layer = (coverage or {}).get(event.layer)
    if layer is None or not layer.num_kv_heads:
        return ()
    return (layer.kv_head_of(event.head),) if scope == "kv_head" else layer.query_heads_of(event.head)
