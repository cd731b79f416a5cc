r"""Key incoherence: how evenly the directions of the keys are spread over positions.

With the thin SVD of the centred keys, :math:`\tilde k = U S W^\top`, the leverage of position j is
:math:`\ell_j = \|U_j\|^2`. It bounds the share of the energy field that can fall on j *for every query*,

.. math:: \|\tilde E e_j\|^2 / \|\tilde E\|_F^2 \le \ell_j,

so incoherent keys cannot give a field that concentrates on few positions.

No SVD of a long matrix is taken. The d×d Gram matrix :math:`\tilde k^\top \tilde k = W S^2 W^\top` gives W and S, and
:math:`U = \tilde k W S^{-1}` is one product. Squaring the keys halves the digits, which is why the Gram matrix is
float64: products of float32 entries are exact in it, it keeps singular values down to :math:`10^{-8} \sigma_1`, past
what float32 keys can mean, and nothing that float16 or float32 can hold overflows in it. (In float32 it would lose
everything below :math:`3 \cdot 10^{-4} \sigma_1`, and full-rank leverage with it.) The keys are centred before the
product: the shortcut :math:`k^\top k - n \bar k \bar k^\top` cancels when the mean dominates, as it does in trained
models.

Letters: B sequences, Hkv key heads, L positions, n valid ones, d head size.

References:
    E. Candès and B. Recht, *Exact matrix completion via convex optimization*, 2009, Definition 1.2 (coherence).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, num_positions
from attnmonitor.functional.precision import full_precision, gram_of, position_blocks
from attnmonitor.functional.ranks import check_fraction, effective_rank

__all__ = [
    "KeyBasis",
    "KeyGram",
    "key_basis",
    "key_gram",
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
class KeyGram:
    r"""The Gram matrix of each head's centred keys.

    Attributes:
        key: k, ``(B, Hkv, L, d)``, as it came.
        key_mask: ``(B, L)`` bool, True where the position is not padding; None where all are.
        mean: Mean key over valid positions, ``(B, Hkv, 1, d)`` float64.
        gram: :math:`\tilde k^\top \tilde k`, ``(B, Hkv, d, d)`` float64; zero for a head that is not finite.
        energy: :math:`\|\tilde k\|_F^2`, ``(B, Hkv)`` float64; NaN for a head that is not finite.
        num_keys: n, ``(B, 1)`` float64.
    """

    key: Tensor
    key_mask: Tensor | None
    mean: Tensor
    gram: Tensor
    energy: Tensor
    num_keys: Tensor

    def cholesky_root(self) -> Tensor:
        r"""C with :math:`C C^\top = \tilde k^\top \tilde k`, ``(B, Hkv, d, d)``, by a triangular factor.

        Nothing waits for the device. The matrix is shifted by 2 d² u of its trace, u the unit roundoff: enough for the
        factorisation to succeed whatever the rank (Higham, *Accuracy and Stability of Numerical Algorithms*, Theorem
        10.7), and within `field_cores`' error.
        """
        head_dim = self.gram.shape[-1]
        shift = head_dim**2 * torch.finfo(torch.float64).eps * self.energy
        shift = torch.where(shift > 0, shift, 1)[..., None, None]
        identity = torch.eye(head_dim, dtype=torch.float64, device=self.gram.device)
        factor = torch.linalg.cholesky_ex(self.gram + shift * identity).L
        # Zero keys factor the identity: times their energy, 0; heads that are not finite become NaN the same way.
        return torch.where(self.energy[..., None, None] > 0, factor, self.energy[..., None, None])


@dataclass(frozen=True, eq=False)
class KeyBasis:
    r"""The singular basis of each head's centred keys, :math:`\tilde k = U \Lambda^{1/2} W^\top`.

    Attributes:
        keys: The Gram matrix it diagonalises.
        eigenvalues: Λ, ``(B, Hkv, d)`` float64, descending: the squared singular values. NaN for a head that is not
            finite.
        eigenvectors: W, ``(B, Hkv, d, d)`` float64, one direction per column.
    """

    keys: KeyGram
    eigenvalues: Tensor
    eigenvectors: Tensor

    @property
    def energy(self) -> Tensor:
        """‖k̃‖_F², ``(B, Hkv)``."""
        return self.eigenvalues.sum(-1)

    def root(self) -> Tensor:
        """C = W Λ^{1/2}, ``(B, Hkv, d, d)``, in which a field core is graded; NaN for a head that is not finite."""
        return self.eigenvectors * self.eigenvalues.sqrt()[..., None, :]

    def numerical_rank(self) -> Tensor:
        """Directions above float32's noise, ``max(n, d) · eps · σ₁``, ``(B, Hkv)``.

        The same cut for every input type, so that a number does not depend on the type its keys arrived in, nor on how
        much padding stands beside them.
        """
        noise = self.keys.num_keys.clamp_min(self.keys.key.shape[-1])[..., None] * torch.finfo(torch.float32).eps
        return (self.eigenvalues > noise.square() * self.eigenvalues[..., :1]).sum(-1)

    def energy_rank(self, energy: float) -> Tensor:
        """Fewest directions that hold ``energy`` of ‖k̃‖_F², ``(B, Hkv)``; the numerical rank for 1."""
        if energy == 1:
            return self.numerical_rank()
        return effective_rank(self.eigenvalues, energy)

    def leading(self, rank: Tensor) -> Tensor:
        """Which directions are among the ``rank`` leading ones, ``(B, Hkv) -> (B, Hkv, d)`` bool."""
        return torch.arange(self.eigenvalues.shape[-1], device=rank.device) < rank[..., None]

    def or_nan(self, values: Tensor) -> Tensor:
        """``values``, ``(B, Hkv)``, with NaN for the heads that are not finite."""
        return torch.where(self.energy.isfinite(), values, torch.nan)

    def relative_variances(self) -> Tensor:
        """Λ / ‖k̃‖_F², ``(B, Hkv, d)``; NaN where the keys are all equal."""
        return self.eigenvalues / self.energy[..., None]

    def left_blocks(self) -> Iterator[Tensor]:
        """Read U in blocks of positions, ``(B, Hkv, block, d)`` float64.

        Rows are zero at padding, columns below the rank. A direction near the cut is a ten-millionth of the keys: in
        float32 its rows would be rounding, divided by it.
        """
        kept = self.leading(self.numerical_rank())
        to_left = self.eigenvectors * torch.where(kept, self.eigenvalues, torch.inf).rsqrt()[..., None, :]
        to_left = torch.where(self.energy.isfinite()[..., None, None], to_left, torch.nan)
        for centered in _centered_blocks(self.keys.key, self.keys.key_mask, self.keys.mean):
            yield centered @ to_left

    def weighted_rows(self, weights: Tensor) -> Tensor:
        r""":math:`\sum_i w_i U_{ji}^2` of every position j, ``(B, Hkv, d) -> (B, Hkv, L)``, not below float32."""
        columns = weights[..., None].to(torch.float64)
        rows = torch.cat([left.square() @ columns for left in self.left_blocks()], 2).squeeze(-1)
        return rows.to(torch.promote_types(self.keys.key.dtype, torch.float32))


def _centered_blocks(key: Tensor, key_mask: Tensor | None, mean: Tensor) -> Iterator[Tensor]:
    """Read k̃ in blocks of positions, ``(B, Hkv, block, d)`` float64, zero at padding."""
    for positions, block in position_blocks(key, key_mask):
        centered = block.sub_(mean)
        if key_mask is not None:
            centered = torch.where(key_mask[:, None, positions, None], centered, 0)
        yield centered


def key_gram(key: Tensor, key_mask: Tensor | None = None) -> KeyGram:
    """Centre the keys over their valid positions and form their Gram matrix.

    Args:
        key: ``(B, Hkv, L, d)``.
        key_mask: ``(B, L)`` bool, True where the position is not padding; None where all are.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_heads("key", key, key_mask)
    num_sequences, num_heads, _, head_dim = key.shape
    num_keys = num_positions(key, key_mask)
    total = torch.zeros(num_sequences, num_heads, 1, head_dim, dtype=torch.float64, device=key.device)
    for _, block in position_blocks(key, key_mask):
        total += block.sum(-2, keepdim=True)
    mean = total / num_keys[..., None, None]
    gram = gram_of(key, _centered_blocks(key, key_mask, mean))
    energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    finite = energy.isfinite()
    # Equal float64 keys differ from their mean by its rounding: centred keys that are no more than that are zero.
    noise = num_keys.pow(3) * mean.square().sum((-2, -1)) * torch.finfo(torch.float64).eps ** 2
    alive = finite & (energy > noise)
    gram = torch.where(alive[..., None, None], gram, 0)
    energy = torch.where(alive, energy, torch.where(finite, 0, torch.nan))
    return KeyGram(key, key_mask, mean, gram, energy, num_keys)


def key_basis(key: Tensor, key_mask: Tensor | None = None) -> KeyBasis:
    """Diagonalise the Gram matrix of the centred keys.

    On CUDA `torch.linalg.eigh` waits for the device to check for failure: one short wait per layer, inside the forward.

    Args:
        key: ``(B, Hkv, L, d)``.
        key_mask: ``(B, L)`` bool, True where the position is not padding; None where all are.

    Raises:
        ValueError: The shapes do not fit.
    """
    keys = key_gram(key, key_mask)
    eigenvalues, eigenvectors = torch.linalg.eigh(keys.gram)
    eigenvalues = eigenvalues.flip(-1).clamp_min(0)
    known = keys.energy.isfinite()[..., None]
    return KeyBasis(keys, torch.where(known, eigenvalues, torch.nan), eigenvectors.flip(-1))


def leverage_scores(key: Tensor, *, mask: Tensor | None = None, energy: float = 1.0) -> Tensor:
    r"""Leverage of every key position in the subspace that carries ``energy`` of the centred keys.

    .. math:: \ell_j = \|(U_k)_j\|^2, \qquad \sum_j \ell_j = k

    Args:
        key: ``(B, Hkv, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.
        energy: Fraction of :math:`\|\tilde k\|_F^2` that the subspace holds. 1 takes every direction above float32's
            noise, ``max(n, d) · eps · σ₁``, whichever type the keys are in.

    Returns:
        ``(B, Hkv, L)`` in [0, 1], 0 at padding; NaN for a head that is not finite.

    Raises:
        ValueError: ``energy`` is not in (0, 1], or the shapes do not fit.

    >>> key = torch.eye(4)[None, None]
    >>> leverage_scores(key)
    tensor([[[0.7500, 0.7500, 0.7500, 0.7500]]])
    """
    check_fraction("energy", energy)
    with full_precision(key.device):
        basis = key_basis(key, mask)
        return basis.weighted_rows(basis.leading(basis.energy_rank(energy)))


def key_incoherence(key: Tensor, *, mask: Tensor | None = None, energy: float = 0.9) -> Tensor:
    r"""Coherence of the subspace that carries ``energy`` of the centred keys.

    .. math:: \mu = \frac{n}{k} \max_j \|(U_k)_j\|^2 \in [1, n/k]

    1 is perfectly incoherent, large means that few keys rule. Taken in the full column space (``energy=1``) it is
    decided by the smallest directions, which are noise exactly where keys collapse, and it is 1 for any keys when
    :math:`n - 1 \le d`; hence the cut.

    Args:
        key: ``(B, Hkv, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.
        energy: Fraction of the keys' variance that the subspace holds, in (0, 1].

    Returns:
        ``(B, Hkv)``; NaN for a head whose keys are all equal (undefined) or not finite.

    Raises:
        ValueError: ``energy`` is not in (0, 1], or the shapes do not fit.

    References:
        E. Candès and B. Recht, *Exact matrix completion via convex optimization*, 2009, Definition 1.2.
    """
    rank = key_rank(key, mask=mask, energy=energy)
    largest = leverage_scores(key, mask=mask, energy=energy).amax(-1)
    num_keys = key.shape[2] if mask is None else mask.sum(-1, keepdim=True)
    return largest * num_keys / rank


def key_rank(key: Tensor, *, mask: Tensor | None = None, energy: float = 0.9) -> Tensor:
    r"""Fewest directions that hold ``energy`` of :math:`\|\tilde k\|_F^2`.

    Args:
        key: ``(B, Hkv, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.
        energy: Fraction to hold, in (0, 1]; 1 is the numerical rank of `leverage_scores`.

    Returns:
        ``(B, Hkv)`` float64; 0 for keys that are all equal, NaN for a head that is not finite.

    Raises:
        ValueError: ``energy`` is not in (0, 1], or the shapes do not fit.
    """
    check_fraction("energy", energy)
    basis = key_basis(key, mask)
    return basis.or_nan(basis.energy_rank(energy).to(torch.float64))


def key_leverage_max(key: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Largest leverage of one key position in the full key space; informative where n ≥ 4 d.

    Args:
        key: ``(B, Hkv, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hkv)`` in [0, 1]; NaN for a head that is not finite.
    """
    return leverage_scores(key, mask=mask).amax(-1)


def key_participation_ratio(key: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Smooth rank of the centred keys, :math:`(\sum s^2)^2 / \sum s^4` over their singular values.

    Args:
        key: ``(B, Hkv, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hkv)`` float64; 0 for keys that are all equal, NaN for a head that is not finite.
    """
    return participation_ratio(key_basis(key, mask).eigenvalues)


def key_norm_participation(key: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Fraction of positions that carry the key norm.

    .. math:: \frac{(\sum_j w_j)^2}{n \sum_j w_j^2}, \qquad w_j = \|\tilde k_j\|^2

    Args:
        key: ``(B, Hkv, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hkv)`` in [1/n, 1]; NaN for keys that are all equal or not finite.
    """
    with full_precision(key.device):
        basis = key_basis(key, mask)
        return spread_over_positions(basis.weighted_rows(basis.relative_variances()), basis.keys.num_keys)


def key_rms(key: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Root mean square entry of the centred keys, in the keys' own unit.

    Args:
        key: ``(B, Hkv, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hkv)`` float64; NaN for a head that is not finite.
    """
    keys = key_gram(key, mask)
    return (keys.energy / (keys.num_keys * key.shape[-1])).sqrt()


def participation_ratio(variances: Tensor) -> Tensor:
    r"""Smooth rank of a spectrum, :math:`(\sum v)^2 / \sum v^2`, ``(..., n) -> (...)``; 0 where all are zero."""
    total = variances.sum(-1)
    return torch.where(total == 0, 0, total.square() / variances.square().sum(-1))


def spread_over_positions(weight: Tensor, num_positions: Tensor) -> Tensor:
    r"""Fraction of positions that carry a weight, :math:`(\sum w)^2 / (n \sum w^2)`, ``(B, H, L) -> (B, H)``."""
    weight = weight / weight.sum(-1, keepdim=True)
    return 1 / (num_positions * weight.square().sum(-1))
