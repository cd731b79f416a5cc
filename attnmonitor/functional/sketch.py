r"""The leading spectrum of many cores by a range finder, with a certificate.

A batch of d×d eigenproblems is slow where matrix products are fast. So each core M is compressed to its action on
``target_rank`` columns, found by subspace iteration (Halko, Martinsson & Tropp 2011, Algorithm 4.4 on a d×d operator),
and only the compressed eigenproblem is solved. No random start is needed: in the keys' sorted singular basis, and less
so in that of a triangular root, M is graded, and its own leading columns are a better start than random ones. The
others are folded onto them at half weight, so that no direction is left out. No random state is touched.

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

γ is the Schatten norm :math:`\|K^2\|_F^{1/2} \ge \lambda_{\max}(K)`: one more d×d product. (With :math:`\|K\|_F` alone,
3 to 5 % fewer heads are certified: a flat tail of n equal values is overestimated by √n, now by its square root.)

**Rounding.** All sums are relative to tr M = 1, in float64. Computed products of d-term sums move H, R and K by at
most a small multiple of :math:`d u`; columns that are orthonormal to :math:`\epsilon = \|V^\top V - I\|_F`,
*measured*, scale each θ by at most :math:`1 \pm \epsilon` (Ostrowski) and move R and K by at most ε; whatever the
eigensolver leaves off the diagonal is measured too. The sum of these is the ``error`` returned; the bound is evaluated
with R and γ enlarged by it, and counts compare against the mark with it to spare. A head where any step failed (a
Cholesky factor that broke down) has only the trace as its bound, which certifies nothing.

References:
    N. Halko, P.-G. Martinsson, J. Tropp, *Finding structure with randomness*, SIAM Review 53, 2011, Algorithm 4.4.
    Y. Yamamoto et al., *Roundoff error analysis of the CholeskyQR2 algorithm*, ETNA 44, 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnmonitor.functional.eigenvalues import Solvable, Steps, symmetric_eigenvalues
from attnmonitor.functional.ranks import is_finite

__all__ = ["orthonormal_columns", "sketched_spectrum"]

NUM_POWER_ITERATIONS = 4
"""After 1, 2, 3, 4 iterations of 32 columns, 92 %, 98 %, 98.8 % and 99.6 % of SmolLM2-135M's 1,080 fields (L = 512,
d = 64, triangular root) are certified, and 1.7 %, 0.3 %, none and none are counted wrong."""

SHIFT = 1e-6
"""Iterating with M + SHIFT · tr(M) · I keeps its eigenvectors and its iterates well conditioned (at most 10⁶), which
two passes of Cholesky QR need, also where M is exactly of low rank. Components below SHIFT converge more slowly; they
hold no share that a count could see."""


@Solvable
def sketched_spectrum(core: Tensor, target_rank: int) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    """Leading eigenvalues of cores of trace 1 (or 0), with upper bounds on their running sums.

    Args:
        core: ``(N, d, d)`` float64, positive semidefinite, finite.
        target_rank: r, columns of the sketch, at most d.

    Returns:
        θ ``(N, r)`` descending; upper bounds on λ₁ + … + λ_i for i = 1 … r, ``(N, r)``, at most the trace 1; and the
        rounding error both may carry, ``(N,)``. NaN, 1 and NaN where a step failed.
    """
    head_dim = core.shape[-1]
    identity = torch.eye(target_rank, dtype=core.dtype, device=core.device)
    start = folded_identity(head_dim, identity)
    basis = torch.add(core @ start, start, alpha=SHIFT)
    for _ in range(NUM_POWER_ITERATIONS):
        basis = cholesky_qr(basis)  # not yet orthonormal to rounding, which only the last columns have to be
        basis = torch.baddbmm(basis, core, basis, beta=SHIFT)
    basis = orthonormal_columns(basis)
    image = core @ basis
    compressed = basis.mT @ image
    compressed = (compressed + compressed.mT) / 2
    ritz, left_over = yield from symmetric_eigenvalues.steps(compressed)
    inside = basis @ compressed
    residual = image - inside
    half = torch.sub(image, inside, alpha=0.5)
    outside = torch.baddbmm(core, basis, half.mT, alpha=-1).baddbmm_(half, basis.mT, alpha=-1)
    defect = torch.linalg.matrix_norm(basis.mT @ basis - identity)
    unit_roundoff = torch.finfo(core.dtype).eps / 2
    error = torch.add(left_over, defect, alpha=4) + 8 * head_dim**1.5 * unit_roundoff
    largest_outside = torch.linalg.matrix_norm(outside @ outside).sqrt() + error
    coupling = (torch.linalg.matrix_norm(residual) + error).square()
    gap = ritz - largest_outside[:, None]
    bounds = ritz.cumsum(-1) + coupling[:, None] / gap
    bounds = torch.where((gap > 0) & is_finite(error)[:, None], bounds, 1).clamp_max(1)
    return ritz.clamp_min(0), bounds, error


def folded_identity(size: int, identity: Tensor) -> Tensor:
    """Columns to start from, ``(size, r)``: the leading ones, and the others folded onto them at half weight."""
    num_columns = len(identity)
    start = identity.repeat(-(-size // num_columns), 1)[:size]
    start[num_columns:].mul_(0.5)
    return start


def orthonormal_columns(columns: Tensor) -> Tensor:
    """Orthonormal basis of the columns by Cholesky QR, twice; products and triangular solves only, no wait."""
    return cholesky_qr(cholesky_qr(columns))


def cholesky_qr(columns: Tensor) -> Tensor:
    """One pass: orthonormal up to rounding times the squared condition number of the columns."""
    factor = torch.linalg.cholesky_ex(columns.mT @ columns).L
    basis: Tensor = torch.linalg.solve_triangular(factor, columns.mT, upper=False).mT
    return basis
