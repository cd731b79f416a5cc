"""The numbers that thresholds are put on: value, baseline, distance to the peers, change, offset, contrast, robust z.

The contrast is what makes alerts usable. Warm-up, the learning rate and the data move all heads alike, so a head's
change minus the *median change over all heads* cancels them, while a change of one head does not cancel. The price is
that a fault of the whole run cancels as well; rules about the run look at values and at shares of heads instead.

N is the number of heads (`attnmonitor.alerts.heads`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnmonitor.alerts.past import MetricPast, Reference
from attnmonitor.alerts.readings import apply_reading
from attnmonitor.alerts.rules import Threshold

__all__ = ["evaluate"]

SPREAD_FLOOR = 0.1
"""Added to the robust spread of the contrast: heads that agree closely must not turn a 10 % change into an outlier."""

SHIFT_SHARE = 1 / 3
"""Share of the peers' shift that is added to the spread: heads learn at different speeds, so while all of them move
far, a head that moves half as fast again as the others is no outlier."""


def evaluate(
    threshold: Threshold,
    past: MetricPast,
    *,
    frozen: Reference,
    is_frozen: Tensor,  # (N,) bool
    least_heads: int,
) -> tuple[Tensor, Reference]:
    """Return the threshold's signal of every head in the present sample, and what it was compared with.

    Args:
        threshold: The signal to compute.
        past: Samples of its metric, the present one last.
        frozen: Reference of the sample before.
        is_frozen: (N,) bool: heads with a pending or firing alarm, which keep ``frozen``.
        least_heads: Heads needed for a comparison among heads; with fewer, contrast and offset are the change.

    Returns:
        (N,) signal, NaN where unknown, and the `Reference` used.
    """
    now = past.rows[-1]
    if threshold.signal == "non_finite":
        return torch.where(past.is_measured, now.isnan().float(), torch.nan), frozen
    x = apply_reading(threshold.reading, now)
    if threshold.signal in ("value", "peers"):
        return x, frozen
    fresh = past.reference(threshold, least_heads)
    keeps = is_frozen | fresh.base.isnan()
    reference = Reference(torch.where(keeps, frozen.base, fresh.base), torch.where(keeps, frozen.peers, fresh.peers))
    if threshold.signal == "baseline":
        return reference.base, reference
    change = x - reference.base
    if threshold.signal == "change":
        return change, reference
    if threshold.signal == "offset":
        can_compare = int(x.isfinite().sum()) >= least_heads
        return x - x.nanmedian() if can_compare else change, reference
    shift = (x.nanmedian() - reference.peers).nan_to_num(nan=0.0)
    contrast = change - shift
    if threshold.signal == "contrast":
        return contrast, reference
    # Where there are too few heads to compare with, their spread is unknown too: the floor alone is used.
    spread = 1.4826 * (contrast - contrast.nanmedian()).abs().nanmedian()
    spread = torch.where(reference.peers.isnan(), 0.0, spread) + SHIFT_SHARE * shift.abs()
    return contrast / (spread + SPREAD_FLOOR), reference
