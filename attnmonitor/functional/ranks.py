"""The two ranks of a spectrum: how many components hold a share of its variance, and its participation ratio."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "TIE",
    "check_fraction",
    "count_to_fraction",
    "effective_rank",
    "is_finite",
    "is_unknown",
    "nan_unless_finite",
    "participation_from_moments",
    "participation_ratio",
    "spread_over_positions",
]

TIE = 1e-12
"""Relative distance at which a running sum counts as reaching the mark: ten equal components at 90 % give exactly 9."""


def is_finite(x: Tensor) -> Tensor:
    """Whether entries are neither NaN nor infinite, bool; in half the launches of `torch.isfinite`."""
    return x.abs() < torch.inf


def is_unknown(x: Tensor) -> Tensor:
    """Whether entries are NaN or infinite, bool."""
    return x - x != 0


def nan_unless_finite(x: Tensor) -> Tensor:
    """The entries, NaN where they are infinite; in fewer launches than a mask takes."""
    return x + (x - x)


def check_fraction(argument: str, fraction: float) -> None:
    """Raise unless ``0 < fraction <= 1``."""
    if not 0 < fraction <= 1:
        raise ValueError(f"{argument}={fraction!r}: must be in (0, 1], the share of the variance to hold, such as 0.9")


def count_to_fraction(sums: Tensor, total: Tensor, fraction: float) -> Tensor:
    r"""First count at which a running sum reaches a fraction of the total.

    .. math:: \min\{r : v_1 + \dots + v_r \ge f\,T\}

    Args:
        sums: Running sums of a descending spectrum, ``(..., n)``.
        total: T, ``(...)``.
        fraction: f in (0, 1].

    Returns:
        ``(...)`` int64 in [1, n + 1], n + 1 where none reaches it; 1 where T is 0 or NaN.
    """
    short = sums < (fraction * (1 - TIE)) * total[..., None]
    return short.cumprod(-1).sum(-1) + 1


def effective_rank(variances: Tensor, fraction: float) -> Tensor:
    """Fewest leading variances that hold a fraction of their total, ``(..., n) -> (...)`` int64; 0 if all are zero.

    Args:
        variances: ``(..., n)``, descending.
        fraction: In (0, 1].

    >>> import torch
    >>> effective_rank(torch.tensor([5.0, 4.0, 1.0]), 0.9)
    tensor(2)
    """
    total = variances.sum(-1)
    count = count_to_fraction(variances.cumsum(-1), total, fraction)
    return count.clamp_max(variances.shape[-1]) * (total > 0)


def participation_ratio(variances: Tensor) -> Tensor:
    r"""Smooth rank of a spectrum, :math:`(\sum v)^2 / \sum v^2`, ``(..., n) -> (...)``; 0 where all are zero."""
    return participation_from_moments(variances.sum(-1), variances.square().sum(-1))


def participation_from_moments(total: Tensor, sum_of_squares: Tensor) -> Tensor:
    r"""`participation_ratio` of a spectrum of which only :math:`\sum v` and :math:`\sum v^2` are known."""
    return (total.square() / sum_of_squares).masked_fill_(total == 0, 0)


def spread_over_positions(weight: Tensor, num_positions: Tensor) -> Tensor:
    r"""Fraction of positions that carry a weight, :math:`(\sum w)^2 / (n \sum w^2)`, ``(B, H, L) -> (B, H)``."""
    ratio: Tensor = weight.sum(-1) / torch.linalg.vector_norm(weight, dim=-1)
    return ratio.square_() / num_positions
