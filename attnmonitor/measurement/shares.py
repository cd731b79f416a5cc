"""Shared work: where processes run the same forward on the same probe, each finishes some of the layers.

What a layer costs after its attention ran is then paid by one process, and the numbers are exchanged once. Every layer
is computed by one process as it would be alone, so its numbers have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attnmonitor.measurement.measured import LayerValues, Measured

__all__ = ["Share", "joined_shares"]


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


def joined_shares(share: Share, parts: Sequence[Measured]) -> Measured:
    """Join what all processes have finished, with the layers in the order of one process."""
    coverage = {name: layer for part in parts for name, layer in part.coverage.items()}
    order = {name: coverage[name] for name in dict.fromkeys([*share.layers, *coverage]) if name in coverage}
    counts = [sum(layer.measured for layer in part.coverage.values()) for part in parts]

    def known(name: str) -> list[tuple[float, int]]:
        """Return a number of each process that has measured a layer, and how many it has."""
        return [(float(part.diagnostics[name]), count) for part, count in zip(parts, counts, strict=True) if count]

    diagnostics = dict(parts[0].diagnostics)
    for name in diagnostics:
        if name.endswith("_fraction"):
            total = sum(count for _, count in known(name))
            diagnostics[name] = sum(value * count for value, count in known(name)) / total if total else math.nan
        elif name == "invariant_residual":
            diagnostics[name] = max((value for value, _ in known(name)), default=math.nan)
    values, spread = ([part.values for part in parts], [part.spread for part in parts])
    return Measured(_joined_tables(share, values), _joined_tables(share, spread), order, diagnostics)


def _joined_tables(share: Share, tables: Sequence[LayerValues]) -> LayerValues:
    return {
        metric: {name: tables[share.place_of(name)][metric][name] for name in layers}
        for metric, layers in tables[0].items()
    }
