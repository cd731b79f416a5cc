"""One probe forward, reduced to numbers per head."""

from attnmonitor.measurement.measurement import LayerValues, Measured, Measurement

__all__ = ["LayerValues", "Measured", "Measurement"]
