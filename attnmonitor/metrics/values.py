"""Metrics of the values, one value per key/value head."""

from __future__ import annotations

from torch import Tensor

from attnmonitor.functional.values import value_rms, value_spread
from attnmonitor.metrics.base import HeadMetric

__all__ = ["ValueRMS", "ValueSpread"]


class ValueRMS(HeadMetric):
    """Root mean square entry of the values."""

    name = "value_rms"

    def update(self, value: Tensor, mask: Tensor | None = None) -> None:
        """Add the heads of one layer: value ``(B, Hkv, L, dv)``, mask ``(B, L)`` True where valid."""
        self.accumulate(value_rms(value, mask=mask))


class ValueSpread(HeadMetric):
    """Share of the values' energy that differs between positions."""

    name = "value_spread"

    def update(self, value: Tensor, mask: Tensor | None = None) -> None:
        """Add the heads of one layer: value ``(B, Hkv, L, dv)``, mask ``(B, L)`` True where valid."""
        self.accumulate(value_spread(value, mask=mask))
