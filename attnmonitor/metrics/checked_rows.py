"""Metrics of the attention rows that verification rebuilds, one value per query head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnmonitor.functional.checked_rows import NUM_ROWS, checked_rows, projected_rows
from attnmonitor.functional.row_statistics import CHECKED_STATISTICS, CheckedRows
from attnmonitor.metrics.base import HeadMetric

__all__ = ["AttentionTau", "HeadSimilarity", "OutputRMS", "OutputShare"]


class _CheckedMetric(HeadMetric):
    """A statistic of a few rows.

    Args:
        num_heads: Query heads.
        scale: Softmax scale; ``d ** -0.5`` by default.
        num_rows: How many rows to read.
        kwargs: Passed on to `torchmetrics.Metric`.
    """

    def __init__(self, num_heads: int, *, scale: float | None = None, num_rows: int = NUM_ROWS, **kwargs: Any) -> None:
        super().__init__(num_heads, setting=(scale, num_rows), **kwargs)
        self.scale, self.num_rows = scale, num_rows

    def _add(self, rows: CheckedRows) -> None:
        statistic = CHECKED_STATISTICS[self.name]
        self.accumulate(statistic(rows), statistic.counted(rows))


class _FieldMetric(_CheckedMetric):
    def update(self, query: Tensor, key: Tensor, mask: Tensor | None = None, causal: bool = True) -> None:
        """Add the heads of one layer: ``(B, Hq, L, d)``, ``(B, Hkv, L, d)``, mask ``(B, L)`` True where valid."""
        self._add(checked_rows(query, key, scale=self.scale, mask=mask, causal=causal, num_rows=self.num_rows))


class OutputRMS(_CheckedMetric):
    """Root mean square entry of what each head writes, before the output projection."""

    name = "output_rms"

    def update(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = True
    ) -> None:
        """Add the heads of one layer: as for the logits, and value ``(B, Hkv, L, dv)``."""
        self._add(checked_rows(query, key, value, scale=self.scale, mask=mask, causal=causal, num_rows=self.num_rows))


class OutputShare(_CheckedMetric):
    """Share of each head in what the heads of its layer write through the output projection."""

    name = "output_share"

    def update(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        projection: Tensor,
        mask: Tensor | None = None,
        causal: bool = True,
    ) -> None:
        """Add the heads of one layer: as for `OutputRMS`, and projection ``(D, Hq * dv)``, a linear layer's weight."""
        settings = {"scale": self.scale, "mask": mask, "causal": causal, "num_rows": self.num_rows}
        self._add(projected_rows(query, key, value, projection, **settings))


class HeadSimilarity(_FieldMetric):
    """Largest cosine of each head's energy field with that of another head of its layer."""

    name = "head_similarity"


class AttentionTau(_FieldMetric):
    """Spread of the logits that a row sees, over the point where softmax condenses on few keys."""

    name = "attention_tau"
