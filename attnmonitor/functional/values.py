"""Statistics of the values alone: how large what the heads can write is.

Letters: B sequences, Hkv key/value heads, L positions, dv size of a value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, num_positions

__all__ = ["value_rms"]


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
    rms = value_rms(values.value, mask=values.mask)
    ratio = rms.shape[1] // values.num_kv_heads
    if ratio == 0:
        return rms.repeat_interleave(values.num_kv_heads // rms.shape[1], 1)
    groups = rms.unflatten(1, (ratio, -1)).mT if values.tiled else rms.unflatten(1, (-1, ratio))
    per_key_head: Tensor = groups.square().mean(-1).sqrt()
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
    # A norm per position first: one long sum in float32 would lose digits, and a float64 copy of the values costs more.
    dtype = torch.promote_types(value.dtype, torch.float32)
    energy = torch.linalg.vector_norm(value, dim=-1, dtype=dtype).square()
    if mask is not None:
        energy = torch.where(mask[:, None], energy, 0)
    mean_square = energy.sum(-1) / (num_positions(value, mask) * value.shape[-1]).to(dtype)
    return torch.where(mean_square.isfinite(), mean_square, torch.nan).sqrt().to(torch.float32)
