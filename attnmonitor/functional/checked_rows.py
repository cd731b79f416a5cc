"""Statistics of a few attention rows (`row_statistics`), from queries, keys and values.

Letters: B sequences, Hq query heads, Lq queries, Lk keys, R rows, dv size of a value.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnmonitor.functional.attention import row_logits
from attnmonitor.functional.checks import check_heads, query_padding
from attnmonitor.functional.precision import full_precision, norms_of
from attnmonitor.functional.row_statistics import CHECKED_STATISTICS, CheckedRows

__all__ = ["attention_tau", "head_similarity", "output_rms", "output_share"]

NUM_ROWS = 8
"""Rows that the functions below read, as verification does."""


def checked_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = True,
    num_rows: int = NUM_ROWS,
) -> CheckedRows:
    """Compute rows of plain softmax attention, evenly spaced.

    Args:
        query: ``(B, Hq, Lq, d)``.
        key: ``(B, Hkv, Lk, d)``.
        value: ``(B, Hkv, Lk, dv)``; None where no output is needed.
        scale: Softmax scale; ``d ** -0.5`` by default.
        mask: ``(B, Lk)`` bool, True where the position is not padding.
        query_mask: ``(B, Lq)`` bool, where the queries' padding is not the keys'.
        causal: Whether query i sees only keys up to ``i + Lk - Lq``.
        num_rows: How many rows; all of them where there are fewer.

    Raises:
        ValueError: The shapes do not fit, or ``num_rows`` is less than 1.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows={num_rows}: must be at least 1; {NUM_ROWS} rows are the default")
    logits, query_mask = row_logits(
        query, key, scale=scale, query_mask=query_padding(query, mask, query_mask), causal=False
    )
    num_queries, num_keys = query.shape[2], key.shape[2]
    count = min(num_rows, num_queries)
    rows = (torch.arange(count, device=query.device) + 1) * num_queries // count - 1
    product = logits(rows)
    hidden = torch.zeros(product.shape, dtype=torch.bool, device=query.device)
    if causal:
        hidden = hidden | (torch.arange(num_keys, device=query.device) > rows[:, None] + num_keys - num_queries)
    if mask is not None:
        hidden = hidden | mask.logical_not()[:, None, None]
    output = None if value is None else _written(torch.where(hidden, -torch.inf, product), key, value, mask)
    return CheckedRows(product, hidden, output, None, None if query_mask is None else query_mask[:, rows], mask)


def _written(logits: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of the logits times the values, ``(B, Hq, R, dv)``."""
    check_heads("value", value, mask)
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value {tuple(value.shape)} and key {tuple(key.shape)}: expected the same sequences, heads and positions"
        )
    value = value if mask is None else torch.where(mask[:, None, :, None], value, 0)
    with full_precision(logits.device):
        grouped = logits.softmax(-1).unflatten(1, (value.shape[1], -1)).flatten(2, 3)
        written: Tensor = (grouped @ value.to(grouped.dtype)).unflatten(2, (-1, logits.shape[2])).flatten(1, 2)
    return written


def output_rms(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = True,
    num_rows: int = NUM_ROWS,
) -> Tensor:
    r"""Root mean square entry of what each head writes, before the output projection.

    .. math:: \sqrt{\operatorname{mean}_{i,c}\, o_{ic}^2}, \qquad o = \mathrm{softmax}(z)\,v

    Args:
        query: ``(B, Hq, Lq, d)``.
        key: ``(B, Hkv, Lk, d)``.
        value: ``(B, Hkv, Lk, dv)``.
        scale: Softmax scale; ``d ** -0.5`` by default.
        mask: ``(B, Lk)`` bool, True where the position is not padding.
        query_mask: ``(B, Lq)`` bool, where the queries' padding is not the keys'.
        causal: Whether query i sees only keys up to ``i + Lk - Lq``.
        num_rows: How many rows to read, evenly spaced.

    Returns:
        ``(B, Hq)`` float64; NaN for a sequence with none of the rows and for a head that is not finite.

    Raises:
        ValueError: The shapes do not fit, or ``num_rows`` is less than 1.
    """
    rows = checked_rows(
        query, key, value, scale=scale, mask=mask, query_mask=query_mask, causal=causal, num_rows=num_rows
    )
    return CHECKED_STATISTICS["output_rms"](rows)


def output_share(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = True,
    num_rows: int = NUM_ROWS,
) -> Tensor:
    r"""Share of each head in what the heads of its layer write through the output projection.

    .. math:: \frac{\operatorname{mean}_i \|W_h o_{ih}\|^2}{\sum_g \operatorname{mean}_i \|W_g o_{ig}\|^2}

    with the columns W_h of the output projection that the output o of head h goes through.

    Args:
        query: ``(B, Hq, Lq, d)``.
        key: ``(B, Hkv, Lk, d)``.
        value: ``(B, Hkv, Lk, dv)``.
        projection: ``(D, Hq * dv)``, as the weight of a linear layer.
        scale: Softmax scale; ``d ** -0.5`` by default.
        mask: ``(B, Lk)`` bool, True where the position is not padding.
        query_mask: ``(B, Lq)`` bool, where the queries' padding is not the keys'.
        causal: Whether query i sees only keys up to ``i + Lk - Lq``.
        num_rows: How many rows to read, evenly spaced.

    Returns:
        ``(B, Hq)`` float64; 0 where no head writes anything, NaN where `output_rms` is.

    Raises:
        ValueError: The shapes do not fit, or ``num_rows`` is less than 1.
    """
    rows = projected_rows(
        query, key, value, projection, scale=scale, mask=mask, query_mask=query_mask, causal=causal, num_rows=num_rows
    )
    return CHECKED_STATISTICS["output_share"](rows)


def projected_rows(query: Tensor, key: Tensor, value: Tensor, projection: Tensor, **settings: Any) -> CheckedRows:
    """Compute rows as `checked_rows` does, with what each head writes through the output projection.

    Raises:
        ValueError: ``projection`` is not ``(D, Hq · dv)``, or as `checked_rows`.
    """
    rows = checked_rows(query, key, value, **settings)
    assert rows.output is not None
    _, num_heads, _, head_dim = rows.output.shape
    if projection.dim() != 2 or projection.shape[1] != num_heads * head_dim:
        raise ValueError(
            f"projection {tuple(projection.shape)}: expected (D, {num_heads * head_dim}), the weight of a linear layer "
            f"on {num_heads} heads of size {head_dim}"
        )
    with full_precision(rows.output.device):
        by_head = projection.to(rows.output.dtype).unflatten(1, (num_heads, head_dim))
        return replace(rows, written=norms_of(torch.einsum("bhrc,nhc->bhrn", rows.output, by_head)))


def head_similarity(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    num_rows: int = NUM_ROWS,
) -> Tensor:
    r"""Largest cosine of each head's energy field with that of another head of its layer.

    .. math:: \max_{g \ne h} \frac{|\langle \tilde E_h, \tilde E_g\rangle_F|}{\|\tilde E_h\|_F\, \|\tilde E_g\|_F}

    1 is a twin: a head whose softmax ranks the keys exactly as another one's. Rotating a head's basis changes nothing.

    Args:
        query: ``(B, Hq, Lq, d)``.
        key: ``(B, Hkv, Lk, d)``.
        mask: ``(B, Lk)`` bool, True where the position is not padding.
        query_mask: ``(B, Lq)`` bool, where the queries' padding is not the keys'.
        num_rows: How many rows to read, evenly spaced.

    Returns:
        ``(B, Hq)`` float64; NaN for a zero field, for a head that is not finite, and where no other head has a field.

    Raises:
        ValueError: The shapes do not fit, or ``num_rows`` is less than 1.
    """
    rows = checked_rows(query, key, mask=mask, query_mask=query_mask, causal=False, num_rows=num_rows)
    return CHECKED_STATISTICS["head_similarity"](rows)


def attention_tau(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = True,
    num_rows: int = NUM_ROWS,
) -> Tensor:
    r"""Spread of the logits that a row sees, relative to the point where softmax condenses on few keys.

    .. math:: \operatorname{mean}_i\; \operatorname{std}_j(E_{ij}) \,/\, \sqrt{2 \ln n_i}

    over the rows i that see n ≥ 8 keys, and the keys j that they see. For independent Gaussian logits 1 is the
    condensation point of the random energy model: beyond it a few keys hold the probability, however large n is.

    Args:
        query: ``(B, Hq, Lq, d)``.
        key: ``(B, Hkv, Lk, d)``.
        scale: Softmax scale; ``d ** -0.5`` by default.
        mask: ``(B, Lk)`` bool, True where the position is not padding.
        query_mask: ``(B, Lq)`` bool, where the queries' padding is not the keys'.
        causal: Whether query i sees only keys up to ``i + Lk - Lq``.
        num_rows: How many rows to read, evenly spaced.

    Returns:
        ``(B, Hq)`` float64; NaN for a sequence without a row that sees 8 keys and for a head that is not finite.

    Raises:
        ValueError: The shapes do not fit, or ``num_rows`` is less than 1.
    """
    rows = checked_rows(query, key, scale=scale, mask=mask, query_mask=query_mask, causal=causal, num_rows=num_rows)
    return CHECKED_STATISTICS["attention_tau"](rows)
