"""Which layers' numbers may be shown: those whose captured tensors reproduce the layer's own output.

Those of all others are NaN, with the reason in their coverage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnmonitor.capture.comparison import deviation_where_finite
from attnmonitor.measurement.collected import Key
from attnmonitor.measurement.measured import LayerValues, Measured
from attnmonitor.measurement.reduction import ReducedLayer, Reduction
from attnmonitor.measurement.shares import Share
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.sample import LayerCoverage

__all__ = ["head_counts", "judged", "mismatch", "nothing_measured"]

# Allowed deviation of attention rebuilt in float32 from the layer's own output, by the type of the layer's tensors.
# Rounding alone stays an order of magnitude below; a wrong scale or mask lies orders of magnitude above.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def judged(
    forward: Reduction,
    on_host: Mapping[Key, Tensor],
    expected: Mapping[str, LayerCoverage],
    metrics: Sequence[str],
    share: Share,
) -> Measured:
    """Return what may be shown of the numbers that have arrived.

    Args:
        forward: The forward that they are of.
        on_host: The numbers.
        expected: How each layer was measured at attach.
        metrics: Names of the metrics, in table order.
        share: The layers that this process finishes.
    """
    coverage = {
        name: _judged_layer(
            expected.get(name, LayerCoverage(name, reason="it was not there at attach: attach again")),
            forward.layers.get(name),
            forward.failures.get(name, ""),
            on_host,
        )
        for name in dict.fromkeys([*expected, *forward.layers])
        if share.takes(name)
    }
    shown = [name for name, layer in coverage.items() if layer.measured]
    shares = {
        which: [float(on_host[which, name].mean()) for name in shown if (which, name) in on_host]
        for which in ("certified", "decided")
    }
    residuals = [float(on_host["residual", name].amax()) for name in shown if ("residual", name) in on_host]
    return Measured(
        values=_table("mean", on_host, shown, expected, metrics),
        spread=_table("spread", on_host, shown, expected, metrics),
        coverage=coverage,
        diagnostics={
            **{f"{which}_fraction": sum(each) / len(each) if each else math.nan for which, each in shares.items()},
            "invariant_residual": max(residuals, default=math.nan),
        },
    )


def nothing_measured(expected: Mapping[str, LayerCoverage], metrics: Sequence[str], reason: str) -> Measured:
    """Return the result of a measurement that failed as a whole: NaN for every head."""
    unknown = _table("mean", {}, (), expected, metrics)
    coverage = {name: replace(layer, reason=reason) for name, layer in expected.items()}
    diagnostics = dict.fromkeys(("certified_fraction", "decided_fraction", "invariant_residual"), math.nan)
    return Measured(unknown, unknown, coverage, diagnostics)


def head_counts(layers: Mapping[str, LayerCoverage]) -> dict[str, dict[str, int]]:
    """Return the heads per scope of every layer that has heads."""
    return {
        name: {"query_head": layer.num_query_heads, "kv_head": layer.num_kv_heads}
        for name, layer in layers.items()
        if layer.num_query_heads
    }


def _table(
    which: str,
    on_host: Mapping[Key, Tensor],
    shown: Sequence[str],
    expected: Mapping[str, LayerCoverage],
    metrics: Sequence[str],
) -> LayerValues:
    """Return the numbers by metric and layer; NaN for layers that may not be shown."""
    counts = head_counts(expected)
    return {
        metric: {
            name: on_host[which, metric, name]
            if name in shown
            else torch.full((heads[METRICS[metric].scope],), torch.nan)
            for name, heads in counts.items()
        }
        for metric in metrics
    }


def _judged_layer(
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
