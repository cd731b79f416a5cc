r"""What a head has learned to tell apart: the rank of :math:`W_Q^\top W_K`, through d×d cores.

:math:`W_Q^\top W_K` is D×D, but its non-zero singular values are those of :math:`L_Q^\top L_K` with
:math:`W_Q W_Q^\top = L_Q L_Q^\top`, so the same core that serves an energy field serves the weights: queries and keys
are the columns of the projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnmonitor.functional.ranks import check_fraction, effective_rank, participation_ratio

__all__ = ["interaction_effective_rank", "interaction_participation_ratio", "spectral_gap"]


def _interaction_variances(w_q: Tensor, w_k: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values of each head's W_Qᵀ W_K, ``(H, d)`` descending, and which heads are finite."""
    if w_q.shape != w_k.shape or w_q.ndim != 3:
        raise ValueError(
            f"w_q {tuple(w_q.shape)} and w_k {tuple(w_k.shape)}: expected one shape (heads, head size, model size); "
            "repeat w_k for the query heads that share a key head"
        )
    query_gram, key_gram = (w @ w.mT for w in (w_q.to(torch.float64), w_k.to(torch.float64)))
    finite = (query_gram + key_gram).isfinite().all(-1).all(-1)
    query_gram, key_gram = (torch.where(finite[:, None, None], gram, 0) for gram in (query_gram, key_gram))
    eigenvalues, eigenvectors = torch.linalg.eigh(key_gram)
    root = eigenvectors * eigenvalues.clamp_min(0).sqrt()[:, None, :]
    return torch.linalg.eigvalsh(root.mT @ query_gram @ root).flip(-1).clamp_min(0), finite


def interaction_effective_rank(w_q: Tensor, w_k: Tensor, *, fraction: float = 0.9) -> Tensor:
    """Fewest singular components that hold ``fraction`` of the variance of ``W_Qᵀ W_K``, ``(H,)``."""
    check_fraction("fraction", fraction)
    variances, finite = _interaction_variances(w_q, w_k)
    return torch.where(finite, effective_rank(variances, fraction), torch.nan)


def interaction_participation_ratio(w_q: Tensor, w_k: Tensor) -> Tensor:
    r"""Smooth rank of ``W_Qᵀ W_K``, :math:`(\sum\sigma^2)^2 / \sum\sigma^4`, ``(H,)``."""
    variances, finite = _interaction_variances(w_q, w_k)
    return torch.where(finite, participation_ratio(variances), torch.nan)


def spectral_gap(learned_rank: Tensor, energy_rank: Tensor) -> Tensor:
    """Learned rank over energy rank, both ``(Hq,)``: how much of what was learned the text leaves unused."""
    return learned_rank / energy_rank
