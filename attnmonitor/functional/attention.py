r"""The softmax side: entropy, largest logit and sink mass, from a fixed subset of attention rows.

These are the statistics that do need rows of the L×L matrix. All of them would cost as much as the attention itself, so
``num_rows`` rows, evenly spaced and always the same, stand for the rest, a few at a time: time and memory stay
linear in L. The mean over rows then carries a sampling error, and ``max_logit`` is a lower bound of the true maximum.

Letters: B sequences, Hq query heads, Lq queries, Lk keys, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, check_query_and_key, query_padding
from attnmonitor.functional.precision import full_precision

__all__ = ["attention_row_statistics", "row_logits"]

_ROWS_AT_A_TIME = 16


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
        num_rows: Rows to look at; all of them where there are no more.
        metrics: Which of the three.
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
    totals = torch.zeros((), device=device)
    largest = torch.full((), -torch.inf, device=device)
    for chunk in rows.split(_ROWS_AT_A_TIME):
        logits = logit_rows(chunk).to(torch.float32)  # (B, Hq, R, Lk)
        sees = (logits != -torch.inf).any(-1)  # NaN counts as seen: a head that is not finite stays NaN
        if query_mask is not None:
            sees = sees & query_mask[:, None, chunk]
        logits = torch.where(sees[..., None], logits, 0)
        probability = logits.softmax(-1)
        first = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        if key_mask is not None:
            first = key_mask.long().argmax(-1)
        on_first = probability.gather(-1, first[:, None, None, None].expand(*logits.shape[:-1], 1))[..., 0]
        entropy = torch.special.entr(probability).sum(-1)
        counted = torch.stack([entropy, on_first, torch.ones_like(entropy)]) * sees
        totals = totals + counted.sum(-1)
        largest = torch.maximum(largest, torch.where(sees, logits.amax(-1), -torch.inf).amax(-1))
    entropy, on_first, seen = totals
    found = {
        "attention_entropy": entropy / seen,
        "max_logit": torch.where(seen > 0, largest, torch.nan),
        "sink_mass": on_first / seen,
    }
    return {name: found[name] for name in metrics}


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

    def rows(indices: Tensor) -> Tensor:
        with full_precision(query.device):
            grouped = query[:, :, indices].float().unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
            logits: Tensor = scale * (grouped @ key.float().mT)  # (B, Hkv, G·R, Lk): keys are not repeated
            logits = logits.unflatten(2, (-1, len(indices))).flatten(1, 2)
        if mask is not None:
            logits = torch.where(mask[:, None, None], logits, -torch.inf)
        if causal:
            later = torch.arange(num_keys, device=query.device) > indices[:, None] + past
            logits = logits.masked_fill(later, -torch.inf)
        return logits

    return rows, query_mask
