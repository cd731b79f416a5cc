r"""What a head has learned to distinguish: the spectrum of :math:`W_Q^\top W_K`, through d×d cores.

:math:`W_Q^\top W_K` is D×D, but its non-zero singular values are those of :math:`L_Q^\top L_K` with
:math:`W_Q W_Q^\top = L_Q L_Q^\top`, so the same core that serves an energy field serves the weights: queries and keys
are the columns of the projections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnmonitor.functional.ranks import check_fraction, effective_rank, participation_ratio

__all__ = ["interaction_effective_rank", "interaction_participation_ratio", "spectral_gap"]


@dataclass(frozen=True, eq=False)
class InteractionSpectrum:
    """The spectrum of each head's W_Qᵀ W_K.

    Attributes:
        variances: Squared singular values, ``(H, d)`` float64, descending; NaN for a head that is not finite.
        energy_rank: Effective rank of each head's energy field, ``(H,)``; None where it was not measured.
    """

    variances: Tensor
    energy_rank: Tensor | None = None

    def or_nan(self, values: Tensor) -> Tensor:
        """``values``, ``(H,)``, with NaN for the heads that are not finite."""
        return torch.where(self.variances[..., 0].isfinite(), values, torch.nan)


def interaction_spectrum(w_q: Tensor, w_k: Tensor, *, energy_rank: Tensor | None = None) -> InteractionSpectrum:
    """Spectrum of each head's ``W_Qᵀ W_K``.

    Args:
        w_q: ``(H, d, D)``.
        w_k: ``(H, d, D)``, repeated for the query heads that share a key head.
        energy_rank: Effective rank of each head's energy field, ``(H,)``, for the spectral gap.

    Raises:
        ValueError: The shapes do not fit.
    """
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
    variances = torch.linalg.eigvalsh(root.mT @ query_gram @ root).flip(-1).clamp_min(0)
    return InteractionSpectrum(torch.where(finite[:, None], variances, torch.nan), energy_rank)


def interaction_effective_rank_of(spectrum: InteractionSpectrum, fraction: float = 0.9) -> Tensor:
    """Fewest components that hold ``fraction`` of the variance, ``(H,)``."""
    return spectrum.or_nan(effective_rank(spectrum.variances, fraction))


def interaction_effective_rank(w_q: Tensor, w_k: Tensor, *, fraction: float = 0.9) -> Tensor:
    """Fewest singular components that hold ``fraction`` of the variance of ``W_Qᵀ W_K``, ``(H,)``."""
    check_fraction("fraction", fraction)
    return interaction_effective_rank_of(interaction_spectrum(w_q, w_k), fraction)


def interaction_participation_of(spectrum: InteractionSpectrum) -> Tensor:
    """Smooth rank of the learned interaction, ``(H,)``."""
    return spectrum.or_nan(participation_ratio(spectrum.variances))


def interaction_participation_ratio(w_q: Tensor, w_k: Tensor) -> Tensor:
    r"""Smooth rank of ``W_Qᵀ W_K``, :math:`(\sum\sigma^2)^2 / \sum\sigma^4`, ``(H,)``."""
    return interaction_participation_of(interaction_spectrum(w_q, w_k))


def spectral_gap_of(spectrum: InteractionSpectrum) -> Tensor:
    """Learned rank over energy rank, ``(H,)``; NaN where the energy rank was not measured."""
    if spectrum.energy_rank is None:
        return torch.full_like(spectrum.variances[..., 0], torch.nan)
    return spectral_gap(interaction_effective_rank_of(spectrum), spectrum.energy_rank)


def spectral_gap(learned_rank: Tensor, energy_rank: Tensor) -> Tensor:
    """Learned rank over energy rank, both ``(Hq,)``: how much of what was learned the text leaves unused."""
    return learned_rank / energy_rank
