"""How a rule reads a metric: as it is, or as a logarithm, where a factor is one step."""

from __future__ import annotations

from torch import Tensor

from attnmonitor.alerts.rules import Reading

__all__ = ["FORMULA", "SMALLEST", "apply_reading", "invert_reading"]

SMALLEST = 1e-7
"""Smallest argument of a logarithm: the resolution of float32 near 1, and far below any live head."""

FORMULA: dict[Reading, str] = {
    "identity": "{}",
    "log": "ln {}",
    "log_slack": "ln(1 - {})",
    "log_excess": "ln({} - 1)",
}
"""Each reading in words, to be filled with the metric's name."""


def apply_reading(reading: Reading, metric: Tensor) -> Tensor:
    """Return x, the metric under a reading."""
    if reading == "log":
        return metric.clamp(min=SMALLEST).log()
    if reading == "log_slack":
        return (1 - metric).clamp(min=SMALLEST).log()
    if reading == "log_excess":
        return (metric - 1).clamp(min=SMALLEST).log()
    return metric


def invert_reading(reading: Reading, x: Tensor) -> Tensor:
    """Return the metric whose reading is x."""
    if reading == "log":
        return x.exp()
    if reading == "log_slack":
        return 1 - x.exp()
    if reading == "log_excess":
        return 1 + x.exp()
    return x
