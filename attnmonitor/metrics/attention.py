"""Metrics of attention rows, one value per query head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnmonitor.functional.attention import attention_row_statistics, row_logits
from attnmonitor.metrics.base import HeadMetric

__all__ = ["AttentionEntropy", "MaxLogit", "SinkMass"]


class _RowMetric(HeadMetric):
    """A statistic of attention rows.

    Args:
        num_heads: Query heads.
        scale: Softmax scale; ``d ** -0.5`` by default.
        num_rows: How many rows to read.
        kwargs: Passed on to `torchmetrics.Metric`.
    """

    def __init__(self, num_heads: int, *, scale: float | None = None, num_rows: int = 64, **kwargs: Any) -> None:
        super().__init__(num_heads, setting=(scale, num_rows), **kwargs)
        self.scale, self.num_rows = scale, num_rows

    def update(self, query: Tensor, key: Tensor, mask: Tensor | None = None, causal: bool = True) -> None:
        """Add the heads of one layer: ``(B, Hq, L, d)``, ``(B, Hkv, L, d)``, mask ``(B, L)`` True where valid."""
        rows, query_mask = row_logits(query, key, scale=self.scale, mask=mask, causal=causal)
        found = attention_row_statistics(
            rows,
            query.shape[2],
            query_mask=query_mask,
            key_mask=mask,
            num_rows=self.num_rows,
            metrics=[self.name],
            device=query.device,
        )
        self.accumulate(found[self.name])


class AttentionEntropy(_RowMetric):
    """Mean entropy of the attention rows, in nats."""

    name = "attention_entropy"


class MaxLogit(_RowMetric):
    """Largest logit that enters the softmax, over the rows that are read; mean over sequences."""

    name = "max_logit"


class SinkMass(_RowMetric):
    """Mean attention probability on position 0."""

    name = "sink_mass"
