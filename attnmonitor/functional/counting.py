"""How many components hold a given share of the variance: the one definition of effective rank."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TIE", "check_fraction", "count_to_fraction"]

TIE = 1e-12
"""Prefix sums this close to the mark count as reaching it, so that an exact tie (ten equal components, 90 %) is 9."""


def check_fraction(name: str, fraction: float) -> None:
    """Raise unless ``0 < fraction <= 1``."""
    if not 0 < fraction <= 1:
        raise ValueError(f"{name}={fraction!r}: must be in (0, 1], the share of the variance to hold, such as 0.9")


def count_to_fraction(variances: Tensor, total: Tensor, fraction: float) -> Tensor:
    r"""Fewest leading variances whose sum reaches a fraction of the total.

    .. math:: \min\{r : v_1 + \dots + v_r \ge f\,T\}

    Args:
        variances: ``(..., n)``, descending.
        total: T, ``(...)``. A zero total needs 0 components.
        fraction: f in (0, 1].

    Returns:
        ``(...)`` int64; at most n.

    >>> count_to_fraction(torch.tensor([5.0, 4.0, 1.0]), torch.tensor(10.0), 0.9)
    tensor(2)
    """
    mark = (fraction * (1 - TIE)) * total[..., None]
    short = (variances.cumsum(-1) < mark).sum(-1) + (total > 0)
    return short.clamp_max(variances.shape[-1])
