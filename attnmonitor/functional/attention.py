r"""Statistics of attention rows: entropy, largest logit and sink mass, from a fixed subset of the rows.

These statistics need rows of the L×L matrix. All rows would cost as much as the attention itself, so ``num_rows`` of
them, evenly spaced and always the same, are read, a few at a time: time and memory stay linear in L. The mean over rows
then carries a sampling error, and ``max_logit`` is a lower bound of the true maximum.

A statistic is a formula that gives one value per row, and how the rows are combined: `ROW_STATISTICS`.

Letters: B sequences, Hq query heads, Lq queries, Lk keys, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, check_query_and_key, query_padding
from attnmonitor.functional.precision import full_precision

__all__ = ["attention_row_statistics", "row_logits"]

_ROWS_AT_A_TIME = 16


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """Some attention rows of each head.

    Attributes:
        logits: ``(B, Hq, R, Lk)`` float32, -inf where masked; all 0 in a row that does not count.
        counts: ``(B, Hq, R)`` bool: rows that are not padding and see a key.
        first_key: Index of the first key that is not padding, ``(B,)``.
    """

    logits: Tensor
    counts: Tensor
    first_key: Tensor

    @cached_property
    def probability(self) -> Tensor:
        """Softmax of the logits, ``(B, Hq, R, Lk)``."""
        probability: Tensor = self.logits.softmax(-1)
        return probability


@dataclass(frozen=True)
class RowStatistic:
    """A statistic of attention rows.

    Attributes:
        per_row: One value per row, ``AttentionRows -> (B, Hq, R)``.
        largest: Whether a head's value is the largest over its rows; their mean otherwise.
    """

    per_row: Callable[[AttentionRows], Tensor]
    largest: bool = False

    def __call__(self, rows: AttentionRows) -> Tensor:
        """One value per row, ``(B, Hq, R)``."""
        return self.per_row(rows)


def _entropy(rows: AttentionRows) -> Tensor:
    entropy: Tensor = torch.special.entr(rows.probability).sum(-1)
    return entropy


def _largest_logit(rows: AttentionRows) -> Tensor:
    largest = rows.logits.amax(-1)
    return torch.where(largest == torch.inf, torch.nan, largest)  # queries or keys that are not finite


def _mass_on_first_key(rows: AttentionRows) -> Tensor:
    index = rows.first_key[:, None, None, None].expand(*rows.logits.shape[:-1], 1)
    return rows.probability.gather(-1, index)[..., 0]


ROW_STATISTICS = {
    "attention_entropy": RowStatistic(_entropy),
    "max_logit": RowStatistic(_largest_logit, largest=True),
    "sink_mass": RowStatistic(_mass_on_first_key),
}
"""The statistics of attention rows by the name of their metric."""


def attention_row_statistics(
    logit_rows: Callable[[Tensor], Tensor],
    num_queries: int,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    num_rows: int = 64,
    metrics: Sequence[str] = ("attention_entropy", "max_logit", "sink_mass"),
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    r"""Entropy (nats), largest logit and probability on position 0 of each head's attention rows.

    .. math:: \bar H = \frac1R \sum_i \Big(-\sum_j p_{ij} \ln p_{ij}\Big), \quad \max_{ij} z_{ij}, \quad
        \frac1R \sum_i p_{i0}, \qquad p_i = \mathrm{softmax}(z_i)

    Rows at padding and rows that see no key are left out. Position 0 is the first key that is not padding.

    Args:
        logit_rows: Row indices ``(R,)`` to the logits as they enter the softmax, ``(B, Hq, R, Lk)``, -inf where masked.
        num_queries: Lq.
        query_mask: ``(B, Lq)`` bool, True where the query is not padding; None where all are.
        key_mask: ``(B, Lk)`` bool, True where the key is not padding; None where all are.
        num_rows: How many rows to read; all of them where there are fewer.
        metrics: Names out of `ROW_STATISTICS`.
        device: Where the rows are; that of ``query_mask`` (or the CPU) by default.

    Returns:
        By name, ``(B, Hq)`` float32; NaN for a sequence with none of the rows and for a head that is not finite.

    Raises:
        ValueError: ``num_rows`` is less than 1.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows={num_rows}: must be at least 1; 64 rows are the default")
    if device is None and query_mask is not None:
        device = query_mask.device
    count = min(num_rows, num_queries)
    rows = (torch.arange(count, device=device) + 1) * num_queries // count - 1  # the last row is always one of them
    first_key = None if key_mask is None else key_mask.long().argmax(-1)
    num_counted = torch.zeros((), dtype=torch.long, device=device)
    combined: dict[str, Tensor] = {}
    for chunk in rows.split(_ROWS_AT_A_TIME):
        logits = logit_rows(chunk).to(torch.float32)  # (B, Hq, R, Lk)
        counts = (logits != -torch.inf).any(-1)  # NaN counts as seen: a head that is not finite stays NaN
        if query_mask is not None:
            counts = counts & query_mask[:, None, chunk]
        if first_key is None:
            first_key = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        block = AttentionRows(torch.where(counts[..., None], logits, 0), counts, first_key)
        num_counted = num_counted + counts.sum(-1)
        for name in metrics:
            value = _combined(ROW_STATISTICS[name], block)
            if name not in combined:
                combined[name] = value
            elif ROW_STATISTICS[name].largest:
                combined[name] = torch.maximum(combined[name], value)
            else:
                combined[name] = combined[name] + value
    return {
        name: torch.where(num_counted > 0, value, torch.nan) if ROW_STATISTICS[name].largest else value / num_counted
        for name, value in combined.items()
    }


def _combined(statistic: RowStatistic, rows: AttentionRows) -> Tensor:
    """The sum of a block's rows that count, or the largest of them, ``(B, Hq)``."""
    values = statistic(rows)
    if statistic.largest:
        return torch.where(rows.counts, values, -torch.inf).amax(-1)
    return (values * rows.counts).sum(-1)


def row_logits(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = True,
) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    """Rows of plain softmax attention's logits, for `attention_row_statistics`, and the queries' mask.

    Args:
        query: ``(B, Hq, Lq, d)``.
        key: ``(B, Hkv, Lk, d)``.
        scale: Softmax scale; ``d ** -0.5`` by default.
        mask: ``(B, Lk)`` bool, True where the position is not padding.
        query_mask: ``(B, Lq)`` bool, where the queries' padding is not the keys'.
        causal: Whether query i sees only keys up to ``i + Lk - Lq``.

    Raises:
        ValueError: The shapes do not fit.
    """
    query_mask = query_padding(query, mask, query_mask)
    check_heads("query", query, query_mask)
    check_heads("key", key, mask)
    check_query_and_key(query.shape, key.shape)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    past = num_keys - query.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)

    def rows(indices: Tensor) -> Tensor:
        with full_precision(query.device):
            grouped = query[:, :, indices].to(dtype).unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
            logits: Tensor = scale * (grouped @ key.to(dtype).mT)  # (B, Hkv, G·R, Lk): keys are not repeated
            logits = logits.unflatten(2, (-1, len(indices))).flatten(1, 2)
        if mask is not None:
            logits = torch.where(mask[:, None, None], logits, -torch.inf)
        if causal:
            later = torch.arange(num_keys, device=query.device) > indices[:, None] + past
            logits = logits.masked_fill(later, -torch.inf)
        return logits

    return rows, query_mask
