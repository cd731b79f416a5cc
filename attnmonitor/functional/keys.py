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

import torch
from torch import Tensor

from attnmonitor.functional.key_basis import key_basis, key_gram
from attnmonitor.functional.precision import full_precision
from attnmonitor.functional.ranks import check_fraction, participation_ratio, spread_over_positions

__all__ = [
    "key_incoherence",
    "key_leverage_max",
    "key_norm_participation",
    "key_participation_ratio",
    "key_rank",
    "key_rms",
    "leverage_scores",
]


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
