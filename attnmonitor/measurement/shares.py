"""Shared work: where processes run the same forward on the same probe, each finishes some of the layers.

What a layer costs after its attention ran is then paid by one process, and the numbers are exchanged once. Every layer
is computed by one process as it would be alone, so its numbers have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnmonitor.sample import LayerCoverage

__all__ = ["Part", "Share", "joined_shares"]

Tables = dict[str, dict[str, Tensor]]
Part = tuple[Tables, Tables, Mapping[str, LayerCoverage], Mapping[str, Any]]
"""What a process has finished: values, spread, coverage of its layers, diagnostics."""


@dataclass(frozen=True)
class Share:
    """The layers that one of the processes finishes: they are dealt out in turn.

    Attributes:
        place: The process, counted among those that share the work.
        count: How many they are.
        layers: Names of all layers at attach; others are the first process's.
    """

    place: int = 0
    count: int = 1
    layers: tuple[str, ...] = ()

    def place_of(self, layer: str) -> int:
        """The process that finishes a layer."""
        return self.layers.index(layer) % self.count if layer in self.layers else 0

    def takes(self, layer: str) -> bool:
        """Whether this process finishes a layer."""
        return self.place_of(layer) == self.place


def joined_shares(
    share: Share, parts: Sequence[Part]
) -> tuple[Tables, Tables, dict[str, LayerCoverage], dict[str, Any]]:
    """Join what all processes have finished: values, spread, coverage and diagnostics, in the order of one process."""
    coverage = {name: layer for _, _, layers, _ in parts for name, layer in layers.items()}
    order = {name: coverage[name] for name in dict.fromkeys([*share.layers, *coverage]) if name in coverage}

    diagnostics = dict(parts[0][3])
    counts = [sum(layer.measured for layer in layers.values()) for _, _, layers, _ in parts]
    for name in diagnostics:
        known = [(part[3][name], count) for part, count in zip(parts, counts, strict=True) if count]
        if name.endswith("_fraction"):
            total = sum(count for _, count in known)
            diagnostics[name] = sum(value * count for value, count in known) / total if total else math.nan
        elif name == "invariant_residual":
            diagnostics[name] = max((value for value, _ in known), default=math.nan)
    values, spread = ([part[0] for part in parts], [part[1] for part in parts])
    return _joined_tables(share, values), _joined_tables(share, spread), order, diagnostics


def _joined_tables(share: Share, tables: Sequence[Tables]) -> Tables:
    return {
        metric: {name: tables[share.place_of(name)][metric][name] for name in layers}
        for metric, layers in tables[0].items()
    }
