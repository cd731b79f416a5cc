"""Short names of layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

__all__ = ["short_layer_names"]


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
