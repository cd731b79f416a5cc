"""Which layers' numbers may be shown: those whose captured tensors reproduce the layer's own output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attnmonitor.capture.comparison import deviation_where_finite
from attnmonitor.measurement.collected import Key
from attnmonitor.measurement.reduction import ReducedLayer
from attnmonitor.sample import LayerCoverage

__all__ = ["judged_layer", "mismatch"]

# Allowed deviation of attention rebuilt in float32 from the layer's own output, by the type of the layer's tensors.
# Rounding alone stays an order of magnitude below; a wrong scale or mask lies orders of magnitude above.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def judged_layer(
    expected: LayerCoverage, layer: ReducedLayer | None, failure: str, on_host: Mapping[Key, Tensor]
) -> LayerCoverage:
    """Return how a layer was measured, or why its numbers may not be shown.

    Args:
        expected: How it was measured at attach.
        layer: What is known of it now; None where its attention was not reduced.
        failure: Why not; ``""`` where it did not run.
        on_host: The numbers that have arrived.
    """
    name = expected.layer
    if layer is None:
        return replace(expected, reason=failure or expected.reason or "its attention did not run this time")
    found = replace(
        layer.coverage,
        values_reason=layer.why_unknown(on_host.get(("mean", "output_share", name))),
        weights_reason=expected.weights_reason,
        weights_note=expected.weights_note,
    )
    if expected.heads != found.heads:
        was = f"was {expected.heads} at attach" if any(expected.heads) else "was not there at attach"
        return replace(expected, reason=f"(query heads, KV heads, head size) {was}, is {found.heads}: attach again")
    if ("bias", name) in on_host and bool(on_host["bias", name]):
        found = replace(found, outside=tuple(sorted({*found.outside, "bias"})))
    if float(on_host["keys", name].amax()) < 2:
        return replace(found, reason="its queries see a single key, so there is nothing to choose from")
    if not layer.comparisons:
        return found
    error = float(on_host["error", name])
    if math.isnan(error):
        error = deviation_where_finite(layer.comparisons)
    return replace(found, error=error, reason=mismatch(error, layer.precision))


def mismatch(error: float, precision: torch.dtype) -> str:
    """Return why a layer's numbers may not be shown, ``""`` where its rebuilt output is its own."""
    tolerance = _TOLERANCE.get(precision, 0.0)
    if error <= tolerance:
        return ""
    return (
        f"attention rebuilt from what was captured differs from the layer's output by {error:.1e} "
        f"(tolerance {tolerance:.0e})"
    )
