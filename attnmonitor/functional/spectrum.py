r"""The spectrum of a head's energy field, from its d×d core.

The eigenvalues of the core M are the squared singular values of the field Ẽ, its trace is the total energy
:math:`T = \|\tilde E\|_F^2` and its squared Frobenius norm is :math:`\sum \sigma^4`: three routes to the same matrix, of which only the first
needs an eigensolver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnmonitor.functional.cores import energy_shares, field_cores
from attnmonitor.functional.counting import check_fraction, count_to_fraction
from attnmonitor.functional.incoherence import key_basis, spread_over_positions
from attnmonitor.functional.precision import full_precision

__all__ = [
    "EnergySpectrum",
    "Method",
    "Per",
    "core_spectrum",
    "energy_delocalization",
    "energy_effective_rank",
    "energy_spectrum",
    "query_rms",
]

Method = Literal["auto", "randomized", "exact"]
Per = Literal["query_head", "kv_head"]


@dataclass(frozen=True, eq=False)
class EnergySpectrum:
    r"""The leading spectrum of each head's energy field, with what is known about the rest.

    Attributes:
        variances: Squared singular values, ``(..., r)``, descending; lower bounds of the true ones.
        variance_bounds: Upper bounds of the true ones, ``(..., r)``.
        energy: :math:`T = \|\tilde E\|_F^2`, ``(...)``, exact.
        energy_squared: :math:`\sum \sigma^4`, ``(...)``, exact.
        slack: Relative rounding error of a sum of variances against T.
        num_entries: Valid entries of the field, Lq · Lk, ``(..., )`` or broadcastable to it.
    """

    variances: Tensor
    variance_bounds: Tensor
    energy: Tensor
    energy_squared: Tensor
    slack: Tensor
    num_entries: Tensor

    @property
    def singular_values(self) -> Tensor:
        """Leading singular values, ``(..., r)``, descending."""
        return self.variances.sqrt()

    @property
    def participation_ratio(self) -> Tensor:
        r"""Smooth effective rank, :math:`(\sum\sigma^2)^2 / \sum\sigma^4`, ``(...)``; 0 for a zero field."""
        return self._or_zero(self.energy.square() / self.energy_squared)

    @property
    def stable_rank(self) -> Tensor:
        r"""Total over leading energy, :math:`T / \sigma_1^2`, ``(...)``; 0 for a zero field."""
        return self._or_zero(self.energy / self.variances[..., 0])

    @property
    def energy_rms(self) -> Tensor:
        """Root mean square of the field's valid entries, in logit units, ``(...)``."""
        return (self.energy / self.num_entries).sqrt()

    def effective_rank(self, fraction: float = 0.9) -> Tensor:
        """Fewest components that hold ``fraction`` of the variance, ``(...)``; NaN for a head that is not finite."""
        return self._count(self.variances, fraction)

    def effective_rank_bounds(self, fraction: float = 0.9) -> tuple[Tensor, Tensor]:
        """Bounds ``(lower, upper)`` that the effective rank cannot leave, ``(...)`` each."""
        slack = self.slack * self.energy
        lower = self._count(self.variance_bounds, fraction, slack=slack)
        upper = self._count(self.variances, fraction, slack=-slack)
        return lower, upper

    def certified(self, fraction: float = 0.9) -> Tensor:
        """Whether both bounds agree, so that the count is what the full SVD gives, ``(...)`` bool."""
        lower, upper = self.effective_rank_bounds(fraction)
        return lower == upper

    def _count(self, variances: Tensor, fraction: float, slack: Tensor | None = None) -> Tensor:
        check_fraction("fraction", fraction)
        if slack is not None:
            variances = torch.cat([variances[..., :1] + slack[..., None], variances[..., 1:]], -1)
        count = count_to_fraction(variances, self.energy, fraction).to(self.energy.dtype)
        return torch.where(self.energy.isfinite(), count, torch.nan)

    def _or_zero(self, ratio: Tensor) -> Tensor:
        return torch.where(self.energy == 0, 0, ratio)


def core_spectrum(core: Tensor, num_entries: Tensor, *, method: Method = "auto") -> EnergySpectrum:
    """Spectrum of the fields whose cores are given.

    Args:
        core: M, ``(..., d, d)`` float64, symmetric positive semidefinite; NaN for a head that is not finite.
        num_entries: Valid entries of each field, broadcastable to ``(...)``.
        method: ``"exact"``, ``"randomized"`` or ``"auto"``.
    """
    energy = core.diagonal(dim1=-2, dim2=-1).sum(-1)
    energy_squared = core.square().sum((-2, -1))
    safe = torch.where(energy.isfinite()[..., None, None], core, 0)
    variances = torch.linalg.eigvalsh(safe).flip(-1).clamp_min(0)
    slack = torch.full_like(energy, 1e-12)
    return EnergySpectrum(variances, variances, energy, energy_squared, slack, num_entries)


def energy_spectrum(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    per: Per = "query_head",
    method: Method = "auto",
) -> EnergySpectrum:
    r"""Spectrum of the energy field :math:`\tilde E = s\,q\,\tilde k^\top` of every head, without forming it.

    Args:
        query: ``(B, Hq, Lq, d)``.
        key: ``(B, Hkv, Lk, d)``; Hkv divides Hq.
        scale: Softmax scale s; ``d ** -0.5`` by default.
        mask: ``(B, L)`` bool, True where the position is not padding.
        query_mask: ``(B, Lq)`` bool, where the queries' padding is not the keys'.
        per: One spectrum per ``"query_head"``, or per ``"kv_head"``: the queries that share a key head stacked.
        method: ``"exact"``, ``"randomized"`` or ``"auto"``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None and query_mask is None:
        query_mask = mask
    with full_precision(query.device):
        basis = key_basis(key, mask)
        core, _ = field_cores(query, basis, scale=scale, query_mask=query_mask)
        num_queries = query.shape[2] if query_mask is None else query_mask.sum(-1, keepdim=True)
        if per == "kv_head":
            core = core.unflatten(1, (key.shape[1], -1)).sum(2)
            num_queries = num_queries * (query.shape[1] // key.shape[1])
        return core_spectrum(core, num_queries * basis.num_keys, method=method)


def energy_effective_rank(
    query: Tensor,
    key: Tensor,
    *,
    fraction: float = 0.9,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    per: Per = "query_head",
    method: Method = "auto",
) -> Tensor:
    """Fewest singular components that hold ``fraction`` of the variance of each head's energy field, ``(B, H)``."""
    spectrum = energy_spectrum(query, key, scale=scale, mask=mask, query_mask=query_mask, per=per, method=method)
    return spectrum.effective_rank(fraction)


def energy_delocalization(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    r"""Fraction of key positions that carry the field's energy, ``(B, Hq)``, in [1/n, 1]; NaN for a zero field."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None and query_mask is None:
        query_mask = mask
    with full_precision(query.device):
        basis = key_basis(key, mask)
        core, _ = field_cores(query, basis, scale=scale, query_mask=query_mask)
        return spread_over_positions(energy_shares(core, basis.left_singular_vectors()), basis.num_keys)


def query_rms(query: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Root mean square entry of the queries, ``(B, Hq)``."""
    wide = query.to(torch.float64)
    if mask is None:
        return wide.square().mean((-2, -1)).sqrt()
    total = torch.where(mask[:, None, :, None], wide, 0).square().sum((-2, -1))
    return (total / (mask.sum(-1, keepdim=True) * query.shape[-1])).sqrt()
