r"""Statistics of a few attention rows that are at hand, because verification rebuilds them in every sample.

Eight rows per sequence are too few for a mean over all queries, and enough for what these statistics ask: how large
what a head writes is, whether two heads have the same field, and how far the logits of a row spread.

A sequence may have no row that counts, for example a short one among long ones. It has no value then, and is left out
of the mean over sequences.

Letters: B sequences, Hq query heads, Lq queries, Lk keys, R rows, dv size of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnmonitor.functional.attention import row_logits
from attnmonitor.functional.checks import check_heads, query_padding
from attnmonitor.functional.precision import full_precision

__all__ = ["attention_tau", "head_similarity", "output_rms", "output_share"]

NUM_ROWS = 8
"""Rows that the functions below read, as verification does."""

_LEAST_KEYS = 8  # of fewer logits the spread says little
_NOISE = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class CheckedRows:
    """Some attention rows of all heads of a layer.

    Attributes:
        logits: s q kᵀ, before masks, biases and soft-caps, ``(B, Hq, R, Lk)``.
        seen: Keys that a row attends to, ``(B or 1, Hq or 1, R, Lk)`` bool.
        output: What the heads write in these rows, ``(B, Hq, R, n)``, before or after the output projection; None where
            that is not known.
        query_mask: ``(B, R)`` bool, True where the row is not padding; None where none is.
        key_mask: ``(B, Lk)`` bool, likewise.
    """

    logits: Tensor
    seen: Tensor
    output: Tensor | None = None
    query_mask: Tensor | None = None
    key_mask: Tensor | None = None

    @cached_property
    def valid(self) -> Tensor:
        """Rows that are not padding, ``(B, 1, R)`` bool."""
        num_sequences, _, num_rows, _ = self.logits.shape
        if self.query_mask is None:
            return torch.ones(num_sequences, 1, num_rows, dtype=torch.bool, device=self.logits.device)
        return self.query_mask[:, None]

    @cached_property
    def visible(self) -> Tensor:
        """Keys that a row attends to and that are not padding, ``(B or 1, Hq or 1, R, Lk)`` bool."""
        return self.seen if self.key_mask is None else self.seen & self.key_mask[:, None, None]

    @cached_property
    def num_visible(self) -> Tensor:
        """Number of these keys, ``(B, Hq or 1, R)``; 0 for a row of padding."""
        return self.visible.sum(-1) * self.valid

    @cached_property
    def output_energy(self) -> Tensor:
        """Mean square of the output over rows that see a key, ``(B, Hq)``; NaN if not finite."""
        assert self.output is not None
        counts = self.num_visible > 0
        output = self.output.to(torch.promote_types(self.output.dtype, torch.float32))
        energy = torch.where(counts, output.square().mean(-1), 0).sum(-1) / counts.sum(-1)
        return torch.where(energy.isfinite(), energy, torch.nan)


@dataclass(frozen=True)
class CheckedStatistic:
    """A statistic of checked rows.

    Attributes:
        formula: One value per head, ``(B, Hq)``.
        rows: The rows that it is taken over, ``(B, Hq or 1, R)`` bool.
    """

    formula: Callable[[CheckedRows], Tensor]
    rows: Callable[[CheckedRows], Tensor]

    def __call__(self, rows: CheckedRows) -> Tensor:
        """One value per head, ``(B, Hq)`` float32; NaN where a sequence has none of the rows."""
        return torch.where(self.counted(rows), self.formula(rows), torch.nan).to(torch.float32)

    def counted(self, rows: CheckedRows) -> Tensor:
        """Sequences that have a value, ``(B, Hq)`` bool."""
        return self.rows(rows).any(-1).expand(rows.logits.shape[:2])


def _that_see_a_key(rows: CheckedRows) -> Tensor:
    return rows.num_visible > 0


def _that_see_enough_keys(rows: CheckedRows) -> Tensor:
    return rows.num_visible >= _LEAST_KEYS


def _output_rms(rows: CheckedRows) -> Tensor:
    return rows.output_energy.sqrt()


def _output_share(rows: CheckedRows) -> Tensor:
    return rows.output_energy / rows.output_energy.nansum(-1, keepdim=True)


def _head_similarity(rows: CheckedRows) -> Tensor:
    field, size = _field(rows)
    with full_precision(field.device):
        unit = field / size[..., None]
        cosines = (unit @ unit.mT).abs()
    # A head is not compared with itself, and one without a field is no twin of another.
    itself = torch.eye(cosines.shape[-1], dtype=torch.bool, device=cosines.device)
    largest = cosines.masked_fill(itself | cosines.isnan(), -torch.inf).amax(-1)
    return torch.where(largest >= 0, largest.clamp_max(1), torch.nan)


def _field(rows: CheckedRows) -> tuple[Tensor, Tensor]:
    """The energy field in the valid rows, ``(B, Hq, R·Lk)``, and its size, ``(B, Hq)``; NaN for a zero field."""
    logits = torch.where(rows.valid[..., None], rows.logits, 0)
    if rows.key_mask is None:
        field = logits - logits.mean(-1, keepdim=True)
    else:
        is_key = rows.key_mask[:, None, None]
        logits = torch.where(is_key, logits, 0)
        field = torch.where(is_key, logits - logits.sum(-1, keepdim=True) / is_key.sum(-1, keepdim=True), 0)
    size, total = (torch.linalg.vector_norm(each, dim=(-2, -1)) for each in (field, logits))
    # Equal keys give equal logits up to rounding.
    is_zero = size <= _NOISE * total
    return field.flatten(2), size.masked_fill(is_zero, torch.nan)


def _attention_tau(rows: CheckedRows) -> Tensor:
    counts = _that_see_enough_keys(rows)
    number = rows.num_visible.clamp_min(_LEAST_KEYS).to(rows.logits.dtype)
    mean = torch.where(rows.visible, rows.logits, 0).sum(-1) / number
    deviations = torch.where(rows.visible, rows.logits - mean[..., None], 0)
    spread = torch.linalg.vector_norm(deviations, dim=-1) / number.sqrt()
    return torch.where(counts, spread / (2 * number.log()).sqrt(), 0).sum(-1) / counts.sum(-1)


CHECKED_STATISTICS = {
    "output_rms": CheckedStatistic(_output_rms, _that_see_a_key),
    "output_share": CheckedStatistic(_output_share, _that_see_a_key),
    "head_similarity": CheckedStatistic(_head_similarity, lambda rows: rows.valid),
    "attention_tau": CheckedStatistic(_attention_tau, _that_see_enough_keys),
}
"""The statistics of checked rows by the name of their metric."""


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
    seen = torch.ones(1, 1, count, num_keys, dtype=torch.bool, device=query.device)
    if causal:
        seen = seen & (torch.arange(num_keys, device=query.device) <= rows[:, None] + num_keys - num_queries)
    if mask is not None:
        seen = seen & mask[:, None, None]
    output = None if value is None else _written(torch.where(seen, product, -torch.inf), key, value, mask)
    return CheckedRows(product, seen, output, None if query_mask is None else query_mask[:, rows], mask)


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
        ``(B, Hq)`` float32; NaN for a sequence with none of the rows and for a head that is not finite.

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
        ``(B, Hq)`` float32; NaN where `output_rms` is, and where no head writes anything.

    Raises:
        ValueError: The shapes do not fit, or ``num_rows`` is less than 1.
    """
    rows = projected_rows(
        query, key, value, projection, scale=scale, mask=mask, query_mask=query_mask, causal=causal, num_rows=num_rows
    )
    return CHECKED_STATISTICS["output_share"](rows)


def projected_rows(query: Tensor, key: Tensor, value: Tensor, projection: Tensor, **settings: Any) -> CheckedRows:
    """Compute rows as `checked_rows` does, with the output of each head after the output projection."""
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
        return replace(rows, output=torch.einsum("bhrc,nhc->bhrn", rows.output, by_head))


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
        ``(B, Hq)`` float32; NaN for a zero field, for a head that is not finite, and where no other head has a field.

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
        ``(B, Hq)`` float32; NaN for a sequence without a row that sees 8 keys and for a head that is not finite.

    Raises:
        ValueError: The shapes do not fit, or ``num_rows`` is less than 1.
    """
    rows = checked_rows(query, key, scale=scale, mask=mask, query_mask=query_mask, causal=causal, num_rows=num_rows)
    return CHECKED_STATISTICS["attention_tau"](rows)
