"""What layers and faults are called in every text and chart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from attnmonitor.alerts.firing import course_text
from attnmonitor.sample import AlertEvent

__all__ = ["count_text", "fault_names", "fault_text", "short_layer_names"]

_FAULTS = {"mass": "many heads changed at once", "non_finite": "values are not finite"}
"""Kinds of faults that are sentences to a person; the others are their own words."""


def fault_text(kind: str) -> str:
    """Return a kind of fault in words.

    Example:
        >>> fault_text("mass"), fault_text("key_sink")
        ('many heads changed at once', 'key sink')
    """
    return _FAULTS.get(kind, kind.replace("_", " "))


def fault_names(events: Iterable[AlertEvent], *, courses: bool = True) -> str:
    """Return each kind of fault once, with the step of its first alarm and the course of its worst one.

    Args:
        events: Alarms, worst first.
        courses: Whether to add the values at alarm, now and at the worst.

    Example:
        >>> sink = AlertEvent("key_rank", "key_sink", "kv_head", "h.0", 1, 9.0, 2.0, 900, "firing", since_step=400)
        >>> fault_names([sink])
        'key sink since step 400'
    """
    by_kind: dict[str, list[AlertEvent]] = {}
    for event in events:  # several rules may see the same fault
        by_kind.setdefault(event.kind, []).append(event)
    named = []
    for kind, same in by_kind.items():
        since = f"{fault_text(kind)} since step {min(event.began for event in same):,}"
        course = course_text(same[0]) if courses else ""
        named.append(f"{since}: {course}" if course else since)
    return ("; " if any(": " in each for each in named) else ", ").join(named)


def count_text(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short_layer_names(layers: Iterable[str]) -> dict[str, str]:
    """Return the names of layers without the parts that all of them share, still unique.

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
        start = max(0, start - 1)  # keep the noun before a number: "layers.0", not "0"
    short = {name: ".".join(part[start : len(part) - end]) for name, part in zip(names, parts, strict=True)}
    return short if len(set(short.values())) == len(names) else {name: name for name in names}


def _num_shared(columns: Iterable[tuple[Any, ...]]) -> int:
    """Return the number of leading columns that hold only one value."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
