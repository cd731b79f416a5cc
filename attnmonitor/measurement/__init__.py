"""One probe forward, reduced to numbers per head."""

from attnmonitor.measurement.measured import LayerValues, Measured
from attnmonitor.measurement.measurement import Measurement

__all__ = ["LayerValues", "Measured", "Measurement"]
