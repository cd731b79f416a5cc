r"""The leading spectrum of many cores by a range finder, with a certificate.

A batch of d×d eigenproblems is slow where matrix products are fast. So each core M is compressed to its action on
``target_rank`` columns, found by subspace iteration (Halko, Martinsson & Tropp 2011, Algorithm 4.4 on a d×d operator),
and only the compressed eigenproblem is solved. No random start is needed: M is given in the keys' sorted singular
basis, where it is graded, and its own columns with the largest diagonal entries are a better start than random ones.
(SmolLM2-135M, 1,080 heads, d = 64, 32 columns: 0.7 % wrong counts before the first iteration, 0 after two, against 1 %
from a random start.)

**The certificate.** Let V, d×r, have orthonormal columns, :math:`H = V^\top M V` with eigenvalues
:math:`\theta_1 \ge \dots \ge \theta_r`, :math:`R = M V - V H`, and :math:`K = (I - VV^\top)\,M\,(I - VV^\top)` with
:math:`\lambda_{\max}(K) \le \gamma`. In the basis :math:`[V\; V_\perp]`, M is
:math:`\begin{pmatrix} H & S^\top \\ S & K' \end{pmatrix}` where :math:`\|S\|_F = \|R\|_F` and K' has the non-zero
eigenvalues of K.

*Below:* :math:`\theta_1 + \dots + \theta_i \le \lambda_1 + \dots + \lambda_i` (Ky Fan), so counting with θ can only
over-count.

*Above:* for every i with :math:`\theta_i > \gamma`,

.. math:: \lambda_1 + \dots + \lambda_i \;\le\; \theta_1 + \dots + \theta_i + \frac{\|R\|_F^2}{\theta_i - \gamma}.

Proof. For every t > 0, :math:`\begin{pmatrix} S^\top S / t & -S^\top \\ -S & t I \end{pmatrix} \succeq 0` (it is
:math:`Z^\top Z` with :math:`Z = (S/\sqrt t,\; -\sqrt t\, I)`), hence
:math:`M \preceq \operatorname{diag}(H + S^\top S / t,\; K' + t I)` and every eigenvalue of M is at most that of the
right side (Weyl). Take :math:`t = \theta_i - \gamma`: all eigenvalues of :math:`K' + tI` are at most
:math:`\theta_i \le \lambda_i(H + S^\top S/t)`, so the i largest of the right side are those of its first block, and
their sum is at most :math:`\theta_1 + \dots + \theta_i + \operatorname{tr}(S^\top S)/t` (Ky Fan). ∎

γ is the Schatten norm :math:`\|K^4\|_F^{1/4} \ge \lambda_{\max}(K)`: two more d×d products. (With :math:`\|K\|_F`
alone, 3 to 5 % fewer heads are certified, because a flat tail of n equal values is overestimated by √n; now by the
eighth root of n.)

**Rounding.** All sums are relative to tr M = 1, in float64. Computed products of d-term sums move H, R and K by at
most a small multiple of :math:`d u`; columns that are orthonormal to :math:`\epsilon = \|V^\top V - I\|_F`,
*measured*, scale each θ by at most :math:`1 \pm \epsilon` (Ostrowski) and move R and K by at most ε; whatever the
eigensolver leaves off the diagonal is measured too. The sum of these is the ``error`` returned; the bound is evaluated
with R and γ enlarged by it, and counts compare against the mark with it to spare. A head where any step failed (a
Cholesky factor that broke down, NaN) has a NaN bound, which certifies nothing.

References:
    N. Halko, P.-G. Martinsson, J. Tropp, *Finding structure with randomness*, SIAM Review 53, 2011, Algorithm 4.4.
    Y. Yamamoto et al., *Roundoff error analysis of the CholeskyQR2 algorithm*, ETNA 44, 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnmonitor.functional.eigenvalues import symmetric_eigenvalues

__all__ = ["sketched_spectrum"]

NUM_POWER_ITERATIONS = 2
"""Certified after 0, 1, 2 iterations on the heads named above, 32 columns: 94 %, 98 %, 99.7 %."""

SHIFT = 1e-6
"""Iterating with M + SHIFT · tr(M) · I keeps its eigenvectors and its iterates well conditioned (at most 10⁶), which
two passes of Cholesky QR need, also where M is exactly of low rank. Components below SHIFT converge more slowly; they
hold no share that a count could see."""


def sketched_spectrum(core: Tensor, target_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading eigenvalues of cores of trace 1 (or 0), with upper bounds on their running sums.

    Args:
        core: ``(N, d, d)`` float64, positive semidefinite, finite.
        target_rank: r, columns of the sketch, at most d.

    Returns:
        θ ``(N, r)`` descending; upper bounds on λ₁ + … + λ_i for i = 1 … r, ``(N, r)``, infinite where the sketch
        cannot tell; and the rounding error both may carry, ``(N,)``.
    """
    head_dim = core.shape[-1]
    identity = torch.eye(head_dim, dtype=core.dtype, device=core.device)
    leading = core.diagonal(dim1=-2, dim2=-1).topk(target_rank).indices  # (N, r)
    shifted = core + SHIFT * identity
    columns = leading[:, None, :].expand(-1, head_dim, -1)
    basis = _orthonormal(shifted.gather(-1, columns))
    for _ in range(NUM_POWER_ITERATIONS):
        basis = _orthonormal(shifted @ basis)
    image = core @ basis
    compressed = basis.mT @ image
    compressed = (compressed + compressed.mT) / 2
    ritz, left_over = symmetric_eigenvalues(compressed)
    inside = basis @ compressed
    residual = image - inside
    half = basis @ (image - inside / 2).mT
    outside = core - half - half.mT
    tail = outside @ outside
    tail = tail @ tail
    defect = torch.linalg.matrix_norm(basis.mT @ basis - identity[:target_rank, :target_rank])
    unit_roundoff = torch.finfo(core.dtype).eps / 2
    error = 8 * head_dim**1.5 * unit_roundoff + 4 * defect + left_over
    largest_outside = torch.linalg.matrix_norm(tail).sqrt().sqrt() + error
    coupling = (torch.linalg.matrix_norm(residual) + error).square()
    gap = ritz - largest_outside[:, None]
    raised = torch.where(gap > 0, coupling[:, None] / gap, torch.inf)
    return ritz.clamp_min(0), ritz.cumsum(-1) + torch.where(error.isfinite()[:, None], raised, torch.inf), error


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal basis of the columns by Cholesky QR, twice; products and triangular solves only, no wait."""
    for _ in range(2):
        factor = torch.linalg.cholesky_ex(columns.mT @ columns).L
        columns = torch.linalg.solve_triangular(factor, columns.mT, upper=False).mT
    return columns
