r"""Statistics of the keys alone: how many directions they use, and how evenly positions share them.

With the thin SVD of the centered keys, :math:`\tilde k = U S W^\top`, the leverage of position j is
:math:`\ell_j = \|U_j\|^2`. It bounds the share of the energy field that can fall on j *for every query*,

.. math:: \|\tilde E e_j\|^2 / \|\tilde E\|_F^2 \le \ell_j,

so incoherent keys cannot give a field that concentrates on few positions.

Each statistic is a formula of one summary of the keys (``…_of``), which the monitor calls as well, and a function of
the keys that computes the summary. `key_basis` explains how S and U are found without an SVD.

Letters: B sequences, Hkv key heads, L positions, n valid ones, d head size.

References:
    E. Candès and B. Recht, *Exact matrix completion via convex optimization*, 2009, Definition 1.2 (coherence).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnmonitor.functional.key_basis import KeyGram, KeySpectrum, key_basis, key_gram, key_spectrum
from attnmonitor.functional.positions import PositionProfile, Profile, position_profiles
from attnmonitor.functional.ranks import check_fraction, participation_ratio

__all__ = [
    "key_condition_number",
    "key_incoherence",
    "key_leverage_max",
    "key_norm_participation",
    "key_participation_ratio",
    "key_rank",
    "key_rms",
    "leverage_scores",
]


def leverage_scores(key: Tensor, *, mask: Tensor | None = None, energy: float = 1.0) -> Tensor:
    r"""Leverage of every key position in the subspace that carries ``energy`` of the centered keys.

    .. math:: \ell_j = \|(U_k)_j\|^2, \qquad \sum_j \ell_j = k

    Args:
        key: ``(B, Hkv, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.
        energy: Fraction of :math:`\|\tilde k\|_F^2` that the subspace holds. 1 takes every direction above float32's
            noise, ``max(n, d) · eps · σ₁``, whatever type the keys have.

    Returns:
        ``(B, Hkv, L)`` in [0, 1], 0 at padding; NaN for a head that is not finite.

    Raises:
        ValueError: ``energy`` is not in (0, 1], or the shapes do not fit.

    >>> key = torch.eye(4)[None, None]
    >>> leverage_scores(key)
    tensor([[[0.7500, 0.7500, 0.7500, 0.7500]]])
    """
    check_fraction("energy", energy)
    return _profile("leading_leverage", key, mask, energy).weights.to(torch.promote_types(key.dtype, torch.float32))


def _profile(name: Profile, key: Tensor, mask: Tensor | None, energy: float = 0.9) -> PositionProfile:
    basis = key_basis(key_gram(key, mask))
    return position_profiles(basis, {name}, energy=energy)[name]


def key_incoherence_of(leading_leverage: PositionProfile) -> Tensor:
    """Largest leverage over the mean leverage, ``(B, Hkv)``."""
    return leading_leverage.coherence()


def key_incoherence(key: Tensor, *, mask: Tensor | None = None, energy: float = 0.9) -> Tensor:
    r"""Coherence of the subspace that carries ``energy`` of the centered keys.

    .. math:: \mu = \frac{n}{k} \max_j \|(U_k)_j\|^2 \in [1, n/k]

    1 is perfectly incoherent, large means that few keys dominate. Taken in the full column space (``energy=1``) it is
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
    check_fraction("energy", energy)
    return key_incoherence_of(_profile("leading_leverage", key, mask, energy))


def key_rank_of(spectrum: KeySpectrum, energy: float = 0.9) -> Tensor:
    """Fewest directions that hold ``energy`` of the keys' variance, ``(B, Hkv)``."""
    return spectrum.or_nan(spectrum.energy_rank(energy).to(torch.float64))


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
    return key_rank_of(key_spectrum(key_gram(key, mask)), energy)


def key_leverage_max_of(leverage: PositionProfile) -> Tensor:
    """Largest leverage of one position, ``(B, Hkv)``."""
    return leverage.weights.amax(-1)


def key_leverage_max(key: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Largest leverage of one key position in the full key space; informative where n ≥ 4 d.

    Args:
        key: ``(B, Hkv, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hkv)`` float64 in [0, 1]; NaN for a head that is not finite.
    """
    return key_leverage_max_of(_profile("leverage", key, mask))


def key_participation_ratio_of(spectrum: KeySpectrum) -> Tensor:
    """Smooth rank of the centered keys, ``(B, Hkv)``."""
    return participation_ratio(spectrum.eigenvalues)


def key_participation_ratio(key: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Smooth rank of the centered keys, :math:`(\sum s^2)^2 / \sum s^4` over their singular values.

    Args:
        key: ``(B, Hkv, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hkv)`` float64; 0 for keys that are all equal, NaN for a head that is not finite.
    """
    return key_participation_ratio_of(key_spectrum(key_gram(key, mask)))


def key_condition_number_of(spectrum: KeySpectrum) -> Tensor:
    """Largest over smallest singular value above float32's noise, ``(B, Hkv)``."""
    last = (spectrum.energy_rank(1) - 1).clamp_min(0)
    smallest = spectrum.eigenvalues.gather(-1, last[..., None])[..., 0]
    return (spectrum.eigenvalues[..., 0] / smallest).sqrt()  # 0 / 0 for zero keys


def key_condition_number(key: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Largest over smallest singular value of the centered keys, :math:`s_1 / s_r`.

    r is the numerical rank: singular values within float32's noise are left out, as in `leverage_scores`.

    Args:
        key: ``(B, Hkv, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hkv)`` float64, at least 1; NaN for keys that are all equal or not finite.

    Raises:
        ValueError: The shapes do not fit.

    >>> key_condition_number(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])[None, None])
    tensor([[3.]], dtype=torch.float64)
    """
    return key_condition_number_of(key_spectrum(key_gram(key, mask)))


def key_norm_participation_of(norm_shares: PositionProfile) -> Tensor:
    """Fraction of positions that carry the key norm, ``(B, Hkv)``."""
    return norm_shares.participation()


def key_norm_participation(key: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Fraction of positions that carry the key norm.

    .. math:: \frac{(\sum_j w_j)^2}{n \sum_j w_j^2}, \qquad w_j = \|\tilde k_j\|^2

    Args:
        key: ``(B, Hkv, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hkv)`` in [1/n, 1]; NaN for keys that are all equal or not finite.
    """
    return key_norm_participation_of(_profile("norm_shares", key, mask))


def key_rms_of(keys: KeyGram) -> Tensor:
    """Root mean square entry of the centered keys, ``(B, Hkv)``."""
    return (keys.energy / (keys.num_keys * keys.key.shape[-1])).sqrt()


def key_rms(key: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Root mean square entry of the centered keys, in the keys' own unit.

    Args:
        key: ``(B, Hkv, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hkv)`` float64; NaN for a head that is not finite.
    """
    return key_rms_of(key_gram(key, mask))
