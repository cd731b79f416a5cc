"""Statistics of the values alone: how large what the heads can write is, and whether it depends on the position.

Letters: B sequences, Hkv key/value heads, L positions, dv size of a value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, num_positions

__all__ = ["value_rms", "value_spread"]


@dataclass(frozen=True, eq=False)
class Values:
    """The values of one layer.

    Attributes:
        value: ``(B, Hv, L, dv)``.
        mask: ``(B, L)`` bool, True where the position is not padding; None where all are.
        num_kv_heads: Hkv; Hv is a multiple of it, or divides it.
        tiled: Whether values h, h + Hkv, … belong to key head h, and not Hv / Hkv values side by side.
    """

    value: Tensor
    mask: Tensor | None
    num_kv_heads: int
    tiled: bool = False


def value_rms_of(values: Values) -> Tensor:
    """Root mean square entry of the values of each key head, ``(B, Hkv)``."""
    return _per_key_head(values, value_rms(values.value, mask=values.mask).square()).sqrt()


def value_spread_of(values: Values) -> Tensor:
    """Share of the values' energy that differs between positions, for each key head, ``(B, Hkv)``."""
    return _per_key_head(values, value_spread(values.value, mask=values.mask))


def _per_key_head(values: Values, per_value_head: Tensor) -> Tensor:
    """The mean over the values of each key head, ``(B, Hv) -> (B, Hkv)``."""
    ratio = per_value_head.shape[1] // values.num_kv_heads
    if ratio == 0:
        return per_value_head.repeat_interleave(values.num_kv_heads // per_value_head.shape[1], 1)
    groups = per_value_head.unflatten(1, (ratio, -1)).mT if values.tiled else per_value_head.unflatten(1, (-1, ratio))
    per_key_head: Tensor = groups.mean(-1)
    return per_key_head


def value_rms(value: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Root mean square entry of the values, in their own unit.

    Args:
        value: ``(B, Hkv, L, dv)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hkv)`` float32; NaN for a head that is not finite.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_heads("value", value, mask)
    mean_square = _energy(value, mask) / (num_positions(value, mask) * value.shape[-1])
    return torch.where(mean_square.isfinite(), mean_square, torch.nan).sqrt().to(torch.float32)


def value_spread(value: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Share of the values' energy that differs between positions: ``Σ‖v - v̄‖² / Σ‖v‖²``, with the mean value v̄.

    Near 0 every position has the same value, so attention writes the same whatever it attends to. Where deep layers
    without skip connections make all tokens one vector, this falls to 0 with depth, also under rotary positions.

    Args:
        value: ``(B, Hkv, L, dv)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hkv)`` float32 in [0, 1]; NaN for a head whose values are zero or not finite.

    Raises:
        ValueError: The shapes do not fit.

    Source:
        Dong et al., "Attention is not all you need", 2021: the distance from rank one, relative.
    """
    check_heads("value", value, mask)
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    kept = wide if mask is None else torch.where(mask[:, None, :, None], wide, 0)
    mean = kept.sum(2, keepdim=True) / num_positions(value, mask)[..., None, None]
    share = _energy(wide - mean, mask) / _energy(wide, mask)
    return torch.where(share.isfinite(), share, torch.nan).clamp(0, 1).to(torch.float32)


def _energy(value: Tensor, mask: Tensor | None) -> Tensor:
    """The sum of squares over valid positions, ``(B, H, L, dv) -> (B, H)``."""
    # A norm per position first: one long sum in float32 would lose digits, and a float64 copy of the values costs more.
    dtype = torch.promote_types(value.dtype, torch.float32)
    energy = torch.linalg.vector_norm(value, dim=-1, dtype=dtype).square()
    return (energy if mask is None else torch.where(mask[:, None], energy, 0)).sum(-1)
