"""The Gram matrix and singular basis of the centered keys of each head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, num_positions
from attnmonitor.functional.precision import gram_of, position_blocks
from attnmonitor.functional.ranks import effective_rank

__all__ = ["KeyBasis", "KeyGram", "key_basis", "key_gram"]


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
