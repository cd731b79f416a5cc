r"""Key incoherence: how evenly the directions of the keys are spread over positions.

With the thin SVD of the centred keys, :math:`\tilde k = U S W^\top`, the leverage of position j is :math:`\ell_j = \|U_j\|^2`. It bounds
the share of the energy field that can fall on j *for every query*, so incoherent keys cannot give a field that
concentrates on few positions. The SVD comes from the d×d Gram matrix in float64 (`cores` argues why that suffices);
everything in the L×d frame is one product with U.

Letters: B sequences, Hkv key heads, L positions, n valid positions, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnmonitor.functional.counting import check_fraction, count_to_fraction
from attnmonitor.functional.precision import full_precision

__all__ = [
    "KeyBasis",
    "incoherence",
    "key_basis",
    "key_incoherence",
    "key_leverage_max",
    "key_norm_participation",
    "key_participation_ratio",
    "key_rank",
    "key_rms",
    "leverage_scores",
    "participation_ratio",
    "spread_over_positions",
]


@dataclass(frozen=True, eq=False)
class KeyBasis:
    r"""The centred keys of each head in their own singular basis, :math:`\tilde k = U \Lambda^{1/2} W^\top`.

    Attributes:
        centered: k̃, ``(B, Hkv, Lk, d)``, zero at padding.
        eigenvalues: Λ, ``(B, Hkv, d)``, descending, float64: the squared singular values.
        eigenvectors: W, ``(B, Hkv, d, d)``, float64, one direction per column.
        num_keys: ``(B, 1)``, float64: positions that are not padding.
        finite: ``(B, Hkv)`` bool: heads without NaN or infinity. The others carry Λ = 0, W = I.
    """

    centered: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    num_keys: Tensor
    finite: Tensor

    def numerical_rank_mask(self) -> Tensor:
        """Directions above float32's noise, ``max(Lk, d) · eps · σ₁``, ``(B, Hkv, d)`` bool.

        The same cut for every input type, so that a number does not depend on the type its keys arrived in.
        """
        noise = max(self.centered.shape[-2:]) * torch.finfo(torch.float32).eps
        return (self.eigenvalues > noise**2 * self.eigenvalues[..., :1]) & (self.eigenvalues > 0)

    def energy_mask(self, energy: float) -> Tensor:
        """The fewest leading directions that hold ``energy`` of ‖k̃‖_F², ``(B, Hkv, d)`` bool."""
        if energy == 1:
            return self.numerical_rank_mask()
        count = count_to_fraction(self.eigenvalues, self.eigenvalues.sum(-1), energy)
        return torch.arange(self.eigenvalues.shape[-1], device=count.device) < count[..., None]

    def or_nan(self, values: Tensor) -> Tensor:
        """``values``, ``(B, Hkv)``, with NaN for the heads that are not finite."""
        return torch.where(self.finite, values, torch.nan)

    def left_singular_vectors(self) -> Tensor:
        """U, ``(B, Hkv, Lk, d)``: zero columns for directions below the numerical rank."""
        inverse_root = torch.where(self.numerical_rank_mask(), self.eigenvalues, torch.inf).rsqrt()
        return self.centered @ (self.eigenvectors * inverse_root[..., None, :]).to(self.centered.dtype)


def key_basis(key: Tensor, key_mask: Tensor | None = None) -> KeyBasis:
    """Centre the keys over their valid positions and diagonalise their Gram matrix.

    Args:
        key: ``(B, Hkv, Lk, d)``.
        key_mask: ``(B, Lk)`` bool, True where the position is not padding; None where all are.
    """
    work = torch.promote_types(key.dtype, torch.float32)
    if key_mask is None:
        num_keys = torch.full((key.shape[0], 1), float(key.shape[2]), dtype=torch.float64, device=key.device)
        wide = key.to(torch.float64)
        centered = wide - wide.mean(-2, keepdim=True)
    else:
        valid = key_mask[:, None, :, None]
        num_keys = key_mask.sum(-1, keepdim=True, dtype=torch.float64)
        wide = torch.where(valid, key, 0).to(torch.float64)
        centered = torch.where(valid, wide - wide.sum(-2, keepdim=True) / num_keys[..., None, None], 0)
    gram = centered.mT @ centered
    finite = gram.isfinite().all(-1).all(-1)
    eigenvalues, eigenvectors = torch.linalg.eigh(torch.where(finite[..., None, None], gram, 0))
    return KeyBasis(centered.to(work), eigenvalues.flip(-1).clamp_min(0), eigenvectors.flip(-1), num_keys, finite)


def incoherence(left: Tensor, directions: Tensor, num_keys: Tensor) -> Tensor:
    """Coherence of the subspace that ``directions`` selects, ``(n / k) max_j ‖(U_k)_j‖²``; NaN where k = 0."""
    leverage = (left.square() @ directions[..., None].to(left.dtype))[..., 0]
    return num_keys * leverage.amax(-1) / directions.sum(-1)


def participation_ratio(variances: Tensor) -> Tensor:
    r"""Smooth rank of a spectrum, :math:`(\sum v)^2 / \sum v^2`, ``(..., n) -> (...)``; 0 where all are zero."""
    total = variances.sum(-1)
    return torch.where(total == 0, 0, total.square() / variances.square().sum(-1))


def spread_over_positions(weight: Tensor, num_positions: Tensor) -> Tensor:
    r"""Fraction of positions that carry a weight, :math:`(\sum w)^2 / (n \sum w^2)`, ``(B, H, L) -> (B, H)``."""
    weight = weight / weight.sum(-1, keepdim=True)
    return 1 / (num_positions * weight.square().sum(-1))


def leverage_scores(key: Tensor, *, mask: Tensor | None = None, energy: float = 1.0) -> Tensor:
    """Leverage of every key position, ``(B, Hkv, L)``."""
    check_fraction("energy", energy)
    with full_precision(key.device):
        basis = key_basis(key, mask)
        left = basis.left_singular_vectors()
        return (left.square() @ basis.energy_mask(energy)[..., None].to(left.dtype))[..., 0]


def key_incoherence(key: Tensor, *, mask: Tensor | None = None, energy: float = 0.9) -> Tensor:
    """Coherence of the subspace that carries ``energy`` of the keys, ``(B, Hkv)``."""
    check_fraction("energy", energy)
    with full_precision(key.device):
        basis = key_basis(key, mask)
        return incoherence(basis.left_singular_vectors(), basis.energy_mask(energy), basis.num_keys)


def key_rank(key: Tensor, *, mask: Tensor | None = None, energy: float = 0.9) -> Tensor:
    """Fewest directions that hold ``energy`` of ‖k̃‖_F², ``(B, Hkv)``; 0 for zero keys."""
    check_fraction("energy", energy)
    basis = key_basis(key, mask)
    return basis.or_nan(basis.energy_mask(energy).sum(-1))


def key_leverage_max(key: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Largest leverage of one key position in the full key space, ``(B, Hkv)``, in [0, 1]."""
    return leverage_scores(key, mask=mask).amax(-1)


def key_participation_ratio(key: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Smooth rank of the centred keys, :math:`(\sum s^2)^2 / \sum s^4`, ``(B, Hkv)``; 0 for zero keys."""
    basis = key_basis(key, mask)
    return basis.or_nan(participation_ratio(basis.eigenvalues))


def key_norm_participation(key: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Fraction of positions that carry the key norm, ``(B, Hkv)``, in [1/n, 1]; NaN for zero keys."""
    basis = key_basis(key, mask)
    return spread_over_positions(torch.linalg.vecdot(basis.centered, basis.centered), basis.num_keys)


def key_rms(key: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Root mean square entry of the centred keys, ``(B, Hkv)``."""
    basis = key_basis(key, mask)
    return basis.or_nan((basis.eigenvalues.sum(-1) / (basis.num_keys * key.shape[-1])).sqrt())
