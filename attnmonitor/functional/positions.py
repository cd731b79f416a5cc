r"""Profiles over key positions: how a quantity of each head is spread over the positions of its keys.

With :math:`\tilde k = U S W^\top`, position j is the row :math:`u_j` of U, and all four profiles are quadratic in it:

* ``"leverage"``: :math:`\ell_j = \|u_j\|^2` over every direction above float32's noise; sums to the numerical rank;
* ``"leading_leverage"``: the same over the fewest directions that hold 90 % of the key energy; sums to the key rank;
* ``"norm_shares"``: :math:`\|\tilde k_j\|^2 / \|\tilde k\|_F^2`; sums to 1;
* ``"energy_shares"``: :math:`\|\tilde E e_j\|^2 / \|\tilde E\|_F^2 = u_j^\top M u_j / \operatorname{tr} M`, M the field
  core in the keys' basis; sums to 1.

Leverage bounds the share of the energy field that can fall on j *for every query*: share_j ≤ ℓ_j. `share_excess` checks
this on every sample.

Reading the keys again and projecting them on the basis is what costs time. So one pass computes all profiles that are
asked for, and only those.

Letters: B sequences, Hq query heads, Hkv key heads, G = Hq / Hkv, Lk positions, d head size.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnmonitor.functional.key_basis import KeyBasis
from attnmonitor.functional.precision import full_precision
from attnmonitor.functional.ranks import spread_over_positions

__all__ = ["PositionProfile", "Profile", "position_profiles", "share_excess"]

Profile = Literal["leverage", "leading_leverage", "norm_shares", "energy_shares"]


@dataclass(frozen=True, eq=False)
class PositionProfile:
    """One number per key position of each head.

    Attributes:
        weights: ``(B, H, Lk)``, 0 at padding; NaN for a head without a profile (zero or not finite).
        total: What the weights of a head add up to, known exactly: a rank, ``(B, H)``, or 1.
        num_keys: n, ``(B, 1)`` float64.
    """

    weights: Tensor
    total: Tensor | float
    num_keys: Tensor

    def coherence(self) -> Tensor:
        """Largest weight over the mean weight, ``(B, H)`` in [1, n]."""
        return self.weights.amax(-1) * self.num_keys / self.total

    def participation(self) -> Tensor:
        r"""Fraction of positions that carry the weight, :math:`(\sum w)^2 / (n \sum w^2)`, ``(B, H)`` in [1/n, 1]."""
        return spread_over_positions(self.weights, self.num_keys)


def position_profiles(
    basis: KeyBasis, wanted: Collection[Profile], *, core: Tensor | None = None, energy: float = 0.9
) -> dict[str, PositionProfile]:
    """Compute the wanted profiles in one pass over the positions.

    Args:
        basis: The keys' basis.
        wanted: Names of the profiles, at least one.
        core: M in the keys' basis, ``(B, Hq, d, d)``; read for ``"energy_shares"`` only.
        energy: Fraction of the key energy that ``"leading_leverage"`` is taken in; 1 is the numerical rank.

    Returns:
        By name. Of the energy shares ``(B, Hq, Lk)``, not below float32; of the others ``(B, Hkv, Lk)`` float64.
    """
    columns, totals = _key_columns(basis, wanted, energy)
    stacked = torch.stack(list(columns.values()), -1) if columns else None
    relative = _relative_cores(core, basis.keys.key.dtype) if "energy_shares" in wanted and core is not None else None
    weighted: list[Tensor] = []
    shares: list[Tensor] = []
    with full_precision(basis.eigenvalues.device):
        for left in basis.left_blocks():
            if relative is not None:
                shares.append(_energy_shares(relative, left))
            if stacked is not None:
                weighted.append(left.square_() @ stacked.to(left.dtype))
    num_keys = basis.keys.num_keys
    found: dict[str, PositionProfile] = {}
    if weighted:
        for (name, total), weights in zip(
            totals.items(), torch.cat(weighted, 2).to(torch.float64).unbind(-1), strict=True
        ):
            found[name] = PositionProfile(weights, total, num_keys)
    if shares:
        found["energy_shares"] = PositionProfile(torch.cat(shares, -1), 1.0, num_keys)
    return found


def _key_columns(
    basis: KeyBasis, wanted: Collection[Profile], energy: float
) -> tuple[dict[Profile, Tensor], dict[Profile, Tensor | float]]:
    """The weights of U's squared columns that make each wanted profile, ``(B, Hkv, d)``, and the profile's total."""
    columns: dict[Profile, Tensor] = {}
    totals: dict[Profile, Tensor | float] = {}
    if "leverage" in wanted:
        totals["leverage"] = basis.energy_rank(1)
        columns["leverage"] = basis.above_noise
    if "leading_leverage" in wanted:
        totals["leading_leverage"] = rank = basis.energy_rank(energy)
        columns["leading_leverage"] = basis.leading(rank)
    if "norm_shares" in wanted:
        totals["norm_shares"] = 1.0
        columns["norm_shares"] = basis.relative_variances()
    return columns, totals


def _relative_cores(core: Tensor, dtype: torch.dtype) -> Tensor:
    """M / tr M, not below float32; NaN where the field is zero."""
    energy = core.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (core / energy[..., None, None]).to(torch.promote_types(dtype, torch.float32))


def _energy_shares(relative: Tensor, left: Tensor) -> Tensor:
    """u_jᵀ (M / tr M) u_j, ``(B, Hq, d, d), (B, Hkv, block, d) -> (B, Hq, block)``."""
    num_sequences, num_kv_heads, _, head_dim = left.shape
    left = left.to(relative.dtype)
    stacked = relative.view(num_sequences, num_kv_heads, -1, head_dim, head_dim).transpose(2, 3).flatten(3)
    images = (left @ stacked).unflatten(-1, (-1, head_dim))  # (B, Hkv, block, G, d): one product per key head
    shares: Tensor = images.mul_(left[..., None, :]).sum(-1)
    return shares.transpose(2, 3).flatten(1, 2)


def share_excess(energy_shares: PositionProfile, leverage: PositionProfile) -> Tensor:
    """The most by which a position's energy share exceeds its leverage, ``(B,)``; rounding in a sound measurement."""
    excess: Tensor = energy_shares.weights.unflatten(1, (leverage.weights.shape[1], -1)) - leverage.weights[:, :, None]
    return excess.nan_to_num_(0, 0, 0).amax((1, 2, 3)).clamp_min_(0)
