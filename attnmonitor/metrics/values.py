"""Metrics of the values, one value per key/value head."""

from __future__ import annotations

from torch import Tensor

from attnmonitor.functional.values import value_rms
from attnmonitor.metrics.base import HeadMetric

__all__ = ["ValueRMS"]


class ValueRMS(HeadMetric):
    """Root mean square entry of the values."""

    name = "value_rms"

    def update(self, value: Tensor, mask: Tensor | None = None) -> None:
        """Add the heads of one layer: value ``(B, Hkv, L, dv)``, mask ``(B, L)`` True where valid."""
        self.accumulate(value_rms(value, mask=mask))
