"""What layers and faults are called in every text and chart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from attnmonitor.sample import AlertEvent

__all__ = ["MAX_NAMED", "fault_names", "short_layer_names"]

MAX_NAMED = 3
"""Heads named in one line of text; of the others it gives the number."""


def fault_names(events: Iterable[AlertEvent]) -> str:
    """Each kind of fault once, with the step of its first alarm.

    Example:
        >>> sink = AlertEvent("key_rank", "key_sink", "kv_head", "h.0", 1, 9.0, 2.0, 900, "firing", since_step=400)
        >>> fault_names([sink])
        'key sink since step 400'
    """
    since: dict[str, int] = {}
    for event in events:  # several rules may see the same fault
        since[event.kind] = min(event.began, since.get(event.kind, event.began))
    return ", ".join(f"{kind.replace('_', ' ')} since step {step:,}" for kind, step in since.items())


def short_layer_names(layers: Iterable[str]) -> dict[str, str]:
    """Names of layers without the parts that all of them share, still unique.

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
    """Number of leading columns that hold only one value."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
