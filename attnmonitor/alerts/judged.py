"""What the rules may judge of a layer: not positions where keys are channels, nor sizes of tiny heads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from attnmonitor.sample import LayerCoverage

__all__ = ["LEAST_HEAD_DIM", "OF_MANY_DIMENSIONS", "OF_POSITIONS", "judged_values"]

OF_POSITIONS = frozenset({"key_leverage_max", "key_incoherence", "key_norm_participation", "value_spread", "sink_mass"})
"""Metrics that say how positions differ. Where channels attend to channels, some channels are expected to dominate."""

LEAST_HEAD_DIM = 4

OF_MANY_DIMENSIONS = frozenset(
    {"query_rms", "key_rms", "key_leverage_max", "key_incoherence", "key_norm_participation", "key_participation_ratio"}
)
"""Metrics that take the mean over a head's dimensions, or say how keys spread over them. A healthy head of 2 or 3
dimensions changes them by factors of 5 while it learns, because it turns its few directions."""


def judged_values(
    values: Mapping[str, Mapping[str, Tensor]], coverage: Mapping[str, LayerCoverage]
) -> dict[str, Mapping[str, Tensor]]:
    """Return the values without those that say nothing about a head of the layer."""
    unjudged = {name: _unjudged_metrics(layer) for name, layer in coverage.items()}
    judged = {
        metric: {name: heads for name, heads in layers.items() if metric not in unjudged.get(name, ())}
        for metric, layers in values.items()
    }
    return {metric: layers for metric, layers in judged.items() if layers}


def _unjudged_metrics(layer: LayerCoverage) -> frozenset[str]:
    of_channels = OF_POSITIONS if layer.sees == "channels" else frozenset[str]()
    return of_channels | OF_MANY_DIMENSIONS if 0 < layer.head_dim < LEAST_HEAD_DIM else of_channels
