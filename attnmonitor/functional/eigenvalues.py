"""Eigenvalues of many small symmetric matrices without waiting for the device.

On CUDA `torch.linalg.eigvalsh` reads a status word back to the host. The parallel cyclic Jacobi method needs nothing
but products, and its off-diagonal remainder says how far it is from done; on a CPU LAPACK is faster.

References:
    G. Golub, C. Van Loan, *Matrix Computations*, 4th ed., section 8.5 (parallel Jacobi: round-robin ordering).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["jacobi_eigenvalues", "symmetric_eigenvalues"]

NUM_SWEEPS = 8
"""Quadratic convergence: 32×32 matrices of any conditioning are diagonal to rounding after 6 to 7."""


def symmetric_eigenvalues(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of symmetric matrices and how far the sum of their errors may reach.

    Args:
        matrices: ``(N, n, n)`` float64, n even on CUDA.

    Returns:
        ``(N, n)``, descending, and ``(N,)``; NaN for a matrix that is not finite.
    """
    finite = matrices.isfinite().all(-1).all(-1)
    matrices = torch.where(finite[:, None, None], matrices, 0)
    if matrices.is_cuda:
        values, error = jacobi_eigenvalues(matrices)
    else:
        values, size = torch.linalg.eigvalsh(matrices).flip(-1), matrices.shape[-1]
        error = 8 * size**1.5 * torch.finfo(matrices.dtype).eps * torch.linalg.matrix_norm(matrices)
    return torch.where(finite[:, None], values, torch.nan), torch.where(finite, error, torch.nan)


def jacobi_eigenvalues(matrices: Tensor, num_sweeps: int = NUM_SWEEPS) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues by parallel cyclic Jacobi rotations.

    Each round rotates n/2 disjoint pairs at once; n - 1 rounds (a round-robin tournament) meet every pair. The sum of
    any eigenvalues differs from that of the diagonal entries by at most the trace norm of what is off the diagonal,
    and that by :math:`\sqrt n` times its Frobenius norm.

    Args:
        matrices: ``(N, n, n)``, symmetric, n even.
        num_sweeps: Passes over all pairs.

    Returns:
        ``(N, n)``, descending, and the bound on the error of their sums, ``(N,)``.
    """
    size = matrices.shape[-1]
    # Rotating rounding noise against rounding noise (in a null space) turns through arbitrary angles and undoes
    # what was done.
    noise = torch.finfo(matrices.dtype).eps * torch.linalg.matrix_norm(matrices)[:, None]
    players = torch.arange(size, device=matrices.device)
    for _ in range(num_sweeps * (size - 1)):
        first, second = players[: size // 2], players[size // 2 :].flip(0)
        matrices = _rotate(matrices, first, second, noise)
        players = torch.cat([players[:1], players[1:].roll(1)])
    values = matrices.diagonal(dim1=-2, dim2=-1)
    remainder = torch.linalg.matrix_norm(matrices - torch.diag_embed(values))
    rounding = num_sweeps * size**1.5 * torch.finfo(matrices.dtype).eps * torch.linalg.matrix_norm(matrices)
    return values.sort(-1, descending=True).values, size**0.5 * remainder + rounding


def _rotate(matrices: Tensor, first: Tensor, second: Tensor, noise: Tensor) -> Tensor:
    """Annihilate the entries (first, second) above ``noise`` in every matrix by one orthogonal similarity."""
    p, q, pq = matrices[:, first, first], matrices[:, second, second], matrices[:, first, second]
    difference = q - p
    hypotenuse = (difference.square() + 4 * pq.square()).sqrt()
    tangent = 2 * pq * torch.where(difference < 0, -1.0, 1.0) / (difference.abs() + hypotenuse)
    tangent = torch.where(pq.abs() <= noise, 0, tangent)
    cosine = (1 + tangent.square()).rsqrt()
    sine = tangent * cosine
    rotation = torch.zeros_like(matrices)
    rotation[:, first, first] = cosine
    rotation[:, second, second] = cosine
    rotation[:, first, second] = sine
    rotation[:, second, first] = -sine
    return rotation.mT @ matrices @ rotation
