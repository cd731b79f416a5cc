"""Mean and spread over the probe's sequences, from sums that processes can add.

Letters: B sequences, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mean_of_sums", "sequence_sums", "spread_of_sums"]


def sequence_sums(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """Sum, sum of squares and count of each head's values, ``(B, H) -> (3, H)`` float64.

    Args:
        values: ``(B, H)``.
        counted: ``(B, H)`` bool: the values that count; all of them where None.
    """
    wide = values.to(torch.float64)
    if counted is None:
        return torch.stack([wide.sum(0), wide.square().sum(0), torch.full_like(wide[0], len(wide))])
    wide = torch.where(counted, wide, 0)
    return torch.stack([wide.sum(0), wide.square().sum(0), counted.sum(0, dtype=torch.float64)])


def mean_of_sums(sums: Tensor) -> Tensor:
    """Mean over sequences, ``(3, H) -> (H,)`` float32."""
    return (sums[0] / sums[2]).to(torch.float32)


def spread_of_sums(sums: Tensor) -> Tensor:
    """Population standard deviation over sequences, ``(3, H) -> (H,)`` float32; 0 for one sequence."""
    total, squares, count = sums.unbind()
    return (squares / count - (total / count).square()).clamp_min(0).sqrt().to(torch.float32)
