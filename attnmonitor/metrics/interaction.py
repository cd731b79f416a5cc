"""Metrics of the learned projections, one value per query head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnmonitor.functional.interaction import interaction_effective_rank, interaction_participation_ratio
from attnmonitor.functional.ranks import check_fraction
from attnmonitor.metrics.base import HeadMetric

__all__ = ["InteractionEffectiveRank", "InteractionParticipationRatio"]


class InteractionEffectiveRank(HeadMetric):
    """Fewest components that hold ``fraction`` of the variance of W_Qᵀ W_K.

    Args:
        num_heads: Query heads.
        fraction: In (0, 1].
        kwargs: Passed on to `torchmetrics.Metric`.

    Raises:
        ValueError: ``num_heads`` is less than 1, or ``fraction`` is not in (0, 1].
    """

    name = "interaction_effective_rank"

    def __init__(self, num_heads: int, *, fraction: float = 0.9, **kwargs: Any) -> None:
        check_fraction("fraction", fraction)
        super().__init__(num_heads, setting=(fraction,), **kwargs)
        self.fraction = fraction

    def update(self, w_q: Tensor, w_k: Tensor) -> None:
        """Add the heads of one layer: ``(H, d, D)`` each."""
        self.accumulate(interaction_effective_rank(w_q, w_k, fraction=self.fraction)[None])


class InteractionParticipationRatio(HeadMetric):
    """Smooth effective rank of W_Qᵀ W_K."""

    name = "interaction_participation_ratio"

    def update(self, w_q: Tensor, w_k: Tensor) -> None:
        """Add the heads of one layer: ``(H, d, D)`` each."""
        self.accumulate(interaction_participation_ratio(w_q, w_k)[None])
