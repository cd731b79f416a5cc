"""What the rules may judge of a layer whose keys are channels."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from attnmonitor.sample import LayerCoverage

__all__ = ["OF_POSITIONS", "judged_values"]

OF_POSITIONS = frozenset({"key_leverage_max", "key_incoherence", "key_norm_participation", "value_spread", "sink_mass"})
"""Metrics that say how positions differ. Where channels attend to channels, some channels are expected to dominate."""


def judged_values(
    values: Mapping[str, Mapping[str, Tensor]], coverage: Mapping[str, LayerCoverage]
) -> dict[str, Mapping[str, Tensor]]:
    """Return the values without those that say nothing of positions because the layer's keys are channels."""
    channels = {name for name, layer in coverage.items() if layer.sees == "channels"}
    judged = {
        metric: {name: heads for name, heads in layers.items() if metric not in OF_POSITIONS or name not in channels}
        for metric, layers in values.items()
    }
    return {metric: layers for metric, layers in judged.items() if layers}
