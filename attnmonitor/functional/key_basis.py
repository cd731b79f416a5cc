r"""The Gram matrix, spectrum and singular basis of each head's centered keys.

With the thin SVD of the centered keys, :math:`\tilde k = U S W^\top`, everything that is measured of the keys alone
follows from S and from the rows of U. No SVD of a long matrix is taken: the d×d Gram matrix
:math:`\tilde k^\top \tilde k = W S^2 W^\top` gives W and S, and :math:`U = \tilde k W S^{-1}` is one product.

Each step costs more than the one before, so a statistic takes the first that suffices: `KeyGram` (products only),
`KeySpectrum` (eigenvalues), `KeyBasis` (eigenvectors as well).

Precision. A Gram matrix squares the singular values and so halves the digits. It is therefore float64: products of
float32 entries are exact in it, it keeps singular values down to :math:`10^{-8} \sigma_1`, which is more than float32
keys can resolve, and nothing that float16 or float32 can hold overflows in it. (In float32 it would lose everything
below :math:`3 \cdot 10^{-4} \sigma_1`, and full-rank leverage with it.) The keys are centered before the product: the
shortcut :math:`k^\top k - n \bar k \bar k^\top` cancels when the mean dominates, as it does in trained models.

Letters: B sequences, Hkv key heads, L positions, n valid ones, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, num_positions
from attnmonitor.functional.eigenvalues import Eigenproblem, Solvable, Steps
from attnmonitor.functional.precision import Rounding, fits_float32, gram_of, is_short, position_blocks
from attnmonitor.functional.ranks import effective_rank, is_finite

LARGEST_CONDITION = 50.0
"""Ratio of singular values up to which positions are read in float32: leverage then errs by about a millionth."""

__all__ = ["KeyBasis", "KeyGram", "KeySpectrum", "key_basis", "key_gram", "key_spectrum"]


@dataclass(frozen=True, eq=False)
class KeyGram:
    r"""The Gram matrix of each head's centered keys.

    Attributes:
        key: k, ``(B, Hkv, L, d)``, as passed in.
        key_mask: ``(B, L)`` bool, True where the position is not padding; None where all are.
        mean: Mean key over valid positions, ``(B, Hkv, 1, d)`` float64.
        gram: :math:`\tilde k^\top \tilde k`, ``(B, Hkv, d, d)`` float64; zero for a head that is not finite.
        energy: :math:`\|\tilde k\|_F^2`, ``(B, Hkv)`` float64; NaN for a head that is not finite.
        num_keys: n, ``(B, 1)`` float64.
        rounding: How the Gram matrix was rounded.
    """

    key: Tensor
    key_mask: Tensor | None
    mean: Tensor
    gram: Tensor
    energy: Tensor
    num_keys: Tensor
    rounding: Rounding

    @cached_property
    def energy_of_mean(self) -> Tensor:
        """Energy that centering took from the keys, ``(B, Hkv)`` float64."""
        return self.num_keys * self.mean.square().sum((-2, -1))

    @cached_property
    def size(self) -> Tensor:
        """The energy, 1 where it is zero, ``(B, Hkv)`` float64."""
        return self.energy.masked_fill(self.energy == 0, 1)

    def of_heads(self, sequence: Tensor, head: Tensor) -> KeyGram:
        """The Gram matrices of single heads, ``(N,)`` and ``(N,)``, as those of one head in N sequences."""
        return replace(
            self,
            key=self.key[sequence, head][:, None],
            key_mask=None if self.key_mask is None else self.key_mask[sequence],
            mean=self.mean[sequence, head][:, None],
            gram=self.gram[sequence, head][:, None],
            energy=self.energy[sequence, head][:, None],
            num_keys=self.num_keys[sequence],
        )

    def centered(self) -> Tensor:
        """k̃, ``(B, Hkv, L, d)`` float64, zero at padding."""
        return torch.cat([block.clone() for block in _centered_blocks(self.key, self.key_mask, self.mean)], 2)

    def cholesky_root(self) -> Tensor:
        r"""C with :math:`C C^\top = \tilde k^\top \tilde k`, ``(B, Hkv, d, d)``, by a triangular factor.

        Costs a tenth of an eigenbasis and never waits for the device. The matrix is scaled to a diagonal of ones, so
        that small channels keep their digits, and shifted by 2 d² u, u the unit roundoff: enough for the factorization
        to succeed whatever the rank (Higham, *Accuracy and Stability of Numerical Algorithms*, Theorem 10.7), and
        within the error that `field_cores` states. NaN where it fails, which only a Gram matrix from float32 can do.
        """
        scale = self.gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        inverse = torch.where(scale > 0, scale, 1).reciprocal_()
        scaled = (self.gram * inverse[..., None]).mul_(inverse[..., None, :])
        scaled.diagonal(dim1=-2, dim2=-1).add_(self.gram.shape[-1] ** 2 * torch.finfo(torch.float64).eps)
        factor, info = torch.linalg.cholesky_ex(scaled)
        sound = (info == 0) & is_finite(self.energy)
        root: Tensor = factor.mul_(torch.where(sound[..., None], scale, torch.nan)[..., None])
        return root


@dataclass(frozen=True, eq=False)
class KeySpectrum:
    """The squared singular values of each head's centered keys.

    Attributes:
        keys: The Gram matrix they are eigenvalues of.
        eigenvalues: Λ, ``(B, Hkv, d)`` float64, descending; NaN for a head that is not finite.
    """

    keys: KeyGram
    eigenvalues: Tensor
    _ranks: dict[float, Tensor] = field(default_factory=dict, init=False)

    @cached_property
    def energy(self) -> Tensor:
        """‖k̃‖_F², ``(B, Hkv)``."""
        return self.eigenvalues.sum(-1)

    @cached_property
    def above_noise(self) -> Tensor:
        """Which directions are above float32's noise, ``max(n, d) · eps · σ₁``, ``(B, Hkv, d)`` bool.

        The cut is the same for every input type, so a number does not depend on the type of its keys, nor on how much
        padding stands beside them.
        """
        noise = (self.keys.num_keys.clamp_min(self.keys.key.shape[-1]) * torch.finfo(torch.float32).eps).square()
        return self.eigenvalues > noise[..., None] * self.eigenvalues[..., :1]

    def energy_rank(self, energy: float) -> Tensor:
        """Fewest directions that hold ``energy`` of ‖k̃‖_F², ``(B, Hkv)``; the numerical rank for 1."""
        if energy not in self._ranks:
            self._ranks[energy] = self.above_noise.sum(-1) if energy == 1 else effective_rank(self.eigenvalues, energy)
        return self._ranks[energy]

    def or_nan(self, values: Tensor) -> Tensor:
        """``values``, ``(B, Hkv)``, with NaN for the heads that are not finite."""
        return values.masked_fill(self.keys.energy.isnan(), torch.nan)


@dataclass(frozen=True, eq=False)
class KeyBasis(KeySpectrum):
    r"""The singular basis of each head's centered keys, :math:`\tilde k = U \Lambda^{1/2} W^\top`.

    Attributes:
        eigenvectors: W, ``(B, Hkv, d, d)`` float64, one direction per column.
    """

    eigenvectors: Tensor

    def root(self) -> Tensor:
        """C = W Λ^{1/2}, ``(B, Hkv, d, d)``, in which a field core is graded; NaN if not finite."""
        return self.eigenvectors * self.eigenvalues.sqrt()[..., None, :]

    def leading(self, rank: Tensor) -> Tensor:
        """Return which directions are among the ``rank`` leading ones, ``(B, Hkv) -> (B, Hkv, d)`` bool."""
        return torch.arange(self.eigenvalues.shape[-1], device=rank.device) < rank[..., None]

    def relative_variances(self) -> Tensor:
        """Λ / ‖k̃‖_F², ``(B, Hkv, d)``; NaN where the keys are all equal."""
        return self.eigenvalues / self.energy[..., None]

    def left_blocks(self) -> Iterator[Tensor]:
        """Yield U in blocks of positions, ``(B, Hkv, block, d)``: rows are zero at padding, columns below rank.

        Float64, because a direction near the cut is a ten-millionth of the keys: in float32 its rows would be rounding
        errors, divided by it. Float32 on a CPU for short keys whose condition number is at most `LARGEST_CONDITION`.
        """
        kept = self.above_noise
        dtype = torch.float64
        if is_short(self.keys.key):
            condition = torch.where(kept, self.eigenvalues[..., :1] / self.eigenvalues, 0).sqrt()
            if bool((condition <= LARGEST_CONDITION).all()):
                dtype = torch.float32
        to_left = (self.eigenvectors * torch.where(kept, self.eigenvalues, torch.inf).rsqrt_()[..., None, :]).to(dtype)
        to_left.masked_fill_(self.keys.energy.isnan()[..., None, None], torch.nan)
        for centered in _centered_blocks(self.keys.key, self.keys.key_mask, self.keys.mean, dtype):
            yield centered @ to_left


def _centered_blocks(
    key: Tensor, key_mask: Tensor | None, mean: Tensor, dtype: torch.dtype = torch.float64
) -> Iterator[Tensor]:
    """Yield k̃ in blocks of positions, ``(B, Hkv, block, d)``, zero at padding; each entry as exact as ``dtype`` is."""
    nearest = mean.to(dtype)
    rest = None if dtype == mean.dtype else (mean - nearest).to(dtype)
    for positions, centered in position_blocks(key, key_mask, dtype, minus=nearest):
        if rest is not None:  # a mean much larger than the centered keys would lose its digits in one step
            centered.sub_(rest)
        if key_mask is not None:
            centered = torch.where(key_mask[:, None, positions, None], centered, 0)
        yield centered


def key_gram(key: Tensor, key_mask: Tensor | None = None, *, dtype: torch.dtype = torch.float64) -> KeyGram:
    r"""Center the keys over their valid positions and form their Gram matrix.

    Args:
        key: ``(B, Hkv, L, d)``.
        key_mask: ``(B, L)`` bool, True where the position is not padding; None where all are.
        dtype: Type of the products. In float32 heads that it cannot hold are read again in float64, for which a GPU
            would have to wait, and directions below :math:`10^{-3} \sigma_1` are rounding errors.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_heads("key", key, key_mask)
    num_sequences, num_heads, _, head_dim = key.shape
    num_keys = num_positions(key, key_mask)
    count = num_keys[..., None, None]
    if key_mask is None and key.dtype == dtype == torch.float32:
        mean = key.mean(-2, keepdim=True)
    else:
        total = torch.zeros(num_sequences, num_heads, 1, head_dim, dtype=torch.float64, device=key.device)
        for _, block in position_blocks(key, key_mask, dtype, read_only=True):
            total += block.sum(-2, keepdim=True)
        mean = total / count
    if dtype == torch.float64:
        gram = gram_of(key, _centered_blocks(key, key_mask, mean))
    else:
        mean = mean.to(dtype)  # which is subtracted in one step
        gram, rest = _recentered_gram(key, key_mask, mean, count, dtype)
        mean = mean + rest
    energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    if dtype != torch.float64:
        # Keys that differ by no more than float32 rounds their mean may be all equal.
        differ = energy > num_keys * mean.square().sum((-2, -1)) * (16 * torch.finfo(dtype).eps) ** 2
        again = (~(fits_float32(energy) & differ)).nonzero()
        if len(again):
            sequence, head = again.unbind(-1)
            exact = key_gram(key[sequence, head][:, None], None if key_mask is None else key_mask[sequence])
            for found, of_heads in ((gram, exact.gram), (energy, exact.energy), (mean, exact.mean)):
                found[sequence, head] = of_heads[:, 0]
    energy = energy + 0 * energy  # NaN where it is infinite
    keys = KeyGram(key, key_mask, mean, gram, energy, num_keys, Rounding.of(key, dtype))
    # Equal float64 keys differ from their mean by its rounding: centered keys no larger than that are zero.
    is_zero = energy <= num_keys.square() * keys.energy_of_mean * torch.finfo(torch.float64).eps ** 2
    without = is_zero | energy.isnan()
    if dtype == torch.float64 or bool(without.any()):
        gram.masked_fill_(without[..., None, None], 0)
    energy.masked_fill_(is_zero, 0)
    return keys


def _recentered_gram(
    key: Tensor, key_mask: Tensor | None, mean: Tensor, count: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The Gram matrix of keys whose mean is rounded, and what is left of their mean, ``(B, Hkv, 1, d)``."""
    rest = torch.zeros_like(mean, dtype=torch.float64)

    def blocks() -> Iterator[Tensor]:
        for block in _centered_blocks(key, key_mask, mean, dtype):
            rest.add_(block.sum(-2, keepdim=True))
            yield block

    gram = gram_of(key, blocks())
    rest = rest / count
    return gram.addcmul_(rest.mT, -count * rest), rest


@Solvable
def key_spectrum(keys: KeyGram) -> Steps[KeySpectrum]:
    """Squared singular values of the centered keys, without their directions: a third of the cost of `key_basis`."""
    eigenvalues, _ = yield Eigenproblem(keys.gram)
    return KeySpectrum(keys, _descending(eigenvalues, keys))


@Solvable
def key_basis(keys: KeyGram) -> Steps[KeyBasis]:
    """Diagonalize the Gram matrix of the centered keys."""
    eigenvalues, eigenvectors = yield Eigenproblem(keys.gram, vectors=True)
    assert eigenvectors is not None
    return KeyBasis(keys, _descending(eigenvalues, keys), eigenvectors.flip(-1))


def _descending(eigenvalues: Tensor, keys: KeyGram) -> Tensor:
    """Ascending eigenvalues of a Gram matrix in descending order; NaN for a head that is not finite."""
    return eigenvalues.flip(-1).clamp_min_(0).masked_fill_(keys.energy.isnan()[..., None], torch.nan)
